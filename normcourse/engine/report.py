"""The report: records turned into the results table and the pictures, beside the runs."""

import os
from pathlib import Path
from typing import Any

from normcourse import plot
from normcourse.data import Data, load_data, split_validation
from normcourse.engine.record import RECORDS, find_records, write_file
from normcourse.engine.sources import find_cifar10
from normcourse.errors import CourseError
from normcourse.results import NETS, Record, groups, label, plain, provenance, table


def report(runs: str | Path, data: str | None = None) -> str:
    """Report every folder of runs below ``runs``.

    Pictures of mistakes need the images at hand; nothing is downloaded for them. Raises CourseError
    if a record is cut short or there are none.
    """
    folders = sorted({path.parent for path in Path(runs).expanduser().rglob(RECORDS)})
    if not folders:
        place = f"{os.path.abspath(runs)!r}{'' if os.path.isdir(runs) else ', which is no folder'}"
        raise CourseError(f"no records in {place}; first: python -m normcourse train --runs {runs}")
    texts = []
    for folder in folders:
        first = next(iter(find_records(folder).values()))
        text = write_report(folder, find_images(first["data"], data))
        texts.append(f"## {plain(first['data'])}\n\n{text}\nPictures: {folder}")
    return "\n\n".join(texts)


def find_images(name: str, source: str | Path | None = None) -> Data | None:
    """The images of a data set, if they can be had without a download."""
    source = source or os.environ.get("NORMCOURSE_DATA") or "auto"
    if source in ("auto", "cifar10"):
        source = {"digits": "digits", "CIFAR-10": find_cifar10()}.get(name)
    return load_data(source) if source else None


def write_report(folder: Path, data: Data | None = None) -> str:
    """Write the table (report.md) and the pictures of the runs of a folder; returns the text."""
    records = find_records(folder)
    families: dict[tuple[str, str], dict[Path, Record]] = {}  # by network and copy of the data
    for path, record in records.items():
        families.setdefault((record["settings"]["net"], record["copy"]), {})[path] = record
    nets = [net for net, _ in families]
    for (net, copy), runs in families.items():
        several = f"-{copy.split()[-1]}" if nets.count(net) > 1 else ""
        draw_pictures(runs, folder, f"{net}{several}.png", data)
    everything = list(records.values())
    text = f"{table(everything)}\n\n{provenance(everything)}\n"
    write_file(folder / "report.md", lambda file: file.write(text.encode()))
    return text


def draw_pictures(runs: dict[Path, Record], folder: Path, name: str, data: Data | None) -> None:
    """Draw one network's runs: curves and accuracy by class, a line for each kind of run.

    Of each run its confusion and, where its images are at hand, its mistakes.
    """
    first_seeds = [same[0] for same in groups(list(runs.values()))]
    title = f"{first_seeds[0]['data']}, {NETS[first_seeds[0]['settings']['net']]}"
    save(plot.curves(first_seeds, title), folder / f"curves-{name}")
    save(plot.per_class(first_seeds, f"{title}: accuracy by class"), folder / f"per-class-{name}")
    for path, record in runs.items():
        settings = record["settings"]
        title = f"{NETS[settings['net']]}, {label(settings)} on {record['data']}"
        save(plot.confusion(record, title), folder / f"{path.stem}-confusion.png")
        if data and (data.name, data.copy) == (record["data"], record["copy"]):
            held_out = split_validation(data) if settings["validate"] else data
            figure = plot.misclassified(record["mistakes"], held_out, title)
            save(figure, folder / f"{path.stem}-mistakes.png")


def save(figure: Any, path: Path) -> None:
    """Write a picture, whole or not at all."""
    from matplotlib import pyplot

    look = {"format": "png", "dpi": 150, "metadata": {"Software": None}}
    write_file(path, lambda file: figure.savefig(file, **look))
    pyplot.close(figure)
