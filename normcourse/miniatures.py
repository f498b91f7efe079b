"""Miniatures: recorded small experiments on NormNet (made by experiments/miniatures.py) and the figure of each."""

import copy
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from normcourse.data import CourseError, Data, batches
from normcourse.model import MAX_PARAMETERS
from normcourse.norm import NORMS
from normcourse.plot import COLORS, styled
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
    chosen = [p for p in record["points"] if all(p[key] == value for key, value in settings.items())]
    return [p[evaluated][-1] if isinstance(p[evaluated], list) else p[evaluated] for p in chosen]


def values(record: Record, setting: str, **settings: Any) -> list[Any]:
    """The values that a setting takes in the points with these settings, in rising order."""
    return sorted({p[setting] for p in record["points"] if all(p[k] == v for k, v in settings.items())})


def epochs_to(history: list[float], accuracy: float) -> int | None:
    """The first epoch, counted from 1, whose validation accuracy is at least that; None if none is."""
    return next((epoch for epoch, reached in enumerate(history, 1) if reached >= accuracy), None)


def level(record: Record) -> int:
    """The highest multiple of 5, 60 at most, that every seed of some norm and rate reaches: there speeds compare."""
    runs: dict[tuple[str, float], list[float]] = {}  # the best epoch of each seed
    for p in record["points"]:
        runs.setdefault((p["norm"], p["lr"]), []).append(max(p["val_accuracy"]))
    return min(60, int(max(min(best) for best in runs.values()) // 5) * 5)


def best_rate(record: Record, norm: str) -> float:
    """The learning rate with the highest mean validation accuracy in the miniature ``rates``."""
    return max(values(record, "lr", norm=norm), key=lambda lr: statistics.mean(accuracies(record, norm=norm, lr=lr)))


def caption(record: Record) -> str:
    """The reduced size, to be printed on the figure."""
    images, seen, seeds = record["images"][0], record["samples_seen"], len(record["seeds"])
    words = f"{images:,} training images, {seen:,} samples seen, {seeds} seeds, validation accuracy"
    return words + (" (PRELIMINARY)" if record["preliminary"] else "")


# --- what the miniatures do to a network ---------------------------------------------------------------------------


class PixelLayerNorm(nn.LayerNorm):
    """Layer Norm of each pixel over its C channels, as in ConvNeXt (Liu et al. 2022); 2C parameters."""

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, H, W)
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def with_layer_norm(model: nn.Module, kind: str, size: int = 32) -> nn.Module:
    """The network with every ``norm`` replaced: ``chw`` by LayerNorm([C, H, W]), ``pixel`` by LayerNorm(C) per pixel.

    Works in place, for images (N, 3, size, size). Raises CourseError for another kind.
    """
    if kind not in ("chw", "pixel"):
        raise CourseError(f"unknown layer norm {kind!r}; allowed: chw, pixel")
    shapes: dict[str, torch.Size] = {}  # (C, H, W) of each norm's input
    hooks = [
        module.register_forward_pre_hook(lambda _, x, name=name: shapes.update({name: x[0].shape[1:]}))
        for name, module in model.named_modules()
        if name.split(".")[-1] == "norm"
    ]
    with torch.no_grad():
        model(torch.zeros(2, 3, size, size))
    for hook in hooks:
        hook.remove()
    for name, shape in shapes.items():
        norm = nn.LayerNorm(shape) if kind == "chw" else PixelLayerNorm(shape[0])
        model.get_submodule(name.rpartition(".")[0]).norm = norm  # set_submodule needs torch 2.5
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
    with styled() as plt:
        figure, axes = plt.subplots(1, len(rates), figsize=(10, 4.6), sharey=True, layout="constrained")
        for axis, lr in zip(axes, rates, strict=True):
            title = [f"learning rate {lr:g}", f"{goal} % reached in epoch"]
            for norm, dash, name in (("bn", "-", "BN"), ("none", "--", "no norm")):
                runs = [p["val_accuracy"] for p in record["points"] if p["norm"] == norm and p["lr"] == lr]
                _lines(axis, range(1, len(runs[0]) + 1), runs, label=NORMS[norm], color=COLORS[norm], ls=dash)
                needed = [str(epochs_to(run, goal) or "never") for run in runs]
                title.append(f"{name}: {', '.join(needed if set(needed) != {'never'} else ['never'])}")
            axis.set_title("\n".join(title), fontsize=11)
            axis.set(xlabel="epoch", xticks=range(1, len(runs[0]) + 1))
            axis.axhline(goal, color="gray", lw=1.2, ls=":")
        axes[0].set_ylabel(SEEDS)
        _finish(figure, axes[0], record, "With and without Batch Norm")
    return figure


def draw_batch_size(record: Record) -> Any:
    """Accuracy against the batch size: BN evaluated in three ways, GN and LN (after Wu & He 2018, figure 5)."""
    sizes = values(record, "batch_size")[::-1]
    lines = [("bn", key, f"BN, {words}") for key, words in BN_EVALUATIONS.items()]
    lines += [("gn", "val_accuracy", "Group Norm"), ("ln", "val_accuracy", "Layer Norm")]
    with styled() as plt:
        figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
        for (norm, key, name), dash, marker in zip(lines, ("-", "--", ":", "-", "-"), "osvD^", strict=True):
            runs = zip(*(accuracies(record, key, norm=norm, batch_size=size) for size in sizes), strict=False)
            _lines(axis, sizes, list(runs), label=name, color=COLORS[norm], ls=dash, marker=marker)
        axis.set(xlabel="batch size, the learning rate scaled with it", ylabel=SEEDS)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, sizes)
        axis.invert_xaxis()
        _finish(figure, axis, record, "Accuracy against the batch size")
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
    with styled() as plt:
        figure, axis = plt.subplots(figsize=(9, 4.6), layout="constrained")
        settings = [{"norm": "ln"}] + [{"num_groups": g} for g in values(record, "num_groups", norm="gn")]
        settings = [s | {"norm": s.get("norm", "gn")} for s in settings] + [{"norm": "in"}]
        runs = zip(*(accuracies(record, **s) for s in settings), strict=False)
        _lines(axis, range(len(settings)), list(runs), label="mean", color=COLORS["gn"], marker="o")
        names = ["1\n(Layer Norm)", *(s["num_groups"] for s in settings[1:-1]), "C\n(Instance Norm)"]
        axis.set_xticks(range(len(settings)), names)
        axis.set(xlabel="number of groups", ylabel=SEEDS)
        _finish(
            figure, axis, record, f"Accuracy against the number of groups, learning rate {values(record, 'lr')[0]:g}"
        )
    return figure


