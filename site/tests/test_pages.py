"""The built pages: no dead link, no picture without a description, nothing cut off."""

import json
import os
import re
import subprocess
import sys
from urllib.parse import unquote, urlparse

import pytest
from bs4 import BeautifulSoup
from conftest import ROOT, SITE
from markdown_it import MarkdownIt

PAGES = sorted(
    path.relative_to(SITE).as_posix()
    for path in SITE.rglob("*.html")
    if "_" not in path.relative_to(SITE).parts[0] and path.stem not in ("genindex", "search")
)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LESSON = "notebooks/00_fundamentals.html"


@pytest.fixture(scope="module")
def soups():
    """Every page by its path."""
    return {page: BeautifulSoup((SITE / page).read_bytes(), "html.parser") for page in PAGES}


def dead_links(page, soup, soups):
    """What the page points to and the site does not have."""
    found = []
    for tag in soup.find_all(["a", "link", "img", "script"]):
        link = urlparse(tag.get("href") or tag.get("src") or "")
        if link.scheme or link.netloc:
            continue
        path = (SITE / page).parent / unquote(link.path) if link.path else SITE / page
        target = soups.get(os.path.relpath(path, SITE))
        if not path.is_file():
            found.append(link.geturl())
        elif link.fragment and target and not target.find(id=unquote(link.fragment)):
            found.append(link.geturl())
    return found


def test_all_pages_are_there():
    expected = {path.with_suffix(".html").name for path in NOTEBOOKS} | {"README.html"}
    assert expected | {"index.html", "explorer.html"} <= {page.split("/")[-1] for page in PAGES}


@pytest.mark.parametrize("page", PAGES)
def test_no_link_is_dead(page, soups):
    assert dead_links(page, soups[page], soups) == []


@pytest.mark.parametrize("page", PAGES)
def test_no_address_is_a_placeholder(page, soups):
    links = [tag.get("href") or tag.get("src") for tag in soups[page].find_all(["a", "img"])]
    assert not [link for link in links if link and "OWNER" in link]


