"""What every committed notebook must be: run from top to bottom, clean, portable and small."""

import json
import re
from pathlib import Path

import pytest
from nbval.plugin import metadata_tags

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
PRIVATE_PATH = re.compile(r"/(?:home|root|tmp|work|Users)/|[A-Z]:\\\\?[A-Za-z]|site-packages")
TRACEBACK = "Traceback (most recent call last)"
MARK = re.compile(r"NBVAL_\w+", re.IGNORECASE)  # a comment for nbval: ours are tags of the cell
TAGS = {"nbval-ignore-output", "nbval-check-output", "nbval-raises-exception", "nbval-skip"}
# a site folds by the tag, JupyterLab by the metadata, Colab by cellView
FOLDS = {
    "hide-output": "outputs_hidden",  # the answer to a prediction
    "hide-input": "source_hidden",  # code that only draws or checks
}
LONGEST = 100  # characters of a code line


def problems(notebook: dict, size: int = 0) -> list[str]:
    """Everything that is wrong with a notebook, in words; an empty list for a clean one."""
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    found = problems_of_the_run(code)
    found += problems_of_the_text(notebook)
    if "widgets" in notebook["metadata"]:
        found.append("saved widget state")
    if notebook["metadata"].get("kernelspec", {}).get("name") != "python3":
        found.append("the kernel is not python3")
    for cell in code:
        found += problems_of_the_source(cell)
    for cell in notebook["cells"]:
        found += problems_of_the_tags(cell)
    if size >= 1_000_000:
        found.append(f"{size} bytes")
    return found


def problems_of_the_run(code: list[dict]) -> list[str]:
    """The cells ran once, from top to bottom, without an error or a warning, and left no widget."""
    found = []
    if not code:
        found.append("no code cell")
    counts = [cell["execution_count"] for cell in code]
    if counts != list(range(1, len(code) + 1)):
        found.append(f"execution counts are not 1..{len(code)}: {counts}")
    for cell in code:
        for output in cell["outputs"]:
            found += problems_of_an_output(output, cell["execution_count"])
    return found


def problems_of_an_output(output: dict, count: int) -> list[str]:
    """``count`` is the execution count of its cell."""
    found = []
    if output.get("execution_count", count) != count:
        found.append("an output has another execution count than its cell")
    if output.get("name") == "stderr":
        found.append("text on stderr, such as a warning")
    if output["output_type"] == "error":
        found.append("an error in the outputs")
    if any("widget" in kind for kind in output.get("data", {})):
        found.append("a saved widget")
    return found


def problems_of_the_text(notebook: dict) -> list[str]:
    """No text that a reader sees tells of an error or of one machine."""
    text = text_of(notebook)
    found = []
    if TRACEBACK in text:
        found.append("a traceback")
    if match := PRIVATE_PATH.search(text):
        found.append(f"a path of one machine: {match.group()}")
    return found


def problems_of_the_source(cell: dict) -> list[str]:
    """No line of code is too long or speaks to nbval."""
    found = []
    for line in "".join(cell["source"]).splitlines():
        if MARK.search(line):
            found.append(f"a mark in the source, where a tag belongs: {line!r}")
        if len(line) > LONGEST:
            found.append(f"a line of {len(line)} characters: {line!r}")
    return found


def problems_of_the_tags(cell: dict) -> list[str]:
    """A tag is one of nbval's, or folds a cell, or is image-NAME where one picture is shown."""
    tags = cell["metadata"].get("tags", [])
    if not isinstance(tags, list):  # nbval passes over them
        return [f"tags that are no list: {tags!r}"]
    pictures = 0
    for output in cell.get("outputs", []):
        pictures += any(kind.startswith("image/") for kind in output.get("data", {}))
    found = []
    for tag in tags:
        if tag.startswith("image-") and tag != "image-":
            if pictures != 1:
                found.append(f"{pictures} pictures in the cell tagged {tag}")
        elif tag not in {*TAGS, *FOLDS} or cell["cell_type"] != "code":
            found.append(f"a tag that nothing reads: {tag!r}")
    return found + problems_of_the_folds(cell, tags)


