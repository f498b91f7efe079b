"""Pictures: curves, mistakes, confusion and per-class accuracy, in one colour-blind-safe style. Each returns a Figure."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normcourse.data import Data, write_file
from normcourse.norm import NORMS
from normcourse.train import changed_settings, default_settings

# Okabe & Ito's palette, told apart under the common kinds of colour blindness; lines also differ in dash.
COLORS = {"bn": "#0072B2", "ln": "#E69F00", "gn": "#D55E00", "in": "#009E73", "none": "#000000"}
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a class may be called $x
    "font.size": 11, "axes.titlesize": 12, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.3, "legend.frameon": False, "figure.dpi": 100, "lines.linewidth": 2,
}  # fmt: skip


def save(figure: Any, path: Path) -> str:
    """Write a picture, whole or not at all, and return its name."""
    from matplotlib import pyplot

    write_file(path, partial(figure.savefig, format="png", dpi=150, metadata={"Software": None}))
    pyplot.close(figure)
    return path.name


def label(settings: dict[str, Any]) -> str:
    """The name of a run's norm as a reader should see it, with what differs from its recipe in brackets."""
    norm, size = settings["norm"], settings["multiplier"]
    name = NORMS[norm]
    if settings["net"] == "normnet":
        name += f", {settings['num_groups']} groups" if norm == "gn" else ""
    elif norm == "gn":
        name = "Group Norm, 4 groups" if size == 1 else "“Group Norm” of C groups = Instance Norm"
    elif norm == "ln":
        name += f", m = {size}"
    has_its_place = {"seed", "epochs", "lr", "validate", "num_groups", "multiplier"}  # in the table
    changed = ", ".join(f"{k} {v}" for k, v in changed_settings(settings).items() if k not in has_its_place)
    ours = asdict(default_settings(norm=norm))
    if settings["net"] == "reference" and all(settings[k] == ours[k] for k in ours if k not in has_its_place | {"net"}):
        changed = "the course's recipe"
    return name + (f" ({changed})" if changed else "")


def color(settings: dict[str, Any]) -> str:
    """The norm's colour, in every picture; the reference designs' second Layer and Group Norm have one of their own."""
    twin = {("ln", 1): "#CC79A7", ("gn", None): COLORS["in"], ("gn", 2): COLORS["in"]}
    own = COLORS[settings["norm"]]
    return own if settings["net"] == "normnet" else twin.get((settings["norm"], settings["multiplier"]), own)


def curves(records: list[dict[str, Any]], title: str = "") -> Any:
    """Accuracy (left) and loss (right, log scale) by epoch; solid: evaluated, dashed: training, as it was on the way."""
    held_out = "val" if records[0]["settings"]["validate"] else "test"
    with panels(1, 2) as (figure, axes):
        for axis, kind, unit in zip(axes, ("accuracy", "loss"), ("accuracy (%)", "cross-entropy"), strict=True):
            for record in records:
                history, settings = record["history"], record["settings"]
                epochs = range(1, len(history) + 1)
                look = {"color": color(settings), "marker": "o" if len(history) == 1 else ""}
                evaluated = f"{'val' if settings['validate'] else 'test'}_{kind}"
                axis.plot(epochs, [h[evaluated] for h in history], ls="-", label=label(settings), **look)
                axis.plot(epochs, [h[f"train_{kind}"] for h in history], ls="--", lw=1.2, **look)
            axis.set(xlabel="epoch", ylabel=unit)
            axis.locator_params(axis="x", integer=True)
        axes[1].set_yscale("log", subs=(2, 5))  # the minor ticks, between 1 and 10
        axes[1].yaxis.set_major_formatter("{x:g}")
        axes[1].yaxis.set_minor_formatter("{x:g}")
        figure.suptitle(f"{title or records[0]['data']} (solid: {held_out}, dashed: train)")
    return figure


