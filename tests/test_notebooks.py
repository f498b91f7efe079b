"""What every committed notebook must be: run from top to bottom, clean, portable and small."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
PRIVATE_PATH = re.compile(r"/(?:home|root|tmp|work|Users)/|[A-Z]:\\\\?[A-Za-z]|site-packages")
TRACEBACK = "Traceback (most recent call last)"
MARKER = re.compile(r"NBVAL_[A-Z_]+")
MARKERS = {"NBVAL_IGNORE_OUTPUT", "NBVAL_CHECK_OUTPUT", "NBVAL_RAISES_EXCEPTION", "NBVAL_SKIP"}


def problems(notebook: dict, size: int = 0) -> list[str]:
    """Everything that is wrong with a notebook, in words; an empty list for a clean one."""
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    counts = [cell["execution_count"] for cell in code]
    found = []
    if not code:
        found.append("no code cell")
    if counts != list(range(1, len(code) + 1)):
        found.append(f"execution counts are not 1..{len(code)}: {counts}")
    if any(
        output.get("execution_count", count) != count
        for cell, count in zip(code, counts, strict=True)
        for output in cell["outputs"]
    ):
        found.append("an output has another execution count than its cell")
    if any(output.get("name") == "stderr" for output in outputs):
        found.append("text on stderr, such as a warning")
    if any(output["output_type"] == "error" for output in outputs):
        found.append("an error in the outputs")
    if "widgets" in notebook["metadata"]:
        found.append("saved widget state")
    if any("widget" in kind for output in outputs for kind in output.get("data", {})):
        found.append("a saved widget")
    if notebook["metadata"].get("kernelspec", {}).get("name") != "python3":
        found.append("the kernel is not python3")
    text = text_of(notebook)
    if TRACEBACK in text:
        found.append("a traceback")
    if match := PRIVATE_PATH.search(text):
        found.append(f"a path of one machine: {match.group()}")
    for line in (line for cell in code for line in "".join(cell["source"]).splitlines() if MARKER.search(line)):
        if not (match := re.fullmatch(r"# (NBVAL_[A-Z_]+)", line)) or match[1] not in MARKERS:
            found.append(f"a marker that nbval does not see: {line!r}")
    if size >= 1_000_000:
        found.append(f"{size} bytes")
    return found


def text_of(notebook: dict) -> str:
    """All text a reader can see; pictures are left out, since their base64 code can spell anything."""
    parts = []
    for cell in notebook["cells"]:
        parts.append("".join(cell["source"]))
        for output in cell.get("outputs", []):
            parts.append("".join(output.get("text", [])))
            parts.append("\n".join(output.get("traceback", [])))
            parts += ["".join(data) for kind, data in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join(parts) + json.dumps(notebook["metadata"])


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_clean(path):
    assert problems(json.loads(path.read_text(encoding="utf-8")), path.stat().st_size) == []


def example(source="x = 1", count=1, outputs=(), metadata=None):
    cell = {"cell_type": "code", "source": [source], "execution_count": count, "outputs": list(outputs), "metadata": {}}
    return {"cells": [cell], "metadata": {"kernelspec": {"name": "python3"}} | (metadata or {})}


STREAM = {"output_type": "stream", "name": "stdout"}
WIDGET = "application/vnd.jupyter.widget-view+json"
DIRTY = {
    "never run": (example(count=None), "execution counts"),
    "run out of order": (example(count=7), "execution counts"),
    "a warning": (example(outputs=[STREAM | {"name": "stderr", "text": ["UserWarning"]}]), "stderr"),
    "an error": (example(outputs=[{"output_type": "error", "traceback": ["ValueError"]}]), "an error"),
    "a printed traceback": (example(outputs=[STREAM | {"text": [TRACEBACK]}]), "a traceback"),
    "widget state": (example(metadata={"widgets": {}}), "saved widget state"),
    "a widget": (example(outputs=[{"output_type": "display_data", "data": {WIDGET: {}}}]), "a saved widget"),
    "another kernel": (example(metadata={"kernelspec": {"name": "venv"}}), "the kernel"),
    "a home folder": (example(outputs=[STREAM | {"text": ["saved to /home/ada/net.pt"]}]), "a path"),
    "a Windows path": (example(source=r"open('C:\data')"), "a path"),
    "a package folder": (example(outputs=[STREAM | {"text": ["lib/site-packages/torch"]}]), "a path"),
    "a marker with words": (example(source="# NBVAL_IGNORE_OUTPUT it takes time\nx = 1"), "a marker"),
    "a misspelt marker": (example(source="# NBVAL_IGNORE_OUTPUTS\nx = 1"), "a marker"),
}  # fmt: skip


def test_a_clean_example_has_no_problem():
    assert problems(example(source="# NBVAL_IGNORE_OUTPUT\nx = 1"), size=999_999) == []


@pytest.mark.parametrize(("notebook", "complaint"), DIRTY.values(), ids=DIRTY)
def test_a_dirty_notebook_is_found(notebook, complaint):
    found = problems(notebook)
    assert len(found) == 1 and found[0].startswith((complaint, "text on " + complaint)), found


def test_a_large_notebook_is_found():
    assert problems(example(), size=1_000_000) == ["1000000 bytes"]