def problems_of_the_folds(cell: dict, tags: list) -> list[str]:
    """What one viewer folds is folded in the others."""
    found = []
    in_colab = cell["metadata"].get("cellView") == "form"
    for tag, hidden in FOLDS.items():
        if tag in tags and not cell["metadata"].get("jupyter", {}).get(hidden):
            found.append(f"{tag}, but JupyterLab does not fold it")
    if "hide-input" in tags and not in_colab:
        found.append("hide-input, but Colab does not fold it")
    return found


def text_of(notebook: dict) -> str:
    """All text a reader can see; no pictures, since their base64 code can spell anything."""
    parts = []
    for cell in notebook["cells"]:
        parts.append("".join(cell["source"]))
        for output in cell.get("outputs", []):
            parts.append("".join(output.get("text", [])))
            parts.append("\n".join(output.get("traceback", [])))
            parts += [
                "".join(data)
                for kind, data in output.get("data", {}).items()
                if kind.startswith("text/")
            ]
    return "\n".join(parts) + json.dumps(notebook["metadata"])


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_clean(path):
    assert problems(json.loads(path.read_text(encoding="utf-8")), path.stat().st_size) == []


def cells_of(path):
    """The cells of a notebook, each with its source as one text."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


@pytest.mark.parametrize(("lesson", "least"), {"00": 15, "01": 20, "02": 15, "03": 15}.items())
def test_answers_are_folded(lesson, least):
    """The output that answers a prediction is folded, and so is its explanation."""
    (path,) = [each for each in NOTEBOOKS if re.match(f"{lesson}_(?!solutions)", each.name)]
    cells = cells_of(path)
    asked = 0
    for k, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            folded = cell["metadata"].get("jupyter", {}).get("outputs_hidden", False)
            assert folded == ("hide-output" in cell["metadata"].get("tags", []))
        elif "**Predict.**" in cell["source"]:
            asked += 1
            texts = (each for each in cells[k + 1 :] if each["cell_type"] == "markdown")
            start = "<details><summary>What came out</summary>\n\n"
            assert next(texts)["source"].startswith(start)
            answers = [each for each in cells[k + 1 :] if each.get("outputs")]
            assert "hide-output" in answers[0]["metadata"]["tags"]
    assert asked >= least


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_what_only_draws_or_checks_is_folded(path):
    """In JupyterLab by source_hidden, on a site by the tag, in Colab by cellView."""
    for cell in cells_of(path):
        skip = cell["source"].startswith(("# skip", "# Finds the course"))
        folded = cell["metadata"].get("jupyter", {}).get("source_hidden", False)
        tagged = "hide-input" in cell["metadata"].get("tags", [])
        assert skip == folded == tagged == (cell["metadata"].get("cellView") == "form")
        assert cell["source"].startswith("# skip: ") or not cell["source"].startswith("# skip")


def example(source="x = 1", count=1, outputs=(), metadata=None, tags=None):
    cell = {
        "cell_type": "code",
        "source": source.splitlines(keepends=True),
        "execution_count": count,
        "outputs": list(outputs),
        "metadata": {} if tags is None else {"tags": tags},
    }
    return {"cells": [cell], "metadata": {"kernelspec": {"name": "python3"}} | (metadata or {})}


def printed(text):
    return {"output_type": "stream", "name": "stdout", "text": [text]}


def displayed(kind):
    return {"output_type": "display_data", "data": {kind: {}}}


def tagged_text(tag):
    """A clean notebook, but for a tag on its text."""
    notebook = example()
    text = {"cell_type": "markdown", "source": ["text"], "metadata": {"tags": [tag]}}
    notebook["cells"].append(text)
    return notebook


def folded(metadata):
    """A clean notebook with a folded cell, if this metadata folds it."""
    notebook = example(tags=["hide-input"])
    notebook["cells"][0]["metadata"] |= metadata
    return notebook


HIDDEN = {"source_hidden": True}
WIDGET = "application/vnd.jupyter.widget-view+json"
WARNING = printed("UserWarning") | {"name": "stderr"}
ERROR = {"output_type": "error", "traceback": ["ValueError"]}
HOME, PACKAGES = printed("saved to /home/ada/net.pt"), printed("lib/site-packages/torch")
PNG, JPEG = displayed("image/png"), displayed("image/jpeg")
LONG = f"x = {'1' * 97}"
DIRTY = {
    "never run": (example(count=None), "execution counts"),
    "run out of order": (example(count=7), "execution counts"),
    "an output of another run": (example(outputs=[PNG | {"execution_count": 2}]), "an output has"),
    "a warning": (example(outputs=[WARNING]), "stderr"),
    "an error": (example(outputs=[ERROR]), "an error"),
    "a printed traceback": (example(outputs=[printed(TRACEBACK)]), "a traceback"),
    "widget state": (example(metadata={"widgets": {}}), "saved widget state"),
    "a widget": (example(outputs=[displayed(WIDGET)]), "a saved widget"),
    "another kernel": (example(metadata={"kernelspec": {"name": "venv"}}), "the kernel"),
    "a home folder": (example(outputs=[HOME]), "a path"),
    "a Windows path": (example(source=r"open('C:\data')"), "a path"),
    "a package folder": (example(outputs=[PACKAGES]), "a path"),
    "a mark": (example(source="# NBVAL_IGNORE_OUTPUT\nx = 1"), "a mark"),
    "a mark below": (example(source="x = 1\n    # NBVAL_SKIP\n"), "a mark"),
    "a mark behind code": (example(source="x = 1  # NBVAL_CHECK_OUTPUT"), "a mark"),
    "a mark with words": (example(source="# NBVAL_IGNORE_OUTPUT it takes time\nx = 1"), "a mark"),
    "a misspelt mark": (example(source="# NBVAL_IGNORE_OUTPUTS\nx = 1"), "a mark"),
    "a mark in small letters": (example(source="# nbval_skip\nx = 1"), "a mark"),
    "an unknown tag": (example(tags=["nbval-ignore-time"]), "a tag"),
    "a misspelt tag": (example(tags=["nbval-skip", "nbval-ignore-outputs"]), "a tag"),
    "letters of a tag swapped": (example(tags=["nbavl-ignore-output"]), "a tag"),
    "a tag with underscores": (example(tags=["nbval_ignore_output"]), "a tag"),
    "a tag in capitals": (example(tags=["NBVAL-SKIP"]), "a tag"),
    "tags as text": (example(tags="nbval-skip"), "tags that are no list"),
    "nbval's tag on text": (tagged_text("nbval-skip"), "a tag"),
    "an answer in sight": (example(tags=["hide-output"]), "hide-output, but JupyterLab"),
    "code in sight": (folded({"cellView": "form"}), "hide-input, but JupyterLab"),
    "code in sight in Colab": (folded({"jupyter": HIDDEN}), "hide-input, but Colab"),
    "an image without a name": (example(tags=["image-"], outputs=[PNG]), "a tag"),
    "an image that is not there": (example(tags=["image-cube"]), "0 pictures"),
    "an image that is text": (example(tags=["image-cube"], outputs=[printed("x")]), "0 pictures"),
    "two images": (example(tags=["image-cube"], outputs=[PNG, JPEG]), "2 pictures"),
    "a long line": (example(source=f"x = 1\n{LONG}\n"), "a line of 101"),
}


@pytest.mark.parametrize("outputs", [[PNG], [printed("x"), JPEG]], ids=["png", "jpeg"])
def test_a_clean_example_has_no_problem(outputs):
    notebook = example(LONG[:-1], outputs=outputs, tags=["image-cube", *TAGS])
    assert problems(notebook, size=999_999) == []


def test_a_folded_cell_has_no_problem():
    assert problems(folded({"jupyter": HIDDEN, "cellView": "form"})) == []


def test_nbval_knows_the_tags():
    assert TAGS < metadata_tags.keys()


@pytest.mark.parametrize(("notebook", "complaint"), DIRTY.values(), ids=DIRTY)
def test_a_dirty_notebook_is_found(notebook, complaint):
    found = problems(notebook)
    assert len(found) == 1, found
    assert found[0].startswith((complaint, "text on " + complaint)), found


def test_a_large_notebook_is_found():
    assert problems(example(), size=1_000_000) == ["1000000 bytes"]
