"""The report: records turned into the results table and the pictures, beside the runs or published in the README."""

import hashlib
import os
import re
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from normcourse import plot
from normcourse.data import CourseError, Data, find_cifar10, load_data, split_validation, write_file
from normcourse.model import MAX_PARAMETERS
from normcourse.train import MAX_EPOCHS, Record, changed_settings, read_record

RESULTS = Path(__file__).with_name("results")  # the published records, inside the package
MAIN = ("bn", "ln", "gn")  # the norms of the assignment; the others have rows in the tables, but no pictures on the page
NETS = {"normnet": "NormNet", "reference": "Reference"}
START, END = "<!-- results: written by `python -m normcourse report --publish` -->", "<!-- end of results -->"


def data_folder(runs: str | Path, name: str) -> Path:
    """The folder of a data set's runs: records of different data never mix."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if slug != name.lower():  # two names may have the same letters left
        slug += "-" + hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:6]
    return Path(runs) / slug


def find_records(folder: str | Path) -> dict[Path, Record]:
    """All records below a folder, in the table's order. Raises CourseError if one is cut short."""
    paths = sorted(Path(folder).rglob("*-seed*-????????.json"))  # the names that run_name makes
    records = {path: read_record(path) for path in paths}
    return dict(sorted(records.items(), key=lambda item: _order(item[1])))


def read_records(folder: str | Path) -> dict[Path, Record]:
    """All records below a folder, in the table's order. Raises CourseError if one is cut short or there are none."""
    records = find_records(folder)
    if not records:
        raise CourseError(f"no records in {folder}; train first: python -m normcourse train --runs {folder}")
    return records


def _order(record: Record) -> tuple[Any, ...]:
    settings = record["settings"]
    network = (settings["net"], list(plot.NORMS).index(settings["norm"]), record["parameters"])
    return (record["data"], record["copy"], *network, settings["seed"], record["command"])


def groups(records: list[Record]) -> list[list[Record]]:
    """Runs that differ in nothing but the seed, together."""
    grouped: dict[str, list[Record]] = {}
    for record in records:
        settings = {k: v for k, v in record["settings"].items() if k != "seed"}
        grouped.setdefault(f"{record['data']} {record['copy']} {sorted(settings.items())}", []).append(record)
    return list(grouped.values())


