"""README and notebooks: no dead link or anchor, a text for every picture. Without a network."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / folder / "README.md" for folder in ("", "benchmarks", "experiments")]
PAGES += [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("C*.md"))]
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
    """What a link may name after #: GitHub's form of the headings, or Jupyter's with capitals."""
    text = re.sub(r"```.*?```", "", "\n\n".join(pieces(page)), flags=re.S)
    found = set()
    for heading in re.findall(r"^#+ +(.*?) *$", text, re.M):
        found.add(re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-"))
        if page.suffix == ".ipynb":
            found.add(heading.replace(" ", "-"))
    return found


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
    for tag in re.findall(r"<img[^>]*>", text):
        if not re.search(r'alt="[^"]+"', tag):
            found.append(f"no alt text: {tag}")
    return found + unnamed_outputs(page)


def unnamed_outputs(page: Path) -> list[str]:
    """Pictures among a notebook's outputs whose text form does not say what they show."""
    if page.suffix != ".ipynb":
        return []
    found = []
    for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            text = "".join(data.get("text/plain", ""))
            is_picture = any(kind.startswith("image/") for kind in data)
            if is_picture and (not text.strip() or text.startswith("<")):
                found.append(f"a picture called {text!r}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_anchors_and_alt_texts(page):
    assert problems(page) == []


def test_the_readme_shows_pictures():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(re.findall(r"!\[[^\]]+\]\(images/", page)) >= 5


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[a](gone.md)", "dead link gone.md"),
        ("[a](#gone)", "no heading for #gone"),
        ("[a](page.md#gone)", "no heading for page.md#gone"),
        ("![](there.png)", "no words for there.png"),
        ("![a](https://example.org/a.png)", "a picture of another site: https://example.org/a.png"),
        ('<img src="there.png">', 'no alt text: <img src="there.png">'),
    ],
)
def test_a_broken_page_is_found(tmp_path, text, complaint):
    (tmp_path / "there.png").touch()
    page = f"# A *big* title, indeed\n\n[up](#a-big-title-indeed) `[x](y)`\n\n{text}\n"
    (tmp_path / "page.md").write_text(page)
    assert problems(tmp_path / "page.md") == [complaint]


@pytest.mark.parametrize("kind", ["image/png", "image/jpeg"])
def test_a_broken_notebook_is_found(tmp_path, kind):
    output = {"data": {kind: "", "text/plain": ["<Figure size 640x480 with 1 Axes>"]}}
    links = "[fine](#My-Part) [gone](#My-part) [also](other.ipynb)"
    cells = [
        {"cell_type": "markdown", "source": ["# My Part\n", links]},
        {"cell_type": "code", "source": [], "outputs": [output]},
    ]
    (tmp_path / "page.ipynb").write_text(json.dumps({"cells": cells}))
    first, second, third = problems(tmp_path / "page.ipynb")
    assert first == "no heading for #My-part" and second == "dead link other.ipynb"
    assert "<Figure" in third
