"""Miniatures: recorded small experiments on NormNet (made by experiments/miniatures.py) and the figure of each."""

import copy
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from normcourse import __version__
from normcourse.data import CourseError, Data, batches
from normcourse.lessons import activations
from normcourse.model import MAX_PARAMETERS
from normcourse.norm import NORMS
from normcourse.plot import COLORS, panels
from normcourse.train import Record

FOLDER = Path(__file__).with_name("results") / "miniatures"  # the published ones, inside the package
LAYER_NORMS = {"": "GN(1)", "chw": "LayerNorm([C, H, W])", "pixel": "per-pixel LN"}
SEEDS = "accuracy (%); dots: seeds"
BN_EVALUATIONS = {"val_accuracy": "running averages", "precise_accuracy": "precise statistics",
                  "batch_accuracy": "batch statistics"}  # fmt: skip


def miniature(name: str, folder: Path = FOLDER) -> Record:
    """The record of a miniature; each of its ``points`` (one trained network) has all of its settings.

    Raises CourseError if there is none of that name, or it cannot be read.
    """
    path = folder / f"{name}.json"
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
        return record | {"points": [record["settings"] | point for point in record["points"]]}
    except FileNotFoundError as error:
        there = ", ".join(sorted(file.stem for file in folder.glob("*.json"))) or "none"
        raise CourseError(f"no miniature {name!r} in {folder}; there are: {there}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CourseError(f"{path} is not a whole record ({type(error).__name__}: {error}); make it again") from error


def accuracies(record: Record, evaluated: str = "val_accuracy", **settings: Any) -> list[float]:
    """Accuracy in % after the last epoch, of every seed of the points with these settings, e.g. norm="bn", lr=0.01."""
    reached = [p[evaluated] for p in _points(record, **settings)]
    return [each[-1] if isinstance(each, list) else each for each in reached]


def values(record: Record, setting: str, **settings: Any) -> list[Any]:
    """The values that a setting takes in the points with these settings, in rising order."""
    return sorted({p[setting] for p in _points(record, **settings)})


def _points(record: Record, **settings: Any) -> list[Record]:
    return [p for p in record["points"] if all(p[key] == value for key, value in settings.items())]


def epochs_to(history: list[float], accuracy: float) -> int | None:
    """The first epoch, counted from 1, whose validation accuracy is at least that; None if none is."""
    return next((epoch for epoch, reached in enumerate(history, 1) if reached >= accuracy), None)


def level(record: Record) -> int:
    """The highest multiple of 5, 60 at most, that every seed of some norm and rate reaches: there speeds compare."""
    runs = {(p["norm"], p["lr"]) for p in record["points"]}
    slowest = [min(max(p["val_accuracy"]) for p in _points(record, norm=norm, lr=lr)) for norm, lr in runs]
    return min(60, int(max(slowest) // 5) * 5)


def best_rate(record: Record, norm: str) -> float:
    """The learning rate with the highest mean validation accuracy in the miniature ``rates``."""
    return max(values(record, "lr", norm=norm), key=lambda lr: statistics.mean(accuracies(record, norm=norm, lr=lr)))


def caption(record: Record) -> str:
    """The reduced size, and the course's version where it is another one, to be printed on the figure."""
    words = f"{record['images'][0]:,} training images, {record['samples_seen']:,} samples seen, "
    words += f"{len(record['seeds'])} seeds, validation accuracy"
    made = {versions["normcourse"] for versions in record["versions"]}
    words += f", normcourse {' and '.join(sorted(made))}" * (made != {__version__})
    return words + (" (PRELIMINARY)" if record["preliminary"] else "")


# --- what the miniatures do to a network ---------------------------------------------------------------------------


class PixelLayerNorm(nn.LayerNorm):
    """Layer Norm of each pixel over its C channels, as in ConvNeXt (Liu et al. 2022); 2C parameters."""

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, H, W)
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def with_layer_norm(model: nn.Module, kind: str) -> nn.Module:
    """The network with every ``norm`` replaced: ``chw`` by LayerNorm([C, H, W]), ``pixel`` by LayerNorm(C) per pixel.

    Works in place, for images (N, 3, 32, 32). Raises CourseError for another kind.
    """
    if kind not in ("chw", "pixel"):
        raise CourseError(f"unknown layer norm {kind!r}; allowed: chw, pixel")
    blocks = [name.removesuffix(".norm") for name, _ in model.named_modules() if name.endswith(".norm")]
    for name, (x, _) in activations(model, torch.zeros(2, 3, 32, 32), blocks).items():
        norm = nn.LayerNorm(x.shape[1:]) if kind == "chw" else PixelLayerNorm(x.shape[1])
        model.get_submodule(name).norm = norm
    return model


def precise_statistics(model: nn.Module, data: Data, count: int = 4_000, batch_size: int = 500) -> nn.Module:
    """A copy whose Batch Norms have statistics of the population, not running averages (Wu & Johnson 2021, section 3).

    With the weights fixed, ``count`` training images, drawn at random but always the same, pass once in training mode,
    in large batches; each channel's mean and variance are averaged over these batches.
    """
    model = copy.deepcopy(model).eval()
    drawn = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(0))[:count]
    stream = batches(data.train_images[drawn], data.train_labels[drawn], data, batch_size)
    update_bn((x for x, _ in stream), model)
    return model


def with_batch_statistics(model: nn.Module) -> nn.Module:
    """A copy whose Batch Norms use the statistics of the batch in evaluation, too."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = None
    return model


# --- figures -------------------------------------------------------------------------------------------------------


def draw_bn_rates(record: Record) -> Any:
    """Validation accuracy by epoch with and without BN, a panel for each learning rate, with the epochs to a level."""
    rates, goal = values(record, "lr"), level(record)
    with _panels(record, "With and without Batch Norm", (10, 4.6), len(rates)) as (figure, axes):
        for axis, lr in zip(axes, rates, strict=True):
            title = [f"learning rate {lr:g}", f"{goal} % reached in epoch"]
            for norm, dash, name in (("bn", "-", "BN"), ("none", "--", "no norm")):
                runs = [p["val_accuracy"] for p in _points(record, norm=norm, lr=lr)]
                epochs = range(1, len(runs[0]) + 1)
                _line(axis, epochs, list(zip(*runs, strict=True)), label=NORMS[norm], color=COLORS[norm], ls=dash)
                needed = [str(epochs_to(run, goal) or "never") for run in runs]
                title.append(f"{name}: {', '.join(needed if set(needed) != {'never'} else ['never'])}")
            axis.set_title("\n".join(title), fontsize=11)
            axis.set(xlabel="epoch", xticks=epochs)
            axis.axhline(goal, color="gray", lw=1.2, ls=":")
    return figure


def draw_batch_size(record: Record) -> Any:
    """Accuracy against the batch size: BN evaluated in three ways, GN and LN (after Wu & He 2018, figure 5)."""
    sizes = values(record, "batch_size")[::-1]
    lines = [("bn", key, f"BN, {words}") for key, words in BN_EVALUATIONS.items()]
    lines += [("gn", "val_accuracy", "Group Norm"), ("ln", "val_accuracy", "Layer Norm")]
    with _panels(record, "Accuracy against the batch size", (9, 5)) as (figure, axis):
        for (norm, key, name), dash, marker in zip(lines, ("-", "--", ":", "-", "-"), "osvD^", strict=True):
            columns = [accuracies(record, key, norm=norm, batch_size=size) for size in sizes]
            _line(axis, sizes, columns, label=name, color=COLORS[norm], ls=dash, marker=marker)
        axis.set_xlabel("batch size, the learning rate scaled with it")
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, sizes)
        axis.invert_xaxis()
    return figure


def draw_layer_norms(record: Record) -> Any:
    """Accuracy of the three things called Layer Norm, with the parameters of the network."""
    names = []
    for layer, words in LAYER_NORMS.items():
        parameters = values(record, "parameters", layer=layer)[0]
        names.append(f"{words}\n{parameters:,} parameters" + (" (over the limit)" * (parameters >= MAX_PARAMETERS)))
    groups = [accuracies(record, layer=layer) for layer in LAYER_NORMS]
    return _bars(record, "Three Layer Norms, same network", names, groups, [COLORS["ln"]] * 3)


def draw_groups(record: Record) -> Any:
    """Accuracy against the number of groups: LN is 1 group, IN is as many as channels."""
    numbers, title = values(record, "num_groups", norm="gn"), "Accuracy against the number of groups, learning rate"
    columns = [accuracies(record, norm="gn", num_groups=g) for g in numbers]
    columns = [accuracies(record, norm="ln"), *columns, accuracies(record, norm="in")]
    with _panels(record, f"{title} {values(record, 'lr')[0]:g}") as (figure, axis):
        _line(axis, range(len(columns)), columns, color=COLORS["gn"], marker="o")
        axis.set_xticks(range(len(columns)), ["1\n(Layer Norm)", *numbers, "C\n(Instance Norm)"])
        axis.set_xlabel("number of groups")
    return figure


def draw_rates(record: Record) -> Any:
    """Accuracy against the learning rate, a line for each norm: who tolerates what."""
    with _panels(record, "Accuracy against the learning rate", (9, 5)) as (figure, axis):
        for norm, dash, marker in zip(NORMS, ("-", "-.", "-", "--", ":"), "o^DsX", strict=True):
            rates = values(record, "lr", norm=norm)
            columns = [accuracies(record, norm=norm, lr=lr) for lr in rates]
            _line(axis, rates, columns, label=NORMS[norm], color=COLORS[norm], ls=dash, marker=marker)
        axis.set(xscale="log", xlabel="peak learning rate")
        axis.set_xticks(rates, [f"{lr:g}" for lr in rates])
        axis.minorticks_off()
    return figure


def draw_norms(record: Record) -> Any:
    """Accuracy of every norm and of none, each at its best rate of the miniature ``rates``."""
    names = [f"{words}\nlr {values(record, 'lr', norm=norm)[0]:g}" for norm, words in NORMS.items()]
    groups = [accuracies(record, norm=norm) for norm in NORMS]
    return _bars(record, "Each norm at its own best rate", names, groups, [COLORS[norm] for norm in NORMS])


def _line(axis: Any, places: Sequence[float], columns: Sequence[Sequence[float]], **look: Any) -> None:
    """A line through the mean of each column (the accuracies of all seeds at one place), and a small dot for each seed."""
    dot = {"marker": look.get("marker", "o"), "color": look["color"], "ms": 3, "alpha": 0.6}
    for place, column in zip(places, columns, strict=True):
        axis.plot([place] * len(column), column, ls="", **dot)
    axis.plot(places, [statistics.mean(column) for column in columns], **look)


def _bars(record: Record, title: str, names: list[str], groups: list[list[float]], colors: list[str]) -> Any:
    """Mean and standard deviation of each group of accuracies, and each seed as a dot."""
    with _panels(record, title) as (figure, axis):
        labels = []
        for i, (name, group, color) in enumerate(zip(names, groups, colors, strict=True)):
            mean, spread = statistics.mean(group), statistics.stdev(group) if len(group) > 1 else 0.0
            axis.errorbar(i, mean, spread, fmt="_", ms=40, mew=3, capsize=6, color=color)
            axis.plot([i + 0.12] * len(group), group, "o", ms=5, alpha=0.6, color=color)
            labels.append(f"{name}\n{mean:.1f} ± {spread:.1f} %")
        axis.set_xticks(range(len(labels)), labels)
        axis.set_xlim(-0.6, len(labels) - 0.4)
        axis.grid(axis="x", visible=False)
    return figure


@contextmanager
def _panels(record: Record, title: str, size: Any = (9, 4.6), columns: int = 1) -> Iterator[tuple[Any, Any]]:
    """As plot.panels; once it is drawn, its title gets the reduced size."""
    with panels(1, columns, size, sharey=True) as (figure, axes):
        yield figure, axes
        figure.axes[0].set_ylabel(SEEDS)
        figure.suptitle(f"{title}\n{caption(record)}", fontsize=12)


DRAW: dict[str, Callable[[Record], Any]] = {
    "bn_rates": draw_bn_rates, "batch_size": draw_batch_size, "layer_norms": draw_layer_norms, "groups": draw_groups,
    "rates": draw_rates, "norms": draw_norms,
}  # fmt: skip
