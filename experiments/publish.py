"""Publish what was trained: python -m normcourse report --publish

Or python experiments/publish.py [RUNS]. Records and weights go into normcourse/results, the
pictures of the executed notebooks into images/, and the tables into README.md. A picture is what a
cell tagged ``image-NAME`` shows, so it is drawn in one place; execute the notebooks first where
records have changed: jupyter nbconvert --execute --inplace notebooks/*.ipynb

The repository's address stands here, too; publishing writes it into the notebooks' badges and first
cells.
"""

import base64
import json
import sys
from pathlib import Path
from typing import Any

from normcourse import CourseError
from normcourse.engine.record import RECORDS, read_record, write_file
from normcourse.results import Record, groups, provenance, table, table_order
from normcourse.train import MAX_EPOCHS

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "https://github.com/OWNER/normcourse"  # stands here and nowhere else; not public yet
START = "<!-- results: written by `python -m normcourse report --publish` -->"
END = "<!-- end of results -->"
HEADINGS = {
    "normnet": "NormNet, the course's network",
    "reference": "The published reference designs",
}
MISTAKES = ("normnet-bn-mistakes", "normnet-ln-mistakes", "normnet-gn-mistakes")
SHOWN = ("curves-normnet", "per-class-normnet", *MISTAKES)  # below NormNet's table
FIRST_CELL = f"""\
# Finds the course beside this notebook, or in Colab installs it and leaves torch as it is.
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ADDRESS = os.environ.get("NORMCOURSE_REPOSITORY", "git+{REPOSITORY}")
if Path("..", "normcourse", "__init__.py").exists():
    sys.path.insert(0, str(Path("..").resolve()))
elif importlib.util.find_spec("normcourse") is None:
    if "google.colab" in sys.modules or "NORMCOURSE_REPOSITORY" in os.environ:
        packages = ["anywidget", "torchinfo", "scikit-learn", "tqdm", "requests"]
        for what in (["--no-deps", ADDRESS], packages):
            subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *what])
        importlib.invalidate_caches()
    if importlib.util.find_spec("normcourse") is None:
        raise ModuleNotFoundError(f"the course is not here; in a terminal: pip install {{ADDRESS}}")
"""


def publish(runs: str | Path, root: Path = ROOT) -> str:
    """Publish every final CIFAR-10 run below ``runs`` and what the notebooks show.

    Returns what was done. Raises CourseError outside a checkout, or if there is no such run.
    """
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if START not in text or END not in text:
        message = f"{root} is not a checkout with the results markers in its README.md"
        raise CourseError(f"{message}; publish from a checkout")
    records = find_publishable(runs)
    copy_runs(records, root / "normcourse" / "results")
    for path in sorted((root / "notebooks").glob("0?_[!s]*.ipynb")):
        address_notebook(path)
    pictures = take_pictures(root / "notebooks", root / "images")
    before, after = text.split(START)[0], text.split(END)[1]
    section = results_section(list(records.values()), pictures)
    whole = f"{before}{START}\n{section}\n{END}{after}"
    write_bytes(readme, whole.encode())
    counts = f"{len(records)} records, {len(pictures)} pictures"
    return f"published {counts} and the README's results section"


# --- records --------------------------------------------------------------------------------------


def find_publishable(runs: str | Path) -> dict[Path, Record]:
    """The final runs below a folder: CIFAR-10, all training images, at most 20 epochs."""
    found = {path: read_record(path) for path in sorted(Path(runs).rglob(RECORDS))}
    records = {path: record for path, record in found.items() if is_final(record)}
    if not records:
        final = f"final CIFAR-10 run (trained on all images, 1 to {MAX_EPOCHS} epochs)"
        raise CourseError(f"{runs} holds no {final}; only those are published")
    return dict(sorted(records.items(), key=lambda item: table_order(item[1])))


def is_final(record: Record) -> bool:
    """Whether a run keeps the rules of the assignment."""
    settings = record["settings"]
    whole = record["data"] == "CIFAR-10" and record["images"] == [50_000, 10_000]
    return whole and not settings["validate"] and settings["epochs"] <= MAX_EPOCHS


def copy_runs(records: dict[Path, Record], folder: Path) -> None:
    """Copy every record, and of each network the weights of one seed."""
    for runs in groups(list(records.values())):
        paths = [path for path, record in records.items() if record in runs]
        weights = [path.with_suffix(".pt") for path in paths if path.with_suffix(".pt").exists()]
        for path in [*paths, *weights[:1]]:
            write_bytes(folder / path.name, path.read_bytes())


# --- notebooks ------------------------------------------------------------------------------------


def take_pictures(notebooks: Path, images: Path) -> dict[str, str]:
    """Write the pictures of the notebooks' tagged cells, and remove all others.

    Returns the Markdown of each by its name.
    """
    markdown = {}
    kept = set()
    for path in sorted(notebooks.glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for tag in cell["metadata"].get("tags", []):
                if tag.startswith("image-"):
                    name = tag.removeprefix("image-")
                    file, alt = take_picture(cell, images / name)
                    kept.add(file)
                    markdown[name] = f"![{alt}](images/{file})"
    for old in images.iterdir():
        if old.name not in kept:
            old.unlink()
    return markdown


def take_picture(cell: dict[str, Any], path: Path) -> tuple[str, str]:
    """Write the picture that a cell shows; returns its file's name and its description.

    Raises CourseError if the cell shows none.
    """
    for output in cell.get("outputs", []):
        for kind, suffix in (("image/png", ".png"), ("image/jpeg", ".jpg")):
            code = output.get("data", {}).get(kind)
            alt = output.get("metadata", {}).get(kind, {}).get("alt")
            if code and alt:
                file = path.with_name(path.name + suffix)
                write_bytes(file, base64.b64decode("".join(code)))
                return file.name, alt
    message = f"the cell tagged image-{path.name} shows no picture with a description"
    raise CourseError(f"{message}; execute its notebook")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    write_file(path, lambda file: file.write(content))


def badge(notebook: str) -> str:
    """The Markdown of the button that opens a notebook of the repository in Colab."""
    address = REPOSITORY.replace("https://github.com", "https://colab.research.google.com/github")
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    return f"[![Open in Colab]({image})]({address}/blob/main/notebooks/{notebook})"


def address_notebook(path: Path) -> None:
    """Write the badge and the first cell of REPOSITORY into a notebook that already has both."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    title, first = notebook["cells"][:2]
    for k, line in enumerate(title["source"]):
        if "colab-badge" in line:
            title["source"][k] = f"{badge(path.name)}\n"
    first["source"] = FIRST_CELL.strip().splitlines(keepends=True)
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode())


# --- README ---------------------------------------------------------------------------------------


def results_section(records: list[Record], pictures: dict[str, str]) -> str:
    """A table for each family of networks, where its figures come from, and NormNet's pictures."""
    parts = []
    for net, heading in HEADINGS.items():
        chosen = [record for record in records if record["settings"]["net"] == net]
        if chosen:
            parts += [f"### {heading}", table(chosen), provenance(chosen)]
        if net == "normnet":
            parts += [pictures[name] for name in SHOWN if name in pictures]
    return "\n\n".join(parts)


if __name__ == "__main__":
    try:
        print(publish(sys.argv[1] if len(sys.argv) > 1 else ROOT / "normcourse" / "results"))
    except CourseError as error:
        raise SystemExit(f"error: {error}") from error