def outputs(notebook):
    """What the cells of a notebook show."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [output for cell in cells for output in cell.get("outputs", [])]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_table_that_a_cell_shows_is_a_table(notebook, soups):
    shown = ["".join(each.get("data", {}).get("text/markdown", "")) for each in outputs(notebook)]
    page = soups[f"notebooks/{notebook.stem}.html"]
    assert len(page.select(".cell_output table")) == sum("|--" in text for text in shown)


def test_the_foot_says_version_and_date(soups):
    foot = soups["README.html"].find("footer", class_="bd-footer-content").get_text()
    assert re.search(r"normcourse \d+\.\d+\.\d+, \d{4}-\d\d-\d\d", foot)


# --- in a browser ---------------------------------------------------------------------------------

IMAGES = "images => images.map(i => [i.src.split('/').pop(), i.alt.trim(), i.naturalWidth])"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_whole_wherever_it_is_read(page, look, address):
    """It asks no other site, its pictures load and are described, and it fits its window."""
    asked, said = [], []
    opened = look()
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.goto(f"{address}/{page}", wait_until="networkidle")
    assert [url for url in asked if not url.startswith((address, "data:"))] == [] == said
    for name, alt, width in opened.locator("img").evaluate_all(IMAGES):
        assert width > 0 and len(alt) > 10 and not alt.startswith("<"), (name, alt)
    for width in (400, 900, 1600):
        opened.set_viewport_size({"width": width, "height": 900})
        assert opened.evaluate(OVERFLOW) <= 0, width


def test_figures_are_on_white_in_the_dark(look):
    opened = look(LESSON, color_scheme="dark")
    assert opened.locator("html").get_attribute("data-theme") == "dark"
    colors = "images => images.map(i => getComputedStyle(i).backgroundColor)"
    assert set(opened.locator("article img").evaluate_all(colors)) == {"rgb(255, 255, 255)"}


def test_formulas_are_set(look):
    opened = look(LESSON)
    opened.locator("mjx-container").first.wait_for(state="attached")  # the first is folded
    assert not opened.locator("mjx-merror").count()


def test_what_a_prediction_asks_for_is_folded(look):
    cells = json.loads((ROOT / "notebooks/00_fundamentals.ipynb").read_text())["cells"]
    answers = [cell for cell in cells if "hide-output" in cell["metadata"].get("tags", [])]
    opened = look(LESSON)
    folded = opened.locator(".cell details.below-input")
    assert folded.count() == len(answers) > 10
    assert not opened.locator(".cell details[open]").count()
    assert not folded.locator(".cell_output").first.is_visible()


def test_search_finds_a_word(look):
    opened = look("search.html?q=batchmates")
    opened.locator("#search-results li").first.wait_for()


# --- before and after it is published -------------------------------------------------------------


def test_until_it_is_published_no_button_launches_anything(soups):
    if "announcement" not in (ROOT / "build/site/README.html").read_text():
        pytest.skip("git remote names a public address")
    assert "not published yet" in soups[LESSON].find(class_="bd-header-announcement").get_text()
    assert not soups[LESSON].find("a", href=re.compile("colab|github.com"))


PUBLISHED = ["notebooks/00_fundamentals.ipynb", "notebooks/02_layer_norm.ipynb"]


def test_once_it_is_published_a_lesson_opens_in_colab(tmp_path):
    place = "https://github.com/somebody/normcourse"
    remote = {"COUNT": "1", "KEY_0": "remote.origin.url", "VALUE_0": f"{place}.git"}
    env = os.environ | {f"GIT_CONFIG_{key}": value for key, value in remote.items()}
    build = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-E",
        "-c",
        "site",
        ".",
        str(tmp_path),
        *PUBLISHED,
    ]
    subprocess.run(build, cwd=ROOT, env=env, check=True)
    page = BeautifulSoup((tmp_path / LESSON).read_bytes(), "html.parser")
    assert "not published yet" not in page.get_text()
    (button,) = {a["href"] for a in page.find_all("a", href=re.compile("colab.research"))}
    assert button.endswith("/github/somebody/normcourse/blob/main/notebooks/00_fundamentals.ipynb")
    other = BeautifulSoup((tmp_path / "notebooks/02_layer_norm.html").read_bytes(), "html.parser")
    assert other.find("a", href=f"{place}/blob/main/experiments/transformer.py")


# --- where there is no site -----------------------------------------------------------------------


def descriptions(notebook):
    """The description that plot.show wrote beside each figure."""
    found = []
    for output in outputs(notebook):
        for kind, data in output.get("metadata", {}).items():
            found += [data["alt"]] if kind.startswith("image/") else []
    return found


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_nbconverts_own_page_describes_the_figures(notebook):
    page = (ROOT / "build/nbconvert" / notebook.name).with_suffix(".html")
    soup = BeautifulSoup(page.read_bytes(), "html.parser")
    figures = soup.find_all(class_="jp-RenderedImage")
    expected = descriptions(notebook)
    assert len(figures) == len(expected)
    for figure, words in zip(figures, expected, strict=True):
        assert words in figure.find_parent(class_="jp-OutputArea").get_text()


def test_jupyterlab_describes_a_figure(jupyter, look, tmp_path):
    notebook, path = json.loads(NOTEBOOKS[0].read_text()), tmp_path / "figure.ipynb"
    figure = next(cell for cell in notebook["cells"] if "image/png" in str(cell))
    notebook["cells"] = [figure | {"metadata": {}}]  # not folded
    path.write_text(json.dumps(notebook))
    lab = look()
    lab.goto(f"{jupyter}/lab/tree/figure.ipynb")
    (words,) = descriptions(path)
    lab.get_by_text(words, exact=True).wait_for(timeout=90_000)
    assert lab.locator(".jp-RenderedImage img").is_visible()


GITHUB = """
body { font: 16px/1.5 sans-serif; margin: 0 auto; width: 838px; }
img { max-width: 100%; } code { font-size: 85%; } h1 { font-size: 2em; } h2 { font-size: 1.5em; }
table { display: block; width: max-content; max-width: 100%; overflow: auto; }
td, th { padding: 6px 13px; border: 1px solid; } pre { padding: 16px; overflow: auto; }
"""


@pytest.fixture
def readme(browser):
    """README as GitHub lays it out in a window 1,012 pixels wide."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    html = MarkdownIt().enable("table").render(text)
    page = ROOT / "build" / "readme.html"
    page.write_text(f'<meta charset="utf-8"><base href="../"><style>{GITHUB}</style>{html}')
    opened = browser.new_page(viewport={"width": 1012, "height": 900})
    opened.goto(page.as_uri())
    yield opened
    opened.close()


def test_readme_fits_its_column(readme):
    cut = "all => all.map(e => e.scrollWidth - e.clientWidth)"
    for kind in ("table", "pre"):
        assert max(readme.locator(kind).evaluate_all(cut), default=0) <= 0, kind


def test_readme_says_soon_how_to_start(readme):
    start = readme.locator("h2", has_text=re.compile("start", re.I)).first
    assert start.bounding_box()["y"] < 2 * 900


def test_readme_takes_a_few_minutes():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    words = re.sub(r"<!--.*?-->|\]\([^)]*\)", " ", text, flags=re.S)
    assert len(re.findall(r"\w[\w.,'’-]*", words)) <= 900
