"""Write the tables into benchmarks/README.md and draw its figures: python benchmarks/report.py

Each block of the README between <!-- NAME --> and <!-- end of NAME --> comes from the JSON files
in results/.
"""

import json
from itertools import accumulate
from math import inf
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from normcourse import plot
from normcourse.engine.record import write_file
from normcourse.engine.report import save
from normcourse.norm import NORMS

HERE = Path(__file__).resolve().parent
LEVELS = (70, 80)  # test accuracy in percent
AXES = {"images": "training images", "batch_size": "batch size", "threads": "threads"}
NAMES = {"ms": "ms a step", "plain_0": "plain, 0 workers", "plain_2": "plain, 2 workers"}
HUES = {"floor": "black", "ours": "#0072B2", "plain_0": "#E69F00", "plain_2": "#D55E00"}
STARTS = ("import_torch_s", "import_normcourse_s", "load_s")
Record = dict[str, Any]


def read_all(folder: Path) -> dict[str, Record]:
    """All results by the name of their file; those of another processor, in other/, end so."""
    found = {}
    for file in sorted(folder.rglob("*.json")):
        name = f"{file.stem}-other" if file.parent.name == "other" else file.stem
        found[name] = json.loads(file.read_text())
    return found


# --- a text for each part ----------------------------------------------------


def section(record: Record) -> str:
    """The table of one result, and where it comes from."""
    text = TEXTS[record["part"]](record["result"], record["size"])
    return f"{text}\n\n<sub>{circumstances(record['circumstances'])}</sub>"


def circumstances(found: Record) -> str:
    """Hardware, threads, versions and data in one line."""
    toy = "TOY SIZE, figures mean nothing; " if found["toy"] else ""
    load = "unknown" if found["load_before"] is None else f"{found['load_before']:.1f}"
    machine = f"{found['device']}, {found['cores']} cores, {found['threads']} thread(s)"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{toy}{machine}, load {load} before; {versions} on {found['system']}; {found['data']}"


