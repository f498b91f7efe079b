"""The first cell of a notebook finds the course or installs it, and carries the address."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import script

from normcourse import __version__

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0[0-3]_[!s]*.ipynb"))


def opening(path):
    """Title and first cell of a notebook."""
    title, first = json.loads(path.read_text(encoding="utf-8"))["cells"][:2]
    return "".join(title["source"]), "".join(first["source"])


FIRST_CELL = opening(NOTEBOOKS[0])[1]
LAUNCH = script("publish").LAUNCH
ADDRESS = "https://github.com/somebody/course"


@pytest.fixture
def run_first_cell(monkeypatch):
    """A function that runs the first cell in a folder, and returns the arguments of every pip call.

    Nothing is installed: the course is there from the start, or once pip was called twice.
    """

    def run(folder, installed=False, colab=False, published=False):
        calls = []
        text = json.dumps(FIRST_CELL)
        cell = json.loads(LAUNCH.address_notebook(text, "", ADDRESS if published else ""))

        def find_spec(name):
            there = installed or len(calls) == 2
            return SimpleNamespace(origin="there" if there else None)  # or a mere folder

        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(subprocess, "run", lambda command: calls.append(command[4:]))
        monkeypatch.setattr(importlib.util, "find_spec", find_spec)
        if colab:
            monkeypatch.setitem(sys.modules, "google.colab", sys)
        exec(compile(cell, "first cell", "exec"), {})
        return calls

    return run


def test_first_cell_finds_a_clone_below_the_working_folder(run_first_cell, tmp_path):
    (tmp_path / "normcourse" / "normcourse").mkdir(parents=True)
    (tmp_path / "normcourse" / "normcourse" / "__init__.py").touch()
    assert run_first_cell(tmp_path) == [] and sys.path[0] == str(tmp_path / "normcourse")


def test_first_cell_finds_the_checkout(run_first_cell, tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "normcourse").mkdir()
    (tmp_path / "normcourse" / "__init__.py").touch()
    assert run_first_cell(tmp_path / "notebooks") == []
    assert sys.path[0] == str(tmp_path.resolve())


def test_first_cell_installs_in_colab_without_touching_torch(run_first_cell, monkeypatch, tmp_path):
    monkeypatch.delenv("NORMCOURSE_REPOSITORY", raising=False)
    course, rest = run_first_cell(tmp_path, colab=True, published=True)
    assert course == ["--quiet", "--no-deps", f"git+{ADDRESS}@v{__version__}"]
    assert not {"torch", "torchvision"} & set(rest)
    assert run_first_cell(tmp_path, installed=True, colab=True) == []


def test_first_cell_takes_another_address(run_first_cell, monkeypatch, tmp_path):
    monkeypatch.setenv("NORMCOURSE_REPOSITORY", "git+file:///somewhere")
    assert run_first_cell(tmp_path)[0][-1] == "git+file:///somewhere"


@pytest.mark.parametrize(
    ("published", "words"),
    [(True, f"pip install git\\+{ADDRESS}"), (False, "a copy of its folder")],
)
def test_first_cell_says_what_to_do(run_first_cell, monkeypatch, tmp_path, published, words):
    monkeypatch.delenv("NORMCOURSE_REPOSITORY", raising=False)
    with pytest.raises(ModuleNotFoundError, match=words):
        run_first_cell(tmp_path, published=published, colab=not published)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_carry_the_address(path):
    title, first = opening(path)
    assert first == FIRST_CELL and len(LAUNCH.BADGE.findall(title)) == 1
    text = path.read_text(encoding="utf-8")
    assert LAUNCH.address_notebook(text, path.name, LAUNCH.address()) == text
    other = LAUNCH.address_notebook(text, path.name, ADDRESS)
    assert f"/github/somebody/course/blob/main/notebooks/{path.name})" in other
    assert other.count(f"git+{ADDRESS}@v{__version__}") == 1
    assert LAUNCH.address_notebook(other, path.name, LAUNCH.address()) == text
