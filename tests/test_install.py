"""What a reader installs: the built wheel holds the library, its records and weights, and its command works elsewhere."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import make_folder

from normcourse.report import RESULTS

ROOT = Path(__file__).resolve().parent.parent
BOUND = re.compile(r"^([a-z][\w-]*)(>=|==)([\d.]+)", re.M)


def bounds(text: str) -> dict[str, str]:
    return {name: version for name, _, version in BOUND.findall(text)}


def pip(*words, **options):
    """Run pip; what it says is shown where it fails."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: nothing is left in the checkout, and nothing of it is used by chance."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "normcourse", folder / "source" / "normcourse", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip("wheel", "--no-deps", "--wheel-dir", folder, folder / "source")
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_the_library_its_records_and_weights(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("normcourse/")}
    modules = {f"normcourse/{path.name}" for path in (ROOT / "normcourse").glob("*.py")}
    kept = {
        f"normcourse/results/{path.relative_to(RESULTS).as_posix()}"
        for path in RESULTS.rglob("*.*")
        if path.suffix in (".json", ".pt")
    }
    assert held == modules | kept and any(name.endswith(".pt") for name in kept)


def test_the_installed_command_runs_from_another_folder(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip("install", "--no-deps", "--no-index", "--target", site, wheel)
    (command,) = [path for path in site.rglob("normcourse*") if path.parent.name in ("bin", "Scripts")]
    make_folder(elsewhere / "insects", count=2)
    words = ["train", "--data", "insects", "--norm", "bn", "--epochs", "1", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run([command, *words], cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "| NormNet | Batch Norm |" in done.stdout, done.stderr
    assert list(elsewhere.glob("runs/insects/*.json"))
    ask = "from normcourse.report import RESULTS, read_records; print(RESULTS, len(read_records(RESULTS)))"
    told = subprocess.run([sys.executable, "-c", ask], cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert told.stdout.split() == [str(site / "normcourse" / "results"), str(len(list(RESULTS.glob("*.json"))))], told


def test_the_bounds_are_the_same_wherever_they_stand():
    required = bounds((ROOT / "requirements.txt").read_text())
    assert bounds((ROOT / "constraints-oldest.txt").read_text()) == required
    assert bounds((ROOT / "constraints.txt").read_text()).keys() <= required.keys()
    listed = re.search(r"^dependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[1]
    library = bounds(listed.replace('"', "\n"))
    assert library and library.items() <= required.items()