def table(records: list[Record]) -> str:
    """The results as a Markdown table, a row for each network: mean and standard deviation over its seeds."""
    columns = "network, norm, parameters, epochs, lr, seeds, train accuracy (%), test accuracy (%), flip-averaged (%), seconds"
    lines = [f"| {columns.replace(', ', ' | ')} |", "|---|---|" + 8 * "--:|"]
    for group in groups(records):
        settings, parameters, last = group[0]["settings"], group[0]["parameters"], [r["history"][-1] for r in group]
        over = " (over the limit)" if parameters >= MAX_PARAMETERS else ""
        held_out, note = ("val", " (validation)") if settings["validate"] else ("test", "")
        row = [NETS[settings["net"]], plot.label(settings), f"{parameters:,}{over}", f"{settings['epochs']}"]
        row += [f"{settings['lr']:g}", f"{len(group)}", mean_std([epoch["train_accuracy"] for epoch in last])]
        row += [mean_std([epoch[f"{held_out}_accuracy"] for epoch in last]) + note]
        row += [mean_std([r["flip_accuracy"] for r in group]), f"{statistics.mean(r['seconds'] for r in group):,.0f}"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def mean_std(values: list[float]) -> str:
    """Mean ± standard deviation over seeds; one seed has no deviation."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def gap(a: list[float], b: list[float]) -> str:
    """By how many points the runs a are above the runs b; *clear* if by more than both standard deviations together.

    A rule of thumb, not a test. One seed has no deviation, so nothing is clear then.
    """
    points = statistics.mean(a) - statistics.mean(b)
    if min(len(a), len(b)) < 2:
        return f"{points:+.1f} points, one seed: not known to be clear"
    clear = abs(points) > statistics.stdev(a) + statistics.stdev(b)
    return f"{points:+.1f} points, {'clear' if clear else 'not clear'}"


def provenance(records: list[Record]) -> str:
    """Where the figures come from: data copy, hardware, threads, precision, versions."""
    data = {f"{r['data']} ({r['copy']}; {r['images'][0]:,} training, {r['images'][1]:,} test images)" for r in records}
    hardware = {f"{r['device']}, {r['threads']} thread(s), {r['precision']}" for r in records}
    versions = {", ".join(f"{k} {v}" for k, v in r["versions"].items()) + f" on {r['system']}" for r in records}
    lines = {"Data": data, "Hardware": hardware, "Versions": versions}
    return "\n".join(f"- {name}: {'; '.join(sorted(values))}" for name, values in lines.items())


def write_report(folder: Path, data: Data | None = None) -> str:
    """Write the table (report.md) and the pictures of one data set's runs into their folder; returns the text."""
    records = {path: record for path, record in read_records(folder).items() if path.parent == Path(folder)}
    text = f"{table(list(records.values()))}\n\n{provenance(list(records.values()))}\n"
    _pictures(records, folder, data)
    write_file(folder / "report.md", lambda file: file.write(text.encode()))
    return text


def _pictures(records: dict[Path, Record], folder: Path, data: Data | None, short: bool = False) -> list[str]:
    """Draw every picture the records allow (the mistakes only with the images they were made on); returns their names."""
    names: list[str] = []
    for net in NETS:
        chosen = {p: r for p, r in records.items() if r["settings"]["net"] == net}
        copies = sorted({r["copy"] for r in chosen.values()})
        for copy in copies:
            shown = _typical([r for r in chosen.values() if r["copy"] == copy])
            suffix = f"-{net}" + (f"-{copy.split()[-1]}" if len(copies) > 1 else "")
            title = f"{shown[0]['data']}, {NETS[net]}"
            names.append(plot.save(plot.curves(shown, title), folder / f"curves{suffix}.png"))
            bars = plot.per_class(shown, f"{title}: accuracy by class")
            names.append(plot.save(bars, folder / f"per-class{suffix}.png"))
        if short:  # published: NormNet's, one of each norm
            chosen = {p: r for p, r in chosen.items() if net == "normnet" and r in shown}
        for path, record in chosen.items():
            stem = path.stem.split("-seed")[0] if short else path.stem
            title = f"{NETS[net]}, {plot.label(record['settings'])} on {record['data']}"
            names.append(plot.save(plot.confusion(record, title), folder / f"{stem}-confusion.png"))
            if data is not None and (data.name, data.copy) == (record["data"], record["copy"]):
                held_out = split_validation(data) if record["settings"]["validate"] else data
                mistakes = plot.misclassified(record["mistakes"], held_out, title)
                names.append(plot.save(mistakes, folder / f"{stem}-mistakes.png"))
    return names


def _typical(records: list[Record]) -> list[Record]:
    """One run for each network and norm, in the table's order: without L1 if there is one, and nearest to its recipe."""
    chosen: dict[tuple[Any, ...], Record] = {}
    for record in sorted(records, key=lambda r: (r["settings"]["l1"] > 0, len(changed_settings(r["settings"])))):
        chosen.setdefault(tuple(record["settings"][k] for k in ("norm", "num_groups", "multiplier")), record)
    return sorted(chosen.values(), key=_order)


def report(runs: str | Path, source: str | None = None) -> str:
    """Report every data set below ``runs``; pictures of mistakes need its images at hand and download nothing."""
    folders = {path.parent: record["data"] for path, record in read_records(runs).items()}
    return "\n\n".join(
        f"## {name}\n\n{write_report(folder, _images(name, source))}\nPictures: {folder}"
        for folder, name in sorted(folders.items())
    )


def _images(name: str, source: str | None) -> Data | None:
    """The images of a data set, if they can be had without a download."""
    source = source or os.environ.get("NORMCOURSE_DATA")
    if source not in (None, "auto", "cifar10"):
        return load_data(source)
    if name == "digits":
        return load_data("digits")
    found = find_cifar10() if name == "CIFAR-10" else None
    return load_data(found) if found else None


def publish(runs: str | Path, source: str | None = None, root: Path | None = None) -> str:
    """Write the published records, weights, pictures and the README's results section. Takes CIFAR-10 only.

    Raises CourseError outside a checkout, for other data, or if no complete run is there.
    """
    root = root or Path(__file__).resolve().parent.parent
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if START not in text or END not in text:
        raise CourseError(f"{root} is not a checkout with the results markers in its README.md; run this from a checkout")
    records = {path: record for path, record in read_records(runs).items() if _publishable(record)}
    if not records:
        final = f"final CIFAR-10 run (trained on all images, 1 to {MAX_EPOCHS} epochs)"
        raise CourseError(f"{runs} holds no {final}; only those are published")
    data, lowest = _images("CIFAR-10", source), {}
    for group in groups(list(records.values())):
        paths = [path for path, record in records.items() if record in group]
        weights = [path.with_suffix(".pt") for path in paths if path.with_suffix(".pt").exists()]
        for path in paths + weights[:1]:  # the weights of one seed per network
            write_file(root / "normcourse" / "results" / path.name, partial(_copy, path))
        if group[0]["settings"]["norm"] in MAIN:
            lowest[paths[0]] = group[0]  # the lowest seed of each network
    names = _pictures(lowest, root / "images", data, short=True)
    _lessons(root / "images")
    body = f"{START}\n{_readme(list(records.values()), names)}\n{END}"
    text = text.split(START)[0] + body + text.split(END)[1]
    write_file(readme, lambda file: file.write(text.encode()))
    return f"published {len(records)} records, {len(names)} pictures and the README's results section"


def _copy(path: Path, file: Any) -> None:
    file.write(path.read_bytes())


def _lessons(folder: Path) -> None:
    """The README's pictures of the lessons: the cube, and the figure of each miniature."""
    from normcourse import cube, miniatures

    cube.save_figures(folder)
    for name, draw in miniatures.DRAW.items():
        plot.save(draw(miniatures.miniature(name)), folder / f"miniature-{name}.png")


def _publishable(record: Record) -> bool:
    settings = record["settings"]
    cifar10 = record["data"] == "CIFAR-10" and record["images"] == [50_000, 10_000]
    return cifar10 and not settings["validate"] and settings["epochs"] <= MAX_EPOCHS


def _readme(records: list[Record], pictures: list[str]) -> str:
    """The README's results section: a table and the pictures for each family of networks, and where they come from."""
    parts = []
    headings = {"normnet": "NormNet, the course's network", "reference": "The published reference designs"}
    for net, heading in headings.items():
        chosen = [r for r in records if r["settings"]["net"] == net]
        if chosen:
            parts += [f"### {heading}", table(chosen), provenance(chosen)]
            parts += [f"![{_alt(n)}](images/{n})" for n in pictures if net in n and "confusion" not in n]
    return "\n\n".join(parts)


def _alt(name: str) -> str:
    kinds = {"curves": "Accuracy and loss by epoch", "per-class": "Accuracy by class", "mistakes": "Ten mistakes"}
    words = next(words for kind, words in kinds.items() if kind in name)
    known = NETS | plot.NORMS
    return f"{words}: {', '.join(known[part] for part in name.removesuffix('.png').split('-') if part in known)}"
