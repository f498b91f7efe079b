"""Pictures of results, of images and of activations, in one colour-blind-safe style.

Each function that draws returns a Figure; ``show`` displays it in a notebook.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normcourse.data import Data
from normcourse.norm import NORMS
from normcourse.results import Record, label

# Okabe & Ito's palette, told apart under the common kinds of colour blindness.
COLORS = {"bn": "#0072B2", "ln": "#E69F00", "gn": "#D55E00", "in": "#009E73", "none": "#000000"}
LN_OF_ONE = "#CC79A7"  # the reference designs' Layer Norm with m = 1
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a class may be called $x
    "text.usetex": False,  # whatever a reader's matplotlibrc says
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.dpi": 100,
    "lines.linewidth": 2,
}
HATCHES = ("", "//", "..", "xx", "--")


@contextmanager
def styled() -> Iterator[Any]:
    """The course's look, for one picture only: a reader's own settings stay as they are."""
    from matplotlib import pyplot  # slow to import, and only drawing needs it

    with pyplot.rc_context(STYLE):
        yield pyplot


@contextmanager
def panels(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (10, 4.4), **grid: Any
) -> Iterator[tuple[Any, Any]]:
    """A figure in the course's style and its axes.

    Once drawn, it gets one legend below, if the first panel has labels.
    """
    with styled() as plt:
        figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", **grid)
        yield figure, axes
        handles, labels = figure.axes[0].get_legend_handles_labels()
        if labels:
            columns = 3 if max(map(len, labels)) < 32 else 2  # a longer name would be cut
            figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def bare(axis: Any) -> None:
    """Leave the labels of the axes, but no ticks, grid or frame."""
    axis.tick_params(length=0)
    axis.grid(False)
    axis.spines[:].set_visible(False)


def show(figure: Any, alt: str, photo: bool = False) -> None:
    """Display a figure, small: as a PNG of 256 colours, photos as a JPEG.

    Below it stands the description ``alt``, which is its text form, too.
    """
    from IPython.display import display
    from matplotlib import pyplot
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=100)
    pyplot.close(figure)
    image = Image.open(drawn).convert("RGB")
    kind = "jpeg" if photo else "png"
    if not photo:
        image = image.quantize(256)
    image.save(small, kind, quality=90, optimize=True)
    picture = {f"image/{kind}": base64.b64encode(small.getvalue()).decode(), "text/plain": alt}
    display(picture, raw=True, metadata={f"image/{kind}": {"alt": alt}})
    display({"text/markdown": f"*{alt}*", "text/plain": alt}, raw=True)  # JupyterLab drops alt


# --- records --------------------------------------------------------------------------------------


def color(settings: dict[str, Any]) -> str:
    """The norm's colour, the same in every picture.

    Layer Norm with m = 1 has a colour of its own; the published "GN" has Instance Norm's.
    """
    net, norm, multiplier = settings["net"], settings["norm"], settings["multiplier"]
    if net == "reference" and (norm, multiplier) == ("ln", 1):
        return LN_OF_ONE
    if net == "reference" and norm == "gn" and multiplier != 1:  # it is Instance Norm
        return COLORS["in"]
    return COLORS[norm]


def curves(records: list[Record], title: str = "") -> Any:
    """Accuracy (left) and loss (right, log scale) by epoch.

    Solid lines: evaluated; dashed: training, as it was on the way.
    """
    held_out = "val" if records[0]["settings"]["validate"] else "test"
    with panels(1, 2) as (figure, axes):
        for record in records:
            draw_curve(axes[0], record, "accuracy")
            draw_curve(axes[1], record, "loss")
        axes[0].set_ylabel("accuracy (%)")
        axes[1].set_ylabel("cross-entropy (log scale)")
        for axis in axes:
            axis.set_xlabel("epoch")
            axis.locator_params(axis="x", integer=True)
        axes[1].set_yscale("log", subs=(2, 3, 5))  # the minor ticks, between 1 and 10
        axes[1].yaxis.set_major_formatter("{x:g}")
        axes[1].yaxis.set_minor_formatter("{x:g}")
        figure.suptitle(f"{title or records[0]['data']} (solid: {held_out}, dashed: train)")
    return figure


def draw_curve(axis: Any, record: Record, kind: str) -> None:
    """A solid and a dashed line by epoch, of "accuracy" or "loss"."""
    history, settings = record["history"], record["settings"]
    held_out = "val" if settings["validate"] else "test"
    epochs = range(1, len(history) + 1)
    look = {"color": color(settings), "marker": "o" if len(history) == 1 else ""}
    evaluated = [epoch[f"{held_out}_{kind}"] for epoch in history]
    train = [epoch[f"train_{kind}"] for epoch in history]
    axis.plot(epochs, evaluated, "-", label=label(settings), **look)
    axis.plot(epochs, train, "--", lw=1.2, **look)


def confusion(record: Record, title: str = "") -> Any:
    """The confusion matrix of a record, rows true, columns predicted, in % of the true class."""
    from sklearn.metrics import ConfusionMatrixDisplay

    names = shorten(record["classes"])
    side = min(20.0, max(5.0, 0.65 * len(names) + 1.5))
    with panels(size=(side + 1, side)) as (figure, axis):
        axis.grid(False)
        matrix = ConfusionMatrixDisplay(percent_of_class(record), display_labels=names)
        look = {"cmap": "cividis", "xticks_rotation": 45, "text_kw": {"fontsize": 9}}
        few = len(names) <= 30
        matrix.plot(ax=axis, include_values=few, values_format=".0f", **look)
        title = title or label(record["settings"])
        axis.set(xlabel="predicted", ylabel="true", title=f"{title}: % of each true class")
    return figure


def per_class(records: list[Record], title: str = "") -> Any:
    """Accuracy of each class, a bar for each record."""
    names = shorten(records[0]["classes"])
    width = 0.8 / len(records)
    with panels() as (figure, axis):
        for i, record in enumerate(records):
            settings, height = record["settings"], percent_of_class(record).diagonal()
            middle = np.arange(len(names)) - 0.4 + (i + 0.5) * width
            hatch = HATCHES[i % len(HATCHES)]
            look = {"color": color(settings), "hatch": hatch, "edgecolor": "white"}
            axis.bar(middle, height, width, label=label(settings), **look)
        named = range(0, len(names), 1 + len(names) // 25)  # of 100 classes every fifth
        axis.set_xticks(named, names[:: named.step], rotation=20 if len(str(names)) > 60 else 0)
        title = title or f"{records[0]['data']}: accuracy by class"
        axis.set(ylabel="accuracy (%)", ylim=(0, 100), title=title)
    return figure


def percent_of_class(record: Record) -> Any:
    """The confusion matrix (true, predicted) in percent of each true class.

    Its diagonal is the accuracy.
    """
    counts = np.array(record["confusion"], dtype=float)
    return 100 * counts / counts.sum(1, keepdims=True).clip(1)


def shorten(names: Sequence[str]) -> list[str]:
    """Names of at most 24 letters."""
    return [name if len(name) <= 24 else f"{name[:23]}…" for name in names]


def seed_line(
    axis: Any, places: Sequence[float], columns: Sequence[Sequence[float]], **look: Any
) -> None:
    """A line through the mean of each column, and a small dot for each seed.

    A column is what all seeds reached at one place.
    """
    dot = {"marker": look.get("marker", "o"), "color": look["color"], "ms": 3, "alpha": 0.6}
    for place, column in zip(places, columns, strict=True):
        axis.plot([place] * len(column), column, ls="", **dot)
    axis.plot(places, [mean(column) for column in columns], **look)


# --- images and activations -----------------------------------------------------------------------


def misclassified(found: list[tuple[int, int, float]], data: Data, title: str) -> Any:
    """A 5x2 grid of wrongly classified test images, each titled true -> predicted (confidence).

    The images are shown as they were stored (uint8), so nothing has to be un-normalized and nothing
    is clipped.
    """
    with panels(2, 5, (10, 5)) as (figure, axes):
        for axis in axes.flat:
            axis.axis("off")
        for axis, (index, predicted, confidence) in zip(axes.flat, found, strict=False):
            axis.imshow(data.test_images[index].permute(1, 2, 0).numpy())  # (H, W, C)
            true = data.classes[data.test_labels[index]]
            true, other = shorten([true, data.classes[predicted]])
            axis.set_title(f"{true} → {other}\n({confidence:.0%})", fontsize=10)
        few = "" if len(found) == axes.size else f" (only {len(found)} were wrong)"
        figure.suptitle(f"{title}: true → predicted (confidence){few}")
    return figure


def histograms(stages: dict[str, dict[str, tuple[Tensor, Tensor]]], norm: str) -> Any:
    """Histograms of ``norm.activations``.

    A row for each stage of the training, a column for each layer. Grey is what goes into the norm,
    coloured what comes out.
    """
    columns = max(map(len, stages.values()))
    size = (10, 2.4 * len(stages) + 0.4)
    with panels(len(stages), columns, size, squeeze=False) as (figure, axes):
        for row, (stage, layers) in zip(axes, stages.items(), strict=True):
            row[0].set_ylabel(stage)
            for axis, (name, pair) in zip(row, layers.items(), strict=True):
                draw_histograms(axis, *pair, COLORS[norm])
                axis.set(title=name, yticks=[])
        figure.supxlabel(f"grey: into the norm, coloured: out of it ({NORMS[norm]})")
    return figure


def draw_histograms(axis: Any, before: Tensor, after: Tensor, color: str) -> None:
    """Two histograms on one axis, each to its own height."""
    limit = 2.5 * max(before.std().item(), after.std().item())
    places = torch.linspace(-limit, limit, 100)
    grey, coloured = (values.histc(100, -limit, limit) for values in (before, after))
    axis.fill_between(places, grey / grey.max(), color="0.75")
    axis.plot(places, coloured / coloured.max(), color=color)
