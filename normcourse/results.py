"""Results: records of trainings, their table, recorded experiments, paired differences."""

import hashlib
import json
import math
import re
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import torch
from scipy.special import stdtrit
from torch import Tensor, nn

from normcourse.data import Data, home
from normcourse.errors import CourseError
from normcourse.model import MAX_PARAMETERS
from normcourse.norm import NORMS
from normcourse.train import MAX_EPOCHS, Settings, build, default_settings

RESULTS = Path(__file__).with_name("results")  # the published records and weights
EXPERIMENTS = RESULTS / "experiments"
NETS = {"normnet": "NormNet", "reference": "Reference"}
SHORT_EPOCHS = 4  # enough for 80 % on CIFAR-10, in about five minutes
Record = dict[str, Any]


# --- a trained network ----------------------------------------------------------------------------


def published_records() -> dict[Path, Record]:
    """The published records by their paths, in the table's order."""
    found = []
    for path in sorted(RESULTS.glob("[!.]*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        record["settings"] = asdict(Settings(**record["settings"]))  # old ones have fewer
        found.append((path, record))
    return dict(sorted(found, key=lambda item: table_order(item[1])))


def published(settings: Settings) -> tuple[Path, Record] | tuple[None, None]:
    """The published weights and record of a run with these settings.

    On whatever copy of CIFAR-10 it was trained; (None, None) if there is none.
    """
    for path, record in published_records().items():
        weights = path.with_suffix(".pt")
        if record["settings"] == asdict(settings) and weights.exists():
            return weights, record
    return None, None


def trained(
    settings: Settings, data: Data, retrain: str | None = None, runs: str | Path | None = None
) -> tuple[nn.Module, Record]:
    """The network that ``settings`` name, trained, and the record of a training.

    Prints where both come from. They are the published ones. With ``retrain``, "short" (4 epochs)
    or "full", or where none are published, it is trained now, into ``runs``: a run that was stopped
    goes on there, a finished one is read. On other images than CIFAR-10 the record is the published
    one, and the network learns a sample of the images for some seconds.
    """
    from normcourse.engine.fit import fit  # a whole run: one door further in

    if retrain not in (None, "short", "full"):
        raise CourseError(f"RETRAIN is {retrain!r}; allowed: None, 'short', 'full'")
    if retrain == "short":
        settings = replace(settings, epochs=SHORT_EPOCHS)
    weights, record = (None, None) if retrain else published(settings)
    if weights is None or record is None:
        folder = data_folder(runs, data.name)
        record = fit(settings, data, folder)
        weights = folder / f"{run_name(settings, data)}.pt"
    elif data.name != "CIFAR-10":
        message = "curves and tables show the published run, images a network trained just now"
        print(f"{data.name}, not CIFAR-10: {message}")
        return trained_briefly(fit, settings, data), record
    made_on = f"{record['data']} ({record['copy']})"
    other = "" if record["copy"] == data.copy else f"; here is another copy ({data.copy})"
    print(f"trained for {settings.epochs} epochs on {made_on}{other}")
    return load_weights(settings, data, weights), record


def trained_briefly(fit: Callable[..., Record], settings: Settings, data: Data) -> nn.Module:
    """The network after three epochs on 1,500 of the images."""
    count = len(data.train_labels)
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:1500]
    images, labels = data.train_images[chosen], data.train_labels[chosen]
    few = data._replace(train_images=images, train_labels=labels)
    short = replace(settings, epochs=3, batch_size=64, lr=settings.lr * 0.7, flip=False)
    with tempfile.TemporaryDirectory() as folder:
        fit(short, few, folder, progress=False)
        return load_weights(settings, data, Path(folder) / f"{run_name(short, few)}.pt")


def load_weights(settings: Settings, data: Data, weights: Path) -> nn.Module:
    """The network with a file's weights, in eval mode. Raises CourseError if it has not them."""
    if not weights.exists():
        message = f"{weights}, the weights, is missing"
        raise CourseError(f"{message}; delete {weights.stem}.json to train this run again")
    model = build(settings, len(data.classes))
    try:
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:  # a file that is cut short, or something else, fails in many ways
        message = f"{weights} does not hold this network's weights ({type(error).__name__})"
        again = f"delete it and {weights.stem}.json to train this run again"
        raise CourseError(f"{message}; {again}") from error
    return model.eval()


def run_name(settings: Settings, data: Data) -> str:
    """The name of a run's files: readable, and different whenever a setting or the data differ."""
    usual = (("processes", 1), ("sync_bn", False))  # left out: younger than the names of old runs
    chosen = {name: value for name, value in asdict(settings).items() if (name, value) not in usual}
    named = data.name if data.name == "CIFAR-10" else [data.name, data.classes]
    text = json.dumps([chosen, named, data.copy], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    size = f"-m{settings.multiplier}" if settings.multiplier else ""
    return f"{settings.net}-{settings.norm}{size}-seed{settings.seed}-{digest}"


def data_folder(runs: str | Path | None, name: str) -> Path:
    """The folder of a data set's runs: records of different data never mix."""
    # A file's name may have 255 bytes, and "%E5" is one byte of the data's.
    return Path(runs or home() / "runs").expanduser() / quote(name.lower(), safe="")[:240]


def mistakes(logits: Tensor, labels: Tensor, count: int = 10) -> list[tuple[int, int, float]]:
    """Some wrongly classified images: index, predicted class, confidence (0 to 1).

    Drawn at random with a fixed seed. At random, because the first ones may all be of one class,
    and the most confident ones would not be typical.
    """
    confidence, predicted = logits.softmax(1).max(1)  # (N,), (N,)
    wrong = (predicted != labels).nonzero().flatten()
    order = torch.randperm(len(wrong), generator=torch.Generator().manual_seed(0))
    found = []
    for i in wrong[order[:count]].tolist():
        found.append((i, int(predicted[i]), round(float(confidence[i]), 4)))
    return found


# --- names, tables, gaps --------------------------------------------------------------------------


def changed_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What differs from the recipe of the network and norm."""
    recipe = asdict(default_settings(settings["net"], settings["norm"]))
    return {name: value for name, value in settings.items() if value != recipe[name]}


def command(settings: dict[str, Any]) -> str:
    """The command that makes a run again, also after a recipe has changed.

    It names what differs from the recipe or from Settings().
    """
    usual, changed = asdict(Settings()), changed_settings(settings)
    start = "python"
    if settings["processes"] > 1:
        start = f"torchrun --nproc-per-node {settings['processes']}"
    words = [f"{start} -m normcourse train --net {settings['net']} --norm {settings['norm']}"]
    for name, value in settings.items():
        option, needed = name.replace("_", "-"), name in changed or value != usual[name]
        if isinstance(value, bool) and needed:
            words.append(f"--{option}" if value else f"--no-{option}")
        elif needed and name not in ("net", "norm", "processes"):
            words.append(f"--{option} {value}")
    if settings["epochs"] > MAX_EPOCHS:
        words.append("--more-epochs")
    return " ".join(words)


def label(settings: dict[str, Any]) -> str:
    """The name of a run's norm as a reader should see it.

    With what differs from its recipe in brackets.
    """
    net, norm, multiplier = settings["net"], settings["norm"], settings["multiplier"]
    name = NORMS[norm]
    if net == "normnet" and norm == "gn":
        name += f", {settings['num_groups']} groups"
    if net == "reference" and norm == "ln":
        name += f", m = {multiplier}"
    if net == "reference" and norm == "gn" and multiplier == 1:
        name += ", 4 groups"
    elif net == "reference" and norm == "gn":
        name = "“Group Norm” of C groups = Instance Norm"
    elsewhere = {"net", "seed", "epochs", "lr", "validate", "num_groups", "multiplier"}
    ours = asdict(default_settings(norm=norm))
    if net == "reference" and all(settings[k] == ours[k] for k in set(ours) - elsewhere):
        return f"{name} (the course's recipe)"
    differs = changed_settings(settings)
    changed = [f"{key} {value}" for key, value in differs.items() if key not in elsewhere]
    return f"{name} ({', '.join(changed)})" if changed else name


def table_order(record: Record) -> tuple[Any, ...]:
    """What records are sorted by: data, network, norm, size, seed."""
    settings = record["settings"]
    norm = list(NORMS).index(settings["norm"])
    network = (settings["net"], norm, record["parameters"])
    return (record["data"], record["copy"], *network, settings["seed"], record["command"])


def groups(records: list[Record]) -> list[list[Record]]:
    """Runs that differ in nothing but the seed, together; a record that was copied counts once."""
    grouped: dict[str, dict[int, Record]] = {}
    for record in records:
        settings = record["settings"] | {"seed": None}
        key = json.dumps([record["data"], record["copy"], settings], sort_keys=True)
        grouped.setdefault(key, {}).setdefault(record["settings"]["seed"], record)
    return [list(runs.values()) for runs in grouped.values()]


def table(records: list[Record], columns: Sequence[str] = ()) -> str:
    """The results as a Markdown table of all columns, or of some; a row for each network.

    Mean and standard deviation over its seeds.
    """
    rows = [row(runs) for runs in groups(records)]
    names = list(columns or rows[0])
    rule = "|".join("---" if name in ("network", "norm") else "--:" for name in names)
    lines = [" | ".join(cells[name] for name in names) for cells in rows]
    return "\n".join([f"| {' | '.join(names)} |", f"|{rule}|", *(f"| {line} |" for line in lines)])


def row(runs: list[Record]) -> dict[str, str]:
    """A row of the table by its columns, for runs that differ in their seed alone."""
    settings, parameters = runs[0]["settings"], runs[0]["parameters"]
    over = " (over the limit)" if parameters >= MAX_PARAMETERS else ""
    held_out, note = ("val", " (validation)") if settings["validate"] else ("test", "")
    last = [run["history"][-1] for run in runs]
    return {
        "network": NETS[settings["net"]],
        "norm": label(settings),
        "parameters": f"{parameters:,}{over}",
        "epochs": str(settings["epochs"]),
        "lr": f"{settings['lr']:g}",
        "seeds": str(len(runs)),
        "train accuracy (%)": mean_std([epoch["train_accuracy"] for epoch in last]),
        "test accuracy (%)": mean_std([epoch[f"{held_out}_accuracy"] for epoch in last]) + note,
        "flip-averaged (%)": mean_std([run["flip_accuracy"] for run in runs]),
        "seconds": f"{statistics.mean(run['seconds'] for run in runs):,.0f}",
    }


def provenance(records: list[Record]) -> str:
    """Where the figures come from: data copy, hardware, threads, precision, versions."""
    lines: dict[str, set[str]] = {"Data": set(), "Hardware": set(), "Versions": set()}
    for r in records:
        train, test = r["images"]
        versions = ", ".join(f"{name} {version}" for name, version in r["versions"].items())
        lines["Data"].add(f"{r['data']} ({r['copy']}; {train:,} training, {test:,} test images)")
        lines["Hardware"].add(f"{r['device']}, {r['threads']} thread(s), {r['precision']}")
        lines["Versions"].add(f"{versions} on {r['system']}")
    said = {name: plain("; ".join(sorted(found))) for name, found in lines.items()}
    return "\n".join(f"- {name}: {text}" for name, text in said.items())


def plain(text: str) -> str:
    """What a record says, as text on one line: Markdown and HTML in it do nothing."""
    return re.sub(r"[^\w .,;()+@®™/-]", "?", text)


def mean_std(values: list[float]) -> str:
    """Mean ± standard deviation over seeds; one seed has no deviation."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


# --- recorded experiments -------------------------------------------------------------------------


def experiment(name: str, folder: Path = EXPERIMENTS) -> list[Record]:
    """The records of an experiment (``experiments/NAME.py``), one for each arm and seed.

    Raises CourseError if there are none of that name.
    """
    paths = sorted((folder / name).glob("[!.]*.json"))
    if not paths:
        there = ", ".join(sorted(path.name for path in folder.glob("*/"))) or "none"
        raise CourseError(f"no experiment {name!r} in {folder}; there are: {there}")
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def by_seed(records: list[Record], arm: str, figure: str) -> dict[int, float]:
    """A figure of an arm for each seed whose training did not diverge."""
    found = {}
    for record in records:
        if record["arm"] == arm and not record["diverged"]:
            found[record["settings"]["seed"]] = record["figures"][figure]
    return found


class Difference(NamedTuple):
    """By how much one arm is above another: the mean over seeds, its 95 % interval."""

    mean: float
    low: float
    high: float
    seeds: int  # how many

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        if self.seeds < 2:
            return f"{self.mean:+.2f} (one seed: no interval)"
        verdict = "clear" if self.clear else "not clear"
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}] ({verdict})"


def paired(a: dict[int, float], b: dict[int, float]) -> Difference:
    """How far the arm a is above the arm b, taken seed by seed, with the 95 % t-interval.

    Each is a figure by seed; seeds that only one of them has do not count. One seed has no
    interval: it is -inf to inf. Raises CourseError if no seed is in both.
    """
    seeds = a.keys() & b.keys()
    if not seeds:
        raise CourseError(f"no seed in both: {sorted(a)} and {sorted(b)}")
    differences = [a[seed] - b[seed] for seed in seeds]
    mean, half = statistics.mean(differences), math.inf
    if (n := len(seeds)) > 1:
        half = float(stdtrit(n - 1, 0.975)) * statistics.stdev(differences) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)
