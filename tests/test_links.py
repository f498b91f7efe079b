"""README and notebooks: no dead link or anchor, and a text for every picture. No network: other sites are not asked."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / folder / "README.md" for folder in ("", "benchmarks", "experiments")]
PAGES += sorted((ROOT / "notebooks").glob("*.ipynb"))


def pieces(page: Path) -> list[str]:
    """The Markdown of a page: the whole text, or a notebook's text cells."""
    if page.suffix != ".ipynb":
        return [page.read_text(encoding="utf-8")]
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]


def prose(page: Path) -> str:
    """A page's Markdown without code, in which brackets mean something else."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", "\n\n".join(pieces(page)), flags=re.S)


def anchors(page: Path) -> set[str]:
    """What a link may name after #: GitHub's form of the headings, and in a notebook Jupyter's, which keeps capitals."""
    headings = re.findall(r"^#+ +(.*?) *$", re.sub(r"```.*?```", "", "\n\n".join(pieces(page)), flags=re.S), re.M)
    github = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
    return github | ({heading.replace(" ", "-") for heading in headings} if page.suffix == ".ipynb" else set())


def problems(page: Path) -> list[str]:
    """Every dead link, missing anchor and picture without a text of its own, in words."""
    text, found = prose(page), []
    for picture, words, target in re.findall(r"(!?)\[([^\]]*)\]\(\s*([^)\s]+)[^)]*\)", text):
        if not words.strip():
            found.append(f"no words for {target}")
        if picture and re.match("https?:", target):
            found.append(f"a picture of another site: {target}")
        if re.match(r"https?:|mailto:|attachment:", target):
            continue
        file, _, anchor = target.partition("#")
        aim = (page.parent / file).resolve() if file else page
        if not aim.exists():
            found.append(f"dead link {target}")
        elif anchor and anchor not in anchors(aim):
            found.append(f"no heading for {target}")
    found += [f"no alt text: {tag}" for tag in re.findall(r"<img[^>]*>", text) if not re.search(r'alt="[^"]+"', tag)]
    return found + unnamed_outputs(page)


def unnamed_outputs(page: Path) -> list[str]:
    """Pictures among a notebook's outputs whose text form does not say what they show."""
    if page.suffix != ".ipynb":
        return []
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    texts = ["".join(data.get("text/plain", "")) for data in outputs if "image/png" in data]
    return [f"a picture called {text!r}" for text in texts if not text.strip() or text.startswith("<")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_anchors_and_alt_texts(page):
    assert problems(page) == []


def test_the_readme_shows_pictures():
    assert len(re.findall(r"!\[[^\]]+\]\(images/", (ROOT / "README.md").read_text(encoding="utf-8"))) >= 5


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[a](gone.md)", "dead link gone.md"), ("[a](#gone)", "no heading for #gone"),
        ("[a](page.md#gone)", "no heading for page.md#gone"), ("![](there.png)", "no words for there.png"),
        ("![a](https://example.org/a.png)", "a picture of another site: https://example.org/a.png"),
        ('<img src="there.png">', 'no alt text: <img src="there.png">'),
    ],
)  # fmt: skip
def test_a_broken_page_is_found(tmp_path, text, complaint):
    (tmp_path / "there.png").touch()
    (tmp_path / "page.md").write_text(f"# A *big* title, indeed\n\n[up](#a-big-title-indeed) `[x](y)`\n\n{text}\n")
    assert problems(tmp_path / "page.md") == [complaint]


def test_a_broken_notebook_is_found(tmp_path):
    output = {"data": {"image/png": "", "text/plain": ["<Figure size 640x480 with 1 Axes>"]}}
    cells = [
        {"cell_type": "markdown", "source": ["# My Part\n", "[fine](#My-Part) [gone](#My-part) [also](other.ipynb)"]},
        {"cell_type": "code", "source": [], "outputs": [output]},
    ]
    (tmp_path / "page.ipynb").write_text(json.dumps({"cells": cells}))
    first, second, third = problems(tmp_path / "page.ipynb")
    assert (first, second) == ("no heading for #My-part", "dead link other.ipynb") and "<Figure" in third