def misclassified(found: list[tuple[int, int, float]], data: Data, title: str = "") -> Any:
    """A 5x2 grid of wrongly classified test images, each titled true -> predicted (confidence).

    The images are shown as they were stored (uint8), so nothing has to be un-normalised and nothing is clipped.
    """
    with panels(2, 5, (10, 5)) as (figure, axes):
        for axis in axes.flat:
            axis.axis("off")
        for axis, (index, predicted, confidence) in zip(axes.flat, found, strict=False):
            axis.imshow(data.test_images[index].permute(1, 2, 0).numpy())  # (H, W, C)
            true, other = _short([data.classes[data.test_labels[index]], data.classes[predicted]])
            axis.set_title(f"{true} → {other}\n({confidence:.0%})", fontsize=10)
        few = "" if len(found) == axes.size else f" (only {len(found)} were wrong)"
        figure.suptitle(f"{title}: true → predicted (confidence){few}")
    return figure


def unnormalise(batch: Tensor, data: Data) -> Tensor:
    """Turn a batch from ``batches`` (N, 3, H, W) back into uint8 images, exactly as they went in."""
    mean, std = (torch.tensor(v, device=batch.device).view(3, 1, 1) for v in (data.mean, data.std))
    return ((batch * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def confusion(record: dict[str, Any], title: str = "") -> Any:
    """The confusion matrix of a record, rows true, columns predicted, in percent of the true class."""
    from sklearn.metrics import ConfusionMatrixDisplay

    names = _short(record["classes"])
    side, few = min(20.0, max(5.0, 0.65 * len(names) + 1.5)), len(names) <= 30
    with panels(size=(side + 1, side)) as (figure, axis):
        axis.grid(False)
        look = {"cmap": "cividis", "values_format": ".0f", "xticks_rotation": 45, "text_kw": {"fontsize": 9}}
        ConfusionMatrixDisplay(_percent(record), display_labels=names).plot(include_values=few, ax=axis, **look)
        axis.set(xlabel="predicted", ylabel="true", title=f"{title or label(record['settings'])}: % of each true class")
    return figure


def per_class(records: list[dict[str, Any]], title: str = "") -> Any:
    """Accuracy of each class, a bar for each record."""
    names, width = _short(records[0]["classes"]), 0.8 / len(records)
    middle = np.arange(len(names)) - 0.4 + width / 2  # of the first record's bars
    with panels() as (figure, axis):
        for i, record in enumerate(records):
            look = {"color": color(record["settings"]), "hatch": ("", "//", "..", "xx", "--")[i % 5], "edgecolor": "white"}
            axis.bar(middle + i * width, _percent(record).diagonal(), width, label=label(record["settings"]), **look)
        axis.set_xticks(range(len(names)), names, rotation=20 if len(str(names)) > 60 else 0)
        axis.set(ylabel="accuracy (%)", ylim=(0, 100), title=title or f"{records[0]['data']}: accuracy by class")
    return figure


def _percent(record: dict[str, Any]) -> Any:
    """The confusion matrix (true, predicted) in percent of each true class; the diagonal is the accuracy."""
    counts = np.array(record["confusion"], dtype=float)
    return 100 * counts / counts.sum(1, keepdims=True).clip(1)


def _short(names: list[str]) -> list[str]:
    return [name if len(name) <= 24 else f"{name[:23]}…" for name in names]


@contextmanager
def panels(rows: int = 1, columns: int = 1, size: Any = (10, 4.4), **grid: Any) -> Iterator[tuple[Any, Any]]:
    """A figure in the course's style and its axes. Once drawn, it gets one legend below, if the first panel has labels."""
    with styled() as plt:
        figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", **grid)
        yield figure, axes
        handles, labels = figure.axes[0].get_legend_handles_labels()
        if labels:
            columns = 3 if max(map(len, labels)) < 32 else 2  # a longer name would be cut at the edge
            figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def bare(axis: Any) -> None:
    """Leave the labels of the axes, but no ticks, grid or frame."""
    axis.tick_params(length=0)
    axis.grid(False)
    axis.spines[:].set_visible(False)


@contextmanager
def styled() -> Iterator[Any]:
    """The course's look, for one picture only: a reader's own settings stay as they are."""
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        yield pyplot