def draw_rates(record: Record) -> Any:
    """Accuracy against the learning rate, a line for each norm: who tolerates what."""
    with styled() as plt:
        figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
        for norm, dash, marker in zip(NORMS, ("-", "-.", "-", "--", ":"), "o^DsX", strict=True):
            rates = values(record, "lr", norm=norm)
            runs = zip(*(accuracies(record, norm=norm, lr=lr) for lr in rates), strict=False)
            _lines(axis, rates, list(runs), label=NORMS[norm], color=COLORS[norm], ls=dash, marker=marker)
        axis.set(xscale="log", xlabel="peak learning rate", ylabel=SEEDS)
        axis.set_xticks(rates, [f"{lr:g}" for lr in rates])
        axis.minorticks_off()
        _finish(figure, axis, record, "Accuracy against the learning rate")
    return figure


def draw_norms(record: Record) -> Any:
    """Accuracy of every norm and of none, each at its best rate of the miniature ``rates``."""
    names = [f"{words}\nlr {values(record, 'lr', norm=norm)[0]:g}" for norm, words in NORMS.items()]
    groups = [accuracies(record, norm=norm) for norm in NORMS]
    return _bars(record, "Each norm at its own best rate", names, groups, [COLORS[norm] for norm in NORMS])


def _lines(axis: Any, x: Iterable[float], runs: list[Any], **look: Any) -> None:
    """A line through the means, and a small dot for each run (a sequence of accuracies, one for each x)."""
    places = list(x)
    for run in runs:
        axis.plot(places, run, ls="", marker=look.get("marker", "o"), ms=3, alpha=0.6, color=look["color"])
    axis.plot(places, [statistics.mean(column) for column in zip(*runs, strict=True)], **look)


def _bars(record: Record, title: str, names: list[str], groups: list[list[float]], colors: list[str]) -> Any:
    """Mean and standard deviation of each group of accuracies, and each seed as a dot."""
    with styled() as plt:
        figure, axis = plt.subplots(figsize=(9, 4.6), layout="constrained")
        labels = list(names)
        for i, (group, color) in enumerate(zip(groups, colors, strict=True)):
            mean, spread = statistics.mean(group), statistics.stdev(group) if len(group) > 1 else 0.0
            axis.errorbar(i, mean, spread, fmt="_", ms=40, mew=3, capsize=6, color=color)
            axis.plot([i + 0.12] * len(group), group, "o", ms=5, alpha=0.6, color=color)
            labels[i] += f"\n{mean:.1f} ± {spread:.1f} %"
        axis.set_xticks(range(len(labels)), labels)
        axis.set(ylabel=SEEDS, xlim=(-0.6, len(names) - 0.4))
        axis.grid(axis="x", visible=False)
        figure.suptitle(f"{title}\n{caption(record)}", fontsize=12)
    return figure


def _finish(figure: Any, axis: Any, record: Record, title: str) -> None:
    """Title with the reduced size, and one legend below where there are several lines."""
    figure.suptitle(f"{title}\n{caption(record)}", fontsize=12)
    handles, labels = axis.get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=3)


DRAW: dict[str, Callable[[Record], Any]] = {
    "bn_rates": draw_bn_rates, "batch_size": draw_batch_size, "layer_norms": draw_layer_norms, "groups": draw_groups,
    "rates": draw_rates, "norms": draw_norms,
}  # fmt: skip
