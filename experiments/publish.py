"""Publish what was trained: python -m normcourse report --publish

Records and weights go into normcourse/results, the pictures of the executed notebooks into images/,
and sentences and tables into README.md and docs/, each between the two marks of its name. A picture
is what a cell tagged ``image-NAME`` shows, so it is drawn in one place; execute the notebooks first
where records have changed: jupyter nbconvert --execute --inplace notebooks/*.ipynb

The repository's address (site/launch.py) is written into README and the notebooks, too.
"""

import base64
import json
import math
import re
import runpy
import statistics
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from normcourse import CourseError, results
from normcourse.engine.record import RECORDS, read_record, write_file
from normcourse.norm import NORMS
from normcourse.results import Record
from normcourse.train import MAX_EPOCHS

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = SimpleNamespace(**runpy.run_path(str(ROOT / "site" / "launch.py")))
START = "<!-- {}: written by `python -m normcourse report --publish` -->"
END = "<!-- end of {} -->"
IMAGE = re.compile(r"!\[([^]]*)\](\([./]*images/([^)]+)\))")  # description, address, file's name
RESULTS = ("norm", "test accuracy (%)", "train accuracy (%)", "seeds")  # columns that fit a page
MORE = ("norm", "parameters", "lr", "flip-averaged (%)", "seconds")
# The designs, and what their authors report: test accuracy (%) after the last epoch, one run.
DESIGNS = {"BN, m = 1": "72.39", "LN, m = 1": "", "LN, m = 2": "75.84"}
DESIGNS |= {"GN, m = 1": "", "GN, m = 2": "71.71"}


def publish(runs: str | Path, root: Path = ROOT) -> str:
    """Publish every final CIFAR-10 run below ``runs`` and what the notebooks show.

    Returns what was done. Raises CourseError outside a checkout, or if there is no such run.
    """
    readme = root / "README.md"
    text = readme.read_bytes().decode(errors="replace") if readme.exists() else ""
    if START.format("results") not in text or END.format("results") not in text:
        raise CourseError(f"{root} is not a checkout with marks in README; publish from a checkout")
    copy_runs(find_publishable(runs), root / "normcourse" / "results")
    records = find_publishable(root / "normcourse" / "results")  # those published before stay
    for path in (root / "notebooks").glob("*.ipynb"):
        text = LAUNCH.address_notebook(path.read_text("utf-8"), path.name, LAUNCH.address())
        write_bytes(path, text.encode())
    pictures = take_pictures(root / "notebooks", root / "images")
    written = parts(list(records.values()))
    written["designs"] = designs(results.experiment("published_designs"))
    for page in (readme, *(root / "docs").glob("*.md")):
        write_page(page, written, pictures)
    return f"published {len(records)} records, {len(pictures)} pictures, and README's results"


# --- records --------------------------------------------------------------------------------------


def find_publishable(runs: str | Path) -> dict[Path, Record]:
    """The final runs below a folder: CIFAR-10, all training images, at most 20 epochs."""
    found = {path: read_record(path) for path in sorted(Path(runs).rglob(RECORDS))}
    records = {path: record for path, record in found.items() if is_final(record)}
    if not records:
        final = f"final CIFAR-10 run (trained on all images, 1 to {MAX_EPOCHS} epochs)"
        raise CourseError(f"{runs} holds no {final}; only those are published")
    return dict(sorted(records.items(), key=lambda item: results.table_order(item[1])))


def is_final(record: Record) -> bool:
    """Whether a run keeps the rules of the assignment."""
    settings = record["settings"]
    whole = record["data"] == "CIFAR-10" and record["images"] == [50_000, 10_000]
    return whole and not settings["validate"] and settings["epochs"] <= MAX_EPOCHS


def copy_runs(records: dict[Path, Record], folder: Path) -> None:
    """Copy every record, and of each network the weights of one seed."""
    for runs in results.groups(list(records.values())):
        paths = [path for path, record in records.items() if record in runs]
        weights = [path.with_suffix(".pt") for path in paths if path.with_suffix(".pt").exists()]
        for path in [*paths, *weights[:1]]:
            write_bytes(folder / path.name, path.read_bytes())


# --- notebooks ------------------------------------------------------------------------------------


