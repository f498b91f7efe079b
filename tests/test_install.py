"""What a reader installs: the wheel holds library, records and weights, and works elsewhere."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import make_folder

from normcourse.results import RESULTS

ROOT = Path(__file__).resolve().parent.parent
BOUND = re.compile(r"^([a-z][\w-]*)(>=|==)([\d.]+)", re.M)


def bounds(text: str) -> dict[str, str]:
    return {name: version for name, _, version in BOUND.findall(text)}


def pip(*words, **options):
    """Run pip; what it says is shown where it fails."""
    start = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    command = [*start, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: nothing is left in the checkout, nor used by chance."""
    folder = tmp_path_factory.mktemp("wheel")
    without = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "normcourse", folder / "source" / "normcourse", ignore=without)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip("wheel", "--no-deps", "--wheel-dir", folder, folder / "source")
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_the_library_its_records_weights_and_explorer(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("normcourse/")}
    kept = set()
    for path in (ROOT / "normcourse").rglob("*.*"):
        if path.suffix in (".py", ".json", ".pt", ".mjs"):
            kept.add(path.relative_to(ROOT).as_posix())
    assert held == kept
    assert "normcourse/engine/fit.py" in kept and any(name.endswith(".pt") for name in kept)


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """The folder that the wheel is installed in."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


def call(command, site, folder):
    """Run a command with the installed package, not the checkout, in another folder; its output."""
    environment = os.environ | {"PYTHONPATH": str(site)}
    look = {"capture_output": True, "text": True}
    done = subprocess.run(command, cwd=folder, env=environment, **look)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_installed_command_runs_from_another_folder(site, tmp_path):
    places = [path for path in site.rglob("normcourse*") if path.parent.name in ("bin", "Scripts")]
    (command,) = places
    make_folder(tmp_path / "insects", count=2)
    words = ["train", "--data", "insects", "--norm", "bn", "--epochs", "1", "--device", "cpu"]
    assert "| NormNet | Batch Norm |" in call([command, *words], site, tmp_path)
    assert list(tmp_path.glob("runs/insects/*.json"))


def test_the_installed_package_trains_and_finds_its_records(site, tmp_path):
    words = ["-m", "normcourse", "train", "--data", "digits", "--epochs", "1"]
    told = call([sys.executable, *words], site, tmp_path)
    for norm in ("Batch Norm", "Layer Norm", "Group Norm, 8 groups"):
        assert f"| NormNet | {norm} (flip False) |" in told
    assert len(list(tmp_path.glob("runs/digits/*.json"))) == 3
    ask = "from normcourse import results; from normcourse.engine import fit; "
    ask += "print(fit.__file__, results.RESULTS, len(results.published_records()))"
    fit, records, count = call([sys.executable, "-c", ask], site, tmp_path).split()
    assert fit == str(site / "normcourse" / "engine" / "fit.py")
    assert records == str(site / "normcourse" / "results")
    assert int(count) == len(list(RESULTS.glob("*.json")))


@pytest.fixture(scope="module")
def editable(wheel, tmp_path_factory):
    """What pip install -e adds to the folder of packages, for a clone in a folder "normcourse"."""
    folder = tmp_path_factory.mktemp("editable")
    (folder / "here").mkdir()
    clone = shutil.copytree(wheel.parent / "source", folder / "here" / "normcourse")
    build = f"from setuptools import build_meta; build_meta.build_editable({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shutil.unpack_archive(next(folder.glob("*.whl")), folder / "packages", "zip")
    return folder


def test_a_clone_named_as_the_package_does_not_hide_it(editable, site):
    """Neither where the clone is installed, nor where another copy is."""
    ask = "import site, sys; site.addsitedir(sys.argv[1]); import importlib.util; "
    ask += "print(importlib.util.find_spec('normcourse').origin)"
    clone = editable / "here" / "normcourse"
    for packages, expected in ((editable / "packages", clone), (site, site)):
        command = [sys.executable, "-S", "-c", ask, packages]  # -S: without what is installed here
        done = subprocess.run(command, cwd=editable / "here", capture_output=True, text=True)
        assert done.stdout.strip() == str(expected / "normcourse" / "__init__.py"), done.stderr


def test_the_command_runs_from_the_folder_that_holds_the_clone(editable, site):
    said = call([sys.executable, "-m", "normcourse", "--help"], site, editable / "here")
    assert said.startswith("usage: python -m normcourse")


def test_the_bounds_are_the_same_wherever_they_stand():
    required = bounds((ROOT / "requirements.txt").read_text())
    assert bounds((ROOT / "constraints-oldest.txt").read_text()) == required
    assert bounds((ROOT / "constraints.txt").read_text()).keys() <= required.keys()
    listed = re.search(
        r"^dependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )[1]
    library = bounds(listed.replace('"', "\n"))
    assert library and library.items() <= required.items()
