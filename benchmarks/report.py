"""Write the measured tables into benchmarks/README.md and draw its figures: python benchmarks/report.py

Each block of the README between <!-- NAME --> and <!-- end of NAME --> comes from the JSON files in results/.
"""

import json
import re
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

from normcourse import plot
from normcourse.data import write_file
from normcourse.norm import NORMS

HERE = Path(__file__).resolve().parent
BLOCKS = ("targets", "step", "evaluate", "machine", "memory", "accuracy", "grow", "processes", "other", "gpu")
PARTS = (*BLOCKS, "whole")  # in the order of the page
KINDS = {
    "floor": "floor",
    "ours": "ours",
    "plain_0": "plain, 0 workers",
    "plain_2": "plain, 2 workers",
    "plain": "plain",
}
HUES = {"floor": "#000000", "ours": plot.COLORS["bn"], "plain_0": plot.COLORS["ln"], "plain_2": plot.COLORS["gn"],
        "plain": plot.COLORS["gn"]}  # fmt: skip
HATCHES = {"floor": "", "ours": "//", "plain_0": "..", "plain_2": "xx"}
AXES = {"images": "training images", "batch_size": "batch size", "threads": "threads"}
COMPARED = {"the default cycle": True, "each with its faster cycle": False}  # with the longest one only
Record = dict[str, Any]


def read(file: Path) -> Record:
    return json.loads(file.read_text())


def read_all(folder: Path) -> dict[str, Record]:
    """All results by the name of their file, in the order of their names; those of another processor in other/ end so."""
    found = {file.stem: read(file) for file in sorted(folder.glob("*.json"))}
    return found | {f"{file.stem}-other": read(file) for file in sorted(folder.glob("other/*.json"))}