def take_pictures(notebooks: Path, images: Path) -> dict[str, str]:
    """Write the pictures of the notebooks' tagged cells, and remove all others.

    Returns the description of each by its file's name.
    """
    kept = {}
    for path in sorted(notebooks.glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for tag in cell["metadata"].get("tags", []):
                if tag.startswith("image-"):
                    file, alt = take_picture(cell, images / tag.removeprefix("image-"))
                    kept[file] = alt
    for old in images.iterdir():
        if old.name not in kept:
            old.unlink()
    return kept


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


# --- README and docs ------------------------------------------------------------------------------


def write_page(page: Path, written: dict[str, str], pictures: dict[str, str]) -> None:
    """Put each part between the two marks of its name, and its description on each picture."""
    text = page.read_bytes().decode(errors="surrogateescape")  # what is not UTF-8 stays as it is
    ends = "\r\n" if "\r\n" in text else "\n"
    for name, part in written.items():
        before, start, rest = text.partition(START.format(name))
        _, end, after = rest.rpartition(END.format(name))
        if end:
            inside = f"\n{part}\n".replace("\n", ends)
            text = f"{before}{start}{inside}{end}{after}"
    text = IMAGE.sub(lambda found: f"![{pictures.get(found[3], found[1])}]{found[2]}", text)
    write_bytes(page, text.encode(errors="surrogateescape"))


def parts(records: list[Record]) -> dict[str, str]:
    """What stands between the marks of each name, as far as there are records for it."""
    ours = [record for record in records if record["settings"]["net"] == "normnet"]
    found = {"launch": LAUNCH.for_readme(LAUNCH.address())}
    if ours:
        found["results"] = what_varies(ours, RESULTS)
        more = results.table(ours, MORE)
        found["normnet"] = f"{found['results']}\n\n{more}\n\n{results.provenance(ours)}"
    if {"bn", "ln", "gn", "none"} <= {record["settings"]["norm"] for record in ours}:
        found["summary"] = summary(ours)
    return found


def what_varies(records: list[Record], columns: Sequence[str]) -> str:
    """A table of some columns, below a line of what is the same in all rows."""
    rows = [results.row(runs) for runs in results.groups(records)]
    same = [name for name in rows[0] if all(cells[name] == rows[0][name] for cells in rows[1:])]
    above = ", ".join(f"{name} {rows[0][name]}" for name in same if name not in columns)
    return f"In all rows: {above}.\n\n{results.table(records, columns)}"


def designs(records: list[Record]) -> str:
    """A row for each published design: as its authors report it, and as trained here."""
    lines = ["| design | parameters | reported | published recipe, here | the course's recipe |"]
    lines.append("|---|--:|--:|--:|--:|")
    for name, reported in DESIGNS.items():
        runs = [record for record in records if record["arm"].startswith(name)]
        design = results.label(runs[0]["settings"]).partition(" (")[0]  # without its recipe
        cells = [design, f"{runs[0]['parameters']:,}", reported]
        for recipe in ("as published", "the course's recipe"):
            found = results.by_seed(runs, f"{name}, {recipe}", "test_accuracy")
            cells.append(results.mean_std(list(found.values())))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", results.provenance(records)])


def reached(records: list[Record]) -> dict[str, float]:
    """The final test accuracy by norm, its mean over seeds."""
    found = {}
    for runs in results.groups(records):
        values = [run["history"][-1]["test_accuracy"] for run in runs]
        found[runs[0]["settings"]["norm"]] = statistics.mean(values)
    return found


def summary(records: list[Record]) -> str:
    """Two sentences: how far apart the norms end, and what the network reaches without one."""
    last = reached(records)
    three = sorted(("bn", "gn", "ln"), key=lambda norm: -last[norm])
    found = [f"{last[norm]:.1f} %" for norm in three]
    apart = math.ceil(10 * (last[three[0]] - last[three[-1]])) / 10
    return (
        f"The network gets {found[0]} of the test images right with {NORMS[three[0]]}, {found[1]} "
        f"with {NORMS[three[1]]} and {found[2]} with {NORMS[three[2]]}: the three end within "
        f"{apart} points of each other. Without any norm it still reaches {last['none']:.1f} %."
    )
