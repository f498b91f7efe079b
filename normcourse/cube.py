"""Who shares a mean with whom: the sets S_i, drawn from the axes that the code averages over."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from torch import Tensor

from normcourse import plot
from normcourse.norm import AXES, NORMS, shared_set
from normcourse.plot import COLORS

GRAY = "#f2f2f2"  # what is not in the set
OTHER = "#CC79A7"  # a set that belongs to none of the norms


def draw_cubes(sets: dict[str, tuple[int, ...]] = AXES) -> Any:
    """Draw a batch (4, 6, 2, 2) as a cube for each norm, with 2 groups.

    Coloured is the set S_i of the entry with the dot. ``sets`` gives axes of the view (N, G, C/G,
    H, W) to each norm, or to a title of one's own.
    """
    figure, axes = new_figure(len(sets), 2.3)
    for axis, (norm, averaged) in zip(axes, sets.items(), strict=True):
        mask = shared_set(averaged, (4, 6, 2, 2), 2, (0, 5, 1, 1))
        draw_cube(axis, mask, COLORS.get(norm, OTHER), NORMS.get(norm, norm))
        letters = [("N", "G", "C/G", "H", "W")[k] for k in averaged]
        over = ", ".join(letters).replace("G, C/G", "C")
        text = f"mean over {over}"
        axis.text(0.5, -0.02, text, transform=axis.transAxes, ha="center", va="top")
    return figure


def draw_cube(axis: Any, mask: Tensor, color: str, title: str) -> None:
    """Draw the visible faces of a batch (N, C, H, W) as a cube.

    C runs to the right, (H, W) upwards, N into the page.
    """
    cells = mask.flatten(2).numpy()  # (N, C, H*W)
    N, C, S = cells.shape
    n, c, s = np.arange(N + 1), np.arange(C + 1), np.arange(S + 1)
    front = c, s[:, None], cells[0].T
    top = c + 0.5 * n[:, None], S + 0.42 * n[:, None], cells[:, :, -1]
    right = C + 0.5 * n, s[:, None] + 0.42 * n, cells[:, -1].T
    look = {"edgecolor": "#555555", "linewidth": 0.8, "antialiased": True, "vmin": 0, "vmax": 1}
    colors = ListedColormap([GRAY, color])
    for x, y, inside in (front, top, right):
        axis.pcolormesh(*np.broadcast_arrays(x, y), inside, cmap=colors, **look)
    axis.plot(C - 0.5, S - 0.5, "ko", markersize=4)
    axis.text(C / 2, -0.25, "C", ha="center", va="top")
    axis.text(-0.25, S / 2, "H, W", ha="right", va="center", rotation=90)
    axis.text(C + N * 0.25 + 0.3, N * 0.21 - 0.15, "N", ha="left", va="top")
    limits = {"xlim": (-1.1, C + N * 0.5 + 0.2), "ylim": (-1.2, S + N * 0.42 + 0.1)}
    axis.set(title=title, aspect="equal", **limits)
    axis.axis("off")


def draw_maps(axis: Any, x: Tensor, title: str, **image: Any) -> None:
    """Draw a batch (N, C, H, W) laid flat, with white lines between its samples and channels."""
    N, C, H, W = x.shape
    axis.imshow(flat(x), **image)
    axis.hlines(H * np.arange(1, N) - 0.5, -0.5, C * W - 0.5, color="white", linewidth=2)
    axis.vlines(W * np.arange(1, C) - 0.5, -0.5, N * H - 0.5, color="white", linewidth=2)
    axis.set_title(title, fontsize=11)
    axis.set_xticks(W * np.arange(C) + W / 2 - 0.5, [f"c{c}" for c in range(C)])
    axis.set_yticks(H * np.arange(N) + H / 2 - 0.5, [f"n{n}" for n in range(N)])
    plot.bare(axis)


def flat(x: Tensor) -> Any:
    """Lay a batch (N, C, H, W) flat, samples down and channels across: (N*H, C*W)."""
    return x.permute(0, 2, 1, 3).flatten(2, 3).flatten(0, 1).numpy()


def write_numbers(axis: Any, values: Any, form: str, fontsize: int) -> None:
    """Write each number of a matrix where imshow drew its pixel."""
    for (i, j), value in np.ndenumerate(values):
        text = f"{value + 0.0:{form}}"  # + 0.0: no "-0"
        axis.text(j, i, text, ha="center", va="center", fontsize=fontsize)


def new_figure(columns: int, height: float) -> tuple[Any, Any]:
    """A figure as wide as a notebook's cell, and its axes in a row."""
    size = (8.5, height)
    figure, axes = plt.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)
    return figure, axes[0]


# --- the explorer ---------------------------------------------------------------------------------


def draw_entry(norm: str, N: int, C: int, G: int, n: int, c: int, h: int, w: int) -> Any:
    """Draw an entry of a batch (N, C, 2, 2) of small integers, and what its norm makes of it.

    Its set S_i, the mean and deviation of that, and the result.
    """
    x = (torch.arange(N * C * 4) * 7 % 10).float().reshape(N, C, 2, 2)
    mask = shared_set(AXES[norm], x.shape, G, (n, c, h, w))
    var, mean = torch.var_mean(x[mask], correction=0)
    entry = x[n, c, h, w]
    result = (entry - mean) / (var + 1e-5).sqrt()
    name = f"{NORMS[norm]}, G = {G}" if norm == "gn" else NORMS[norm]
    title = f"{name}: the set has {mask.sum()} entries, μ = {mean:.2f}, σ = {var.sqrt():.2f}"
    figure, (axis,) = new_figure(1, 3.8)
    colors = ListedColormap([GRAY, COLORS[norm]])
    title += f"; {entry:.0f} becomes {result:.2f}"
    draw_maps(axis, mask, title, cmap=colors, vmin=0, vmax=1, alpha=0.55)
    write_numbers(axis, flat(x), ".0f", 10)
    frame = {"markersize": 20, "markerfacecolor": "none", "markeredgewidth": 2}
    axis.plot(c * 2 + w, n * 2 + h, "ks", **frame)
    return figure


def explore() -> Any:
    """The explorer as a widget: choose a norm and a shape, click an entry, see who shares its mean.

    It works in the browser alone (explorer.mjs), so it needs no running kernel once it is shown.
    """
    import anywidget

    class Explorer(anywidget.AnyWidget):
        _esm = Path(__file__).with_name("explorer.mjs")

    return Explorer()