def table(header: str, rows: list[list[str]]) -> str:
    """A Markdown table; every column but the first holds numbers."""
    names = header.split(", ")
    lines = [names, ["---"] + ["--:"] * (len(names) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def times(ratio: Record) -> str:
    return f"{ratio['paired']:.2f} ({ratio['quartiles'][0]:.2f} to {ratio['quartiles'][1]:.2f})"


def circumstances(found: Record) -> str:
    """Hardware, threads, versions and data in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    load = "unknown" if found["load_before"] is None else f"{found['load_before']:.1f}"
    toy = "TOY SIZE, figures mean nothing; " if found["toy"] else ""
    where = f"{found['device']}, {found['cores']} cores, {found['threads']} thread(s), load {load} before"
    return f"{toy}{where}; {versions} on {found['system']}; {found['data']}"


# --- a table for each part ---------------------------------------------------------------------------------------


def section(record: Record) -> str:
    """The tables of one result, and where they come from."""
    tables = {"step": step, "evaluate": evaluation, "machine": machine, "memory": memory, "grow": grow,
              "processes": processes, "accuracy": accuracy, "whole": whole}  # fmt: skip
    return f"{tables[record['part']](record)}\n\n<sub>{circumstances(record['circumstances'])}</sub>"


def step(record: Record) -> str:
    result, size = record["result"], record["size"]
    kinds = list(next(iter(result["norms"].values()))["medians"])
    header = f"ms a step, {', '.join(KINDS[k].replace(',', ' with') for k in kinds)}, ours / floor, plain / ours, plain / floor"
    rows = [
        [NORMS[norm], *(f"{each['medians'][kind]:.1f}" for kind in kinds),
         *(times(each[key]) for key in ("ours_over_floor", "plain_over_ours", "plain_over_floor"))]
        for norm, each in result["norms"].items()
    ]  # fmt: skip
    paths = ", ".join(f"{NORMS[norm]} {path}" for norm, path in result["path"].items())
    wait = ", ".join(f"{seconds:.2f} s with {workers}" for workers, seconds in result["first_batch_s"].items())
    return (
        f"{table(header, rows)}\n\nMedians of {size['rounds']} rounds, {size['steps']} steps of {size['batch_size']} images "
        "each. The ratios are medians of each round's own pair, the middle half of the pairs in brackets; plain is the one "
        f"with the better number of workers. Ours ran in: {paths}. Not in the figures: the wait for the first batch of a "
        f"fresh loader, {wait} workers."
    )


def evaluation(record: Record) -> str:
    result = record["result"]
    rows = [
        [NORMS[norm], f"{e['medians']['ours']:.2f}", f"{e['medians']['plain']:.2f}", times(e["plain_over_ours"])]
        for norm, e in result["norms"].items()
    ]
    note = f"{result['images']:,} images, medians of {record['size']['test_rounds']} rounds."
    return f"{table('seconds, ours, plain, plain / ours', rows)}\n\n{note}"


def machine(record: Record) -> str:
    result = record["result"]
    rows = [
        [NORMS[norm], f"{need['gflop']:.2f}", f"{need['least_ms_fp32']:.1f}", f"{need['least_ms_bf16']:.1f}",
         f"{1000 * need['traffic_gb']:.0f}", f"{need['copy_ms']:.1f}"]
        for norm, need in result["norms"].items()
    ]  # fmt: skip
    header = "a step, GFLOP, least ms in fp32, least ms in bf16, MB to and from convolutions, ms at the rate of the copy"
    rates = ", ".join(f"{value:,.0f} GFLOP/s in {kind}" for kind, value in result["gflops"].items())
    n = result["matrix"]
    return (
        f"{table(header, rows)}\n\nMeasured: a {n} x {n} matrix product runs at {rates}; a large copy at "
        f"{result['copy_gb_s']:.1f} GB/s, read and written. A step has {result['batch_size']} images."
    )


def memory(record: Record) -> str:
    result = record["result"]
    peaks = [
        [NORMS[norm], *("unknown" if peak is None else f"{peak:,.0f}" for peak in each.values())]
        for norm, each in result["peak_mb"].items()
    ]
    alone = result["import_torch_mb"][0] and f"{median(result['import_torch_mb']):,.0f} MB"
    names = {"import_torch_s": "import torch", "import_normcourse_s": "import normcourse, after it",
             "load_s": "loading the cached data set"}  # fmt: skip
    rows = [
        [name, f"{median(result[key]):.2f}", f"{min(result[key]):.2f} to {max(result[key]):.2f}"] for key, name in names.items()
    ]
    return (
        f"{table('peak memory in MB, ours, plain', peaks)}\n\nOf these, `import torch` alone takes {alone or 'unknown'}.\n\n"
        f"{table('seconds, median, range', rows)}\n\n{record['size']['processes']} fresh processes."
    )


def grow(record: Record) -> str:
    result, parts = record["result"], []
    for axis, name in AXES.items():
        rows = []
        for p in result[axis]:
            steps = p["images"] / (p["value"] if axis == "batch_size" else record["size"]["batch_size"])
            memory = "unknown" if p["peak_mb"] is None else f"{p['peak_mb']:,.0f}"
            time = f"{p['seconds']:.2f}" if axis == "images" else f"{1000 * p['seconds'] / steps:.1f}"
            rows.append([f"{p['value']:,}", time, f"{1e6 * p['seconds'] / p['images']:,.0f}", memory])
        unit = "seconds an epoch" if axis == "images" else "ms a step"
        parts.append(table(f"{name}, {unit}, µs an image, peak memory in MB", rows))
    note = f"{NORMS[result['norm']]}, batch {record['size']['batch_size']} where it is not varied; medians of"
    return "\n\n".join([*parts, f"{note} {record['size']['grow_rounds']} rounds."])


def accuracy(record: Record) -> str:
    result, rows = record["result"], []
    levels = list(result["lanes"][0]["seconds_to"])
    for lane in result["lanes"]:
        reached = [f"{s:,.0f}" if (s := lane["seconds_to"][level]) else "never" for level in levels]
        highest = max(epoch["test_accuracy"] for epoch in lane["history"])
        rows.append([lane_name(lane), *reached, str(len(lane["history"])), f"{highest:.2f}"])
    for words, longest in COMPARED.items():
        rows.append([f"plain / ours, {words}", *(ahead(result, level, longest)[0] for level in levels), "", ""])
    header = f"{NORMS[result['norm']]}, {', '.join(f's to {level} %' for level in levels)}, epochs run, highest test accuracy (%)"
    return f"{table(header, rows)}\n\nThe plain loop has {result['workers']} workers."


def lane_name(lane: Record) -> str:
    name = "ours" if lane["name"] == "ours" else "plain, RandAugment"
    return f"{name}, cycle of {lane['epochs']}"


def ahead(result: Record, level: str, longest: bool) -> tuple[str, bool]:
    """The plain loop's seconds over ours as text, and whether it is at least 3, with the longest cycle or the faster one.

    A loop that never got there counts with all the seconds that it had.
    """
    lanes: dict[str, list[Record]] = {"ours": [], "plain": []}
    for lane in sorted(result["lanes"], key=lambda lane: -lane["epochs"]):
        lanes[lane["name"]].append(lane)
    lanes = {name: each[:1] if longest else each for name, each in lanes.items()}
    reached = {name: [s for lane in each if (s := lane["seconds_to"][level])] for name, each in lanes.items()}
    if not reached["ours"]:
        return "ours never", False
    had = max(sum(epoch["seconds"] for epoch in lane["history"]) for lane in lanes["plain"])
    ratio = min(reached["plain"], default=had) / min(reached["ours"])
    return ("" if reached["plain"] else "over ") + f"{ratio:.2f}", ratio >= 3


def processes(record: Record) -> str:
    kinds = list(next(iter(record["result"].values()))["medians"])
    rows = []
    for norm, each in record["result"].items():
        medians = [each["medians"][kind] for kind in kinds]
        rows.append([NORMS[norm], *(f"{ms:.1f}" for ms in medians), f"{medians[0] / medians[-1]:.2f}"])
    names = ", ".join(kind.replace(",", " with") for kind in kinds)
    size = record["size"]
    note = f"Medians of {size['process_rounds']} rounds, {size['process_steps']} steps each."
    return f"{table(f'ms a step, {names}, first / last', rows)}\n\n{note}"


def whole(record: Record) -> str:
    result = record["result"]
    keys = ("total_s", "training_s", "first_epoch_s", "later_epoch_s", "test_accuracy")
    rows = [[NORMS[norm], *(f"{each[key]:.2f}" for key in keys)] for norm, each in result["norms"].items()]
    header = f"{result['epochs']} epochs, seconds in all, training alone, first epoch, a later epoch, test accuracy (%)"
    return table(header, rows)


def targets(records: dict[str, Record]) -> str:
    """What the course promised itself, and whether it came out (on a CPU)."""
    steps = list(records["step"]["result"]["norms"].values()) if "step" in records else []
    rows = [
        target("our epoch over the floor, each norm", "at most", 1.03, [e["ours_over_floor"]["paired"] for e in steps]),
        target("the plain step over ours, each norm", "at least", 2, [e["plain_over_ours"]["paired"] for e in steps]),
    ]
    for name, record in records.items():
        if record["part"] == "accuracy" and elsewhere(name) is None:
            result = record["result"]
            for level in result["lanes"][0]["seconds_to"]:
                for words, longest in COMPARED.items():
                    text, met = ahead(result, level, longest)
                    what = f"the plain loop's seconds to {level} % over ours, {NORMS[result['norm']]}, {words}"
                    rows.append([what, "at least 3", text, "yes" if met else "no"])
    found = records["memory"]["result"] if "memory" in records else {}
    peaks = [each["ours"] / 1000 for each in found.get("peak_mb", {}).values() if each["ours"]]
    rows.append(target("peak memory of a training in GB, each norm", "at most", 1.2, peaks))
    for key, name, limit in (("import_normcourse_s", "seconds that import normcourse adds", 0.3),
                             ("load_s", "seconds to load the cached data set", 1)):  # fmt: skip
        rows.append(target(name, "at most", limit, [median(found[key])] if found else []))
    return table("what, target, measured, met", rows)


def elsewhere(name: str) -> str | None:
    """The block of a result from another device than the page's own."""
    return "gpu" if "-cuda" in name else "other" if name.endswith("-other") else None


def target(name: str, side: str, limit: float, values: list[float]) -> list[str]:
    """A row of the table of targets; met if every value meets it."""
    met = all(value <= limit if side == "at most" else value >= limit for value in values)
    measured = " / ".join(f"{value:.2f}" for value in values)
    return [name, f"{side} {limit:g}", measured or "not measured", ("yes" if met else "no") if values else ""]


# --- figures -----------------------------------------------------------------------------------------------------


def figures(records: dict[str, Record]) -> dict[str, Any]:
    """The figures of all results by the name of their file."""
    drawn = {}
    for name, record in records.items():
        if record["part"] == "step":
            drawn[name] = draw_step(record["result"])
        elif record["part"] == "accuracy":
            drawn[name] = draw_accuracy(record["result"])
        elif record["part"] == "grow":
            drawn |= {f"{name}-{axis}": draw_grow(record["result"], axis) for axis in AXES}
    return drawn


def draw_step(result: Record) -> Any:
    """Bars: medians; dots: each round."""
    with plot.styled() as plt:
        figure, axis = plt.subplots(figsize=(10, 4.4), layout="constrained")
        kinds = list(next(iter(result["norms"].values()))["medians"])
        for i, kind in enumerate(kinds):
            for k, each in enumerate(result["norms"].values()):
                place, rounds = k + (i - (len(kinds) - 1) / 2) * 0.2, each["ms"][kind]
                axis.bar(place, each["medians"][kind], 0.19, color=HUES[kind], alpha=0.75, hatch=HATCHES[kind],
                         edgecolor="white", label=KINDS[kind] if k == 0 else None)  # fmt: skip
                axis.plot([place] * len(rounds), rounds, "o", ms=4, mfc="white", mec="black", mew=0.8)
        axis.set_xticks(range(len(result["norms"])), [NORMS[norm] for norm in result["norms"]])
        axis.set(ylabel="ms a training step", title="A training step (bars: medians, dots: rounds)")
        figure.legend(loc="outside lower center", ncols=4)
    return figure


def draw_accuracy(result: Record) -> Any:
    """Test accuracy against seconds of training."""
    with plot.styled() as plt:
        figure, axis = plt.subplots(figsize=(10, 4.4), layout="constrained")
        longest = max(lane["epochs"] for lane in result["lanes"])
        for lane in result["lanes"]:
            seconds = list(accumulate(epoch["seconds"] for epoch in lane["history"]))
            accuracies = [epoch["test_accuracy"] for epoch in lane["history"]]
            look = {"marker": "o" if lane["name"] == "ours" else "s", "ls": "-" if lane["epochs"] == longest else "--"}
            axis.plot(seconds, accuracies, ms=5, color=HUES[lane["name"]], label=lane_name(lane), **look)
        for level in result["lanes"][0]["seconds_to"]:
            axis.axhline(float(level), color="black", lw=1, ls=":")
        title = f"Time to accuracy, {NORMS[result['norm']]} (a mark for each epoch)"
        axis.set(xlabel="seconds of training", ylabel="test accuracy (%)", title=title, xlim=(0, None))
        axis.legend(loc="lower right")
    return figure


def draw_grow(result: Record, axis: str) -> Any:
    """Time (left) and peak memory (right); for images an epoch, else an image."""
    points = result[axis]
    values = [p["value"] for p in points]
    with plot.styled() as plt:
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
        each = [1 if axis == "images" else 1e6 / p["images"] for p in points]
        for p, factor in zip(points, each, strict=True):
            left.plot([p["value"]] * len(p["all_seconds"]), [s * factor for s in p["all_seconds"]], "o", ms=4, mfc="white",
                      mec="black", mew=0.8)  # fmt: skip
        left.plot(values, [p["seconds"] * f for p, f in zip(points, each, strict=True)], color=HUES["ours"], zorder=1)
        right.plot(values, [p["peak_mb"] or float("nan") for p in points], marker="o", ms=5, color=HUES["ours"])
        for panel in (left, right):
            if axis == "batch_size":
                panel.set_xscale("log", base=2)
            panel.set_xticks(values, [f"{value // 1000}k" if axis == "images" else str(value) for value in values])
            panel.set(xlabel=AXES[axis], ylim=(0, 1.08 * panel.get_ylim()[1]))
        left.set_ylabel("seconds an epoch" if axis == "images" else "µs an image")
        right.set_ylabel("peak memory (MB)")
        figure.suptitle(f"Against the {'number of ' if axis != 'batch_size' else ''}{AXES[axis]} (dots: rounds)")
    return figure


# --- the page ----------------------------------------------------------------------------------------------------


def blocks(records: dict[str, Record]) -> dict[str, str]:
    """The text of each block of the page; a part that has not been run is said to be not measured."""
    texts: dict[str, list[str]] = {block: [] for block in BLOCKS}
    texts["targets"] = [targets(records)]
    for name, record in sorted(records.items(), key=lambda item: PARTS.index(item[1]["part"])):
        block = elsewhere(name) or record["part"]
        pictures = [f"{name}-{axis}" for axis in AXES] if record["part"] == "grow" else [name]
        drawn = [f"![{alt(p)}](images/{p}.png)" for p in pictures if record["part"] in ("step", "accuracy", "grow")]
        texts[block] += [section(record), *drawn]
    return {block: "\n\n".join(parts) or "Not measured." for block, parts in texts.items()}


def alt(picture: str) -> str:
    words = {"step": "Time of a training step", "accuracy": "Test accuracy against seconds of training",
             "grow": "Time and peak memory against the"}  # fmt: skip
    part, *rest = picture.split("-")
    return " ".join([words[part], *(AXES[r] if r in AXES else "" for r in rest[1:])]).strip()


def page(text: str, records: dict[str, Record]) -> str:
    """The page with every block as the results say."""
    for block, body in blocks(records).items():
        start, end = f"<!-- {block} -->", f"<!-- end of {block} -->"
        text, count = re.subn(f"{start}.*?{end}", lambda _, body=body, s=start, e=end: f"{s}\n{body}\n{e}", text, flags=re.S)
        if count != 1:
            raise ValueError(f"README.md needs {start} and {end} once each, it has them {count} times")
    return text


def write(folder: Path = HERE) -> None:
    """Write the page and the figures of a folder that has README.md and results/."""
    records, readme = read_all(folder / "results"), folder / "README.md"
    text = page(readme.read_text(encoding="utf-8"), records)
    for name, figure in figures(records).items():
        plot.save(figure, folder / "images" / f"{name}.png")
    write_file(readme, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    write()
    print(f"written: {HERE / 'README.md'}")