def table(names: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; every column but the first holds numbers."""
    lines = [names, ["---"] + ["--:"] * (len(names) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compared(norms: Record, unit: str, *ratios: tuple[str, str]) -> str:
    """The medians of each kind's rounds, and how many times as long one kind takes as another."""
    rows = []
    for norm, found in norms.items():
        rounds = found[unit]
        cells = [f"{median(values):.2f}" for values in rounds.values()]
        for above, below in ratios:
            low, middle, high = quartiles(rounds, above, below)
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        rows.append([NORMS[norm], *cells])
    names = [NAMES.get(name, name) for name in (unit, *rounds)]
    names += [f"{above} / {below}" for above, below in ratios]
    return f"{table(names, rows)}\n\nMedians of {len(rounds[ratios[0][1]])} rounds."


def quartiles(rounds: dict[str, list[float]], above: str, below: str) -> list[float]:
    """Of each round's own ratio: what slows the machine for a while slows both of a pair.

    Where it was measured with and without workers, "plain" is the better one.
    """
    if "plain_0" in rounds:
        rounds = rounds | {"plain": min(rounds["plain_0"], rounds["plain_2"], key=median)}
    pairs = [a / b for a, b in zip(rounds[above], rounds[below], strict=True)]
    return quantiles(pairs, n=4, method="inclusive")


def step(result: Record, size: Record) -> str:
    text = compared(result["norms"], "ms", ("ours", "floor"), ("plain", "ours"))
    path = " / ".join(sorted(set(result["path"].values())))
    return f"{text} A round has {size['steps']} steps. Ours ran in {path}."


def evaluation(result: Record, size: Record) -> str:
    return compared(result["norms"], "seconds", ("plain", "ours"))


def processes(result: Record, size: Record) -> str:
    return compared(result, "ms", ("1 process, 1 thread", "2 processes, 1 thread each"))


def memory(result: Record, size: Record) -> str:
    rows = [["import torch alone", f"{median(result['import_torch_mb']):,.0f}", ""]]
    for norm, peaks in result["peak_mb"].items():
        rows.append([NORMS[norm], f"{peaks['ours']:,.0f}", f"{peaks['plain']:,.0f}"])
    torch_s, course_s, load_s = [f"{median(result[key]):.2f} s" for key in STARTS]
    note = f"To import torch takes {torch_s}, normcourse after it {course_s}"
    text = table(["peak memory in MB", "ours", "plain"], rows)
    return f"{text}\n\n{note}, to load the cached data set {load_s}."


def accuracy(result: Record, size: Record) -> str:
    rows = []
    for lane in result["lanes"]:
        reached = [seconds_to(level, lane["history"]) for level in LEVELS]
        cells = ["never" if s == inf else f"{s:,.0f}" for s in reached]
        highest = max(epoch["test_accuracy"] for epoch in lane["history"])
        name = f"{lane['name']}, cycle of {lane['epochs']}"
        rows.append([name, *cells, str(len(lane["history"])), f"{highest:.2f}"])
    names = [NORMS[result["norm"]], *(f"s to {level} %" for level in LEVELS)]
    text = table([*names, "epochs run", "highest test accuracy (%)"], rows)
    return f"{text}\n\nThe plain loop has {result['workers']} workers."


def seconds_to(level: float, history: list[Record]) -> float:
    """Seconds of training until the end of the first epoch at or above the level; inf if never."""
    seconds = 0.0
    for epoch in history:
        seconds += epoch["seconds"]
        if epoch["test_accuracy"] >= level:
            return seconds
    return inf


def grow(result: Record, size: Record) -> str:
    parts = []
    for axis, name in AXES.items():
        rows = []
        for point in result[axis]:
            batch_size = point["value"] if axis == "batch_size" else size["batch_size"]
            image = microseconds(point)
            times = [f"{image * batch_size / 1000:.1f}", f"{image:,.0f}"]
            rows.append([f"{point['value']:,}", *times, f"{point['peak_mb']:,.0f}"])
        parts.append(table([name, "ms a step", "µs an image", "peak memory in MB"], rows))
    return "\n\n".join(parts)


def microseconds(point: Record) -> float:
    """Of an image."""
    return 1e6 * median(point["all_seconds"]) / point["images"]


def gpu(result: Record, size: Record) -> str:
    rows = []
    for norm, found in result["whole"].items():
        last, reached = found["history"][-1]["test_accuracy"], seconds_to(80, found["history"])
        figures = (found["all_seconds"], reached, last, found["peak_mb"])
        rows.append([NORMS[norm], *(f"{figure:,.1f}" for figure in figures)])
    names = [f"{size['gpu_epochs']} epochs", "s in all", "s to 80 %", "test accuracy", "peak MB"]
    first = ", ".join(f"{way} {took:.1f} s" for way, took in result["set_up"]["bn"].items())
    steps = compared(result["norms"], "ms", ("ours", "bf16"))
    return f"{steps} The first step, Batch Norm: {first}.\n\n{table(names, rows)}"


# --- figures -----------------------------------------------------------------


def draw_step(result: Record) -> Any:
    """Time of a training step: floor, ours and plain."""
    with plot.panels() as (figure, axis):
        for i, (kind, hue) in enumerate(HUES.items()):
            rounds = [found["ms"][kind] for found in result["norms"].values()]
            places = [k + 0.2 * i for k in range(len(rounds))]
            name = NAMES.get(kind, kind)
            axis.bar(places, [median(ms) for ms in rounds], 0.19, color=hue, label=name)
            axis.plot(places, rounds, "o", ms=4, mfc="white", mec="black")
        middles = [place - 0.3 for place in places]
        axis.set_xticks(middles, [NORMS[norm] for norm in result["norms"]])
        axis.set(ylabel="ms a training step", title="A training step (bars: medians, dots: rounds)")
    return figure


def draw_accuracy(result: Record) -> Any:
    """Test accuracy against seconds of training."""
    with plot.panels() as (figure, axis):
        for lane in result["lanes"]:
            seconds = list(accumulate(epoch["seconds"] for epoch in lane["history"]))
            accuracies = [epoch["test_accuracy"] for epoch in lane["history"]]
            line = "o-" if lane["epochs"] == result["lanes"][-1]["epochs"] else "o--"
            hue = HUES["ours"] if lane["name"] == "ours" else HUES["plain_2"]
            name = f"{lane['name']}, cycle of {lane['epochs']}"
            axis.plot(seconds, accuracies, line, ms=5, color=hue, label=name)
        title = f"Time to accuracy, {NORMS[result['norm']]} (a mark for each epoch)"
        axis.set(xlabel="seconds of training", ylabel="test accuracy (%)", title=title)
    return figure


# --- the page ----------------------------------------------------------------

TEXTS: dict[str, Any] = {  # in the order of the page
    "step": step,
    "evaluate": evaluation,
    "memory": memory,
    "accuracy": accuracy,
    "grow": grow,
    "processes": processes,
    "gpu": gpu,
}
FIGURES = {"step": draw_step, "accuracy": draw_accuracy}


def blocks(records: dict[str, Record]) -> dict[str, str]:
    """The text of each block of the page."""
    texts = {block: "" for block in (*TEXTS, "other")}
    order = list(TEXTS)
    for name, record in sorted(records.items(), key=lambda item: order.index(item[1]["part"])):
        part = record["part"]
        block = "other" if name.endswith("-other") else part
        draw = FIGURES.get(part)  # what it says of itself describes the picture
        picture = f"\n\n![{draw.__doc__}](images/{name}.png)" if draw else ""
        texts[block] += f"\n\n{section(record)}{picture}"
    return {block: text.strip() or "Not measured." for block, text in texts.items()}


def page(text: str, records: dict[str, Record]) -> str:
    """The page with every block as the results say. Raises ValueError unless it has each once."""
    for block, body in blocks(records).items():
        start, end = f"<!-- {block} -->", f"<!-- end of {block} -->"
        before, rest = text.split(start)
        _, after = rest.split(end)
        text = f"{before}{start}\n{body}\n{end}{after}"
    return text


def write(folder: Path = HERE) -> None:
    """Write the page and the figures of a folder that has README.md and results/."""
    records, readme = read_all(folder / "results"), folder / "README.md"
    text = page(readme.read_text(encoding="utf-8"), records)
    for name, record in records.items():
        if record["part"] in FIGURES:
            figure = FIGURES[record["part"]](record["result"])
            save(figure, folder / "images" / f"{name}.png")
    write_file(readme, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    write()
    print(f"written: {HERE / 'README.md'}")
