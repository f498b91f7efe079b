"""Who shares a mean with whom: the sets S_i of BN, LN, IN and GN, drawn from the axes that the code averages over.

Everything works on the view (N, G, C/G, H, W) of a batch (N, C, H, W).
"""

# ruff: noqa: N803, N806  (N, C, G, H, W are the names that the field uses)
import base64
import io
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle

from normcourse import plot
from normcourse.norm import NORMS

# The axes of the view (N, G, C/G, H, W) that share one mean and one variance: the whole difference between the norms.
AXES = {"BN": (0, 3, 4), "LN": (1, 2, 3, 4), "IN": (3, 4), "GN": (2, 3, 4)}
NAMES, COLORS = ({key.upper(): value for key, value in table.items()} for table in (NORMS, plot.COLORS))
GRAY = "#f2f2f2"  # what is not in the set
TOY = torch.tensor([[1.0, 5.0, 1.0, 5.0], [3.0, 5.0, 7.0, 9.0], [5.0, 2.0, 4.0, 1.0]])  # (N, d) = (3, 4)


def grouped(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    """View a batch (N, C, H, W) as (N, G, C/G, H, W). C must be a multiple of G."""
    N, C, H, W = x.shape
    if C % num_groups:
        raise ValueError(f"C = {C} channels cannot be split into {num_groups} equal groups; pick a divisor of {C}")
    return x.reshape(N, num_groups, C // num_groups, H, W)


def shared_set(axes: tuple, shape: tuple, num_groups: int, entry: tuple) -> torch.Tensor:
    """S_i as a boolean (N, C, H, W): the entries that share the mean and variance of ``entry`` = (n, c, h, w)."""
    marker = torch.zeros(shape)
    marker[entry] = 1
    z = grouped(marker, num_groups)
    return z.amax(axes, keepdim=True).expand_as(z).reshape(shape) > 0  # spread the mark over the averaged axes


def toy_images() -> torch.Tensor:
    """Three images of four channels, (3, 4, 8, 8): each sample has its own brightness, each channel its own range."""
    h, w = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
    maps = torch.stack([w, h, torch.sign(h * w), 1 - 2 * (h * h + w * w)])  # (C, H, W)
    contrast, brightness = torch.tensor([1.0, 0.5, 1.5]), torch.tensor([0.0, -3.0, 3.0])  # per sample
    scale, offset = torch.tensor([0.5, 1.0, 1.0, 2.0]), torch.tensor([-3.0, 1.0, 3.0, -1.0])  # per channel
    x = maps * contrast.view(3, 1, 1, 1) * scale.view(1, 4, 1, 1)
    return x + brightness.view(3, 1, 1, 1) + offset.view(1, 4, 1, 1)


def show(fig, alt: str, photo: bool = False) -> None:
    """Display a figure, small: as a PNG of 256 colours, photos as a JPEG. Its text form is the description."""
    from IPython.display import display
    from PIL import Image

    drawn, small, kind = io.BytesIO(), io.BytesIO(), "jpeg" if photo else "png"
    fig.savefig(drawn, dpi=100)
    plt.close(fig)
    image = Image.open(drawn).convert("RGB")
    small_image = image if photo else image.quantize(256)
    small_image.save(small, kind, quality=90, optimize=True)
    picture = {f"image/{kind}": base64.b64encode(small.getvalue()).decode(), "text/plain": alt}
    display(picture, raw=True, metadata={f"image/{kind}": {"alt": alt}})


def _figure(rows, columns, height, **grid):
    fig, axes = plt.subplots(rows, columns, figsize=(8.5, height), layout="constrained", squeeze=False, **grid)
    return fig, axes.flatten()


def _write_numbers(ax, values: np.ndarray, form: str, fontsize: int) -> None:
    """Write each number of a matrix where imshow drew its pixel."""
    for (i, j), value in np.ndenumerate(values):
        ax.text(j, i, f"{value + 0.0:{form}}", ha="center", va="center", fontsize=fontsize)  # + 0.0: no "-0"


def draw_table(ax, values: torch.Tensor, norm: str, title: str) -> None:
    """Draw a batch (N, d) as a table; the sets of ``norm`` are framed and carry their mean and standard deviation."""
    (N, d), axis = values.shape, 0 if norm == "BN" else 1
    low, high = values.min().item(), values.max().item()
    ax.imshow(values.numpy(), cmap="Greys", vmin=low - 1, vmax=high + 2 * (high - low))
    _write_numbers(ax, values.numpy(), ".0f" if values.equal(values.round()) else ".2f", 11)
    for k, (mean, std) in enumerate(zip(values.mean(axis), values.std(axis, correction=0), strict=True)):
        corner, size, place = (k - 0.44, -0.44), (0.88, N - 0.12), {"x": k, "y": N - 0.42, "ha": "center", "va": "top"}
        if norm == "LN":
            corner, size, place = (-0.44, k - 0.44), (d - 0.12, 0.88), {"x": d - 0.35, "y": k, "va": "center"}
        ax.add_patch(Rectangle(corner, *size, fill=False, edgecolor=COLORS[norm], linewidth=2.5))
        ax.text(s=f"μ = {mean.round() + 0.0:.0f}\nσ = {std:.2f}", fontsize=9, **place)
    ax.set_title(title, fontsize=11)
    ax.set(xticks=[], yticks=range(N), yticklabels=[f"sample {n}" for n in range(N)])
    ax.set(xlim=(-0.5, d + 0.5), ylim=(N - 0.5 + 0.7 * (norm == "BN"), -0.5))
    plot.bare(ax)


def draw_toy_batch(x: torch.Tensor = TOY):
    """Draw the toy batch before and after BN (a statistic per column) and LN (a statistic per row)."""
    fig, ax = _figure(2, 2, 5.0, height_ratios=[3.7, 3])
    for i, (norm, axis, line) in enumerate([("BN", 0, "column (feature)"), ("LN", 1, "row (sample)")]):
        x_hat = (x - x.mean(axis, keepdim=True)) / x.std(axis, correction=0, keepdim=True)
        draw_table(ax[2 * i], x, norm, f"{NAMES[norm]}: one μ, σ per {line}")
        draw_table(ax[2 * i + 1], x_hat, norm, f"after {NAMES[norm]}")
    return fig


def draw_cube(ax, mask: torch.Tensor, color: str, title: str) -> None:
    """Draw the visible faces of a batch (N, C, H, W) as a cube: C to the right, (H, W) upwards, N into the page."""
    cells = mask.flatten(2).numpy()  # (N, C, H*W)
    N, C, S = cells.shape
    n, c, s = (np.arange(size + 1) for size in cells.shape)
    front = c, s[:, None], cells[0].T
    top = c + 0.5 * n[:, None], S + 0.42 * n[:, None], cells[:, :, -1]
    right = C + 0.5 * n, s[:, None] + 0.42 * n, cells[:, -1].T
    look = {"edgecolor": "#555555", "linewidth": 0.8, "antialiased": True}
    for x, y, inside in (front, top, right):
        ax.pcolormesh(*np.broadcast_arrays(x, y), inside, cmap=ListedColormap([GRAY, color]), vmin=0, vmax=1, **look)
    ax.plot(C - 0.5, S - 0.5, "ko", markersize=4)
    ax.text(C / 2, -0.25, "C", ha="center", va="top")
    ax.text(-0.25, S / 2, "H, W", ha="right", va="center", rotation=90)
    ax.text(C + N * 0.25 + 0.3, N * 0.21 - 0.15, "N", ha="left", va="top")
    ax.set(title=title, xlim=(-1.1, C + N * 0.5 + 0.2), ylim=(-1.2, S + N * 0.42 + 0.1), aspect="equal")
    ax.axis("off")


def draw_cubes(sets: dict = AXES):
    """Draw a batch (4, 6, 2, 2) as a cube for each norm, with 2 groups; coloured is the set S_i of the entry with the dot."""
    fig, ax = _figure(1, len(sets), 2.3)
    for a, (norm, axes) in zip(ax, sets.items(), strict=True):
        mask = shared_set(axes, (4, 6, 2, 2), 2, (0, 5, 1, 1))
        draw_cube(a, mask, COLORS.get(norm, "#CC79A7"), NAMES.get(norm, norm))
        over = ", ".join(("N", "G", "C/G", "H", "W")[k] for k in axes).replace("G, C/G", "C")
        a.text(0.5, -0.02, f"mean over {over}", transform=a.transAxes, ha="center", va="top")
    return fig


def _flat(x: torch.Tensor) -> np.ndarray:
    """Lay a batch (N, C, H, W) flat, samples down and channels across: (N*H, C*W)."""
    return x.permute(0, 2, 1, 3).flatten(2, 3).flatten(0, 1).numpy()


def draw_maps(ax, x: torch.Tensor, title: str, **image) -> None:
    """Draw a batch (N, C, H, W) laid flat, with white lines between its samples and channels."""
    N, C, H, W = x.shape
    ax.imshow(_flat(x), **image)
    ax.hlines([n * H - 0.5 for n in range(1, N)], -0.5, C * W - 0.5, color="white", linewidth=2)
    ax.vlines([c * W - 0.5 for c in range(1, C)], -0.5, N * H - 0.5, color="white", linewidth=2)
    ax.set_title(title, fontsize=11)
    ax.set(xticks=[c * W + W / 2 - 0.5 for c in range(C)], xticklabels=[f"c{c}" for c in range(C)])
    ax.set(yticks=[n * H + H / 2 - 0.5 for n in range(N)], yticklabels=[f"n{n}" for n in range(N)])
    plot.bare(ax)


def draw_four_ways(x: torch.Tensor):
    """Draw a batch (N, C, H, W) before and after each norm, with 2 groups; framed is the set S_i of one entry."""
    fig, ax = _figure(2, 3, 4.9)
    draw_maps(ax[0], x, "before", cmap="gray")
    note = "rows n: samples\ncolumns c: channels\n\nframe: one set S_i\n\nblack to white\nafter a norm: ±2.5"
    ax[3].text(0.5, 0.5, note, ha="center", va="center")
    ax[3].axis("off")
    z = grouped(x, 2)
    for a, (norm, axes) in zip(ax[[1, 2, 4, 5]], AXES.items(), strict=True):
        var, mean = torch.var_mean(z, axes, correction=0, keepdim=True)
        x_hat = ((z - mean) / (var + 1e-5).sqrt()).reshape(x.shape)
        draw_maps(a, x_hat, f"after {NAMES[norm]}", cmap="gray", vmin=-2.5, vmax=2.5)
        rows, columns = _flat(shared_set(axes, x.shape, 2, (0, 3, 0, 0))).nonzero()
        corner, size = (columns.min() - 0.5, rows.min() - 0.5), (len(set(columns)), len(set(rows)))
        a.add_patch(Rectangle(corner, *size, fill=False, edgecolor=COLORS[norm], linewidth=3.5, clip_on=False, zorder=3))
    return fig


def draw_entry(norm: str, N: int, C: int, G: int, n: int, c: int, h: int, w: int):
    """Draw one entry of a batch (N, C, 2, 2) of small integers: its set S_i, its mean and deviation, the result."""
    x = (torch.arange(N * C * 4) * 7 % 10).float().reshape(N, C, 2, 2)
    mask = shared_set(AXES[norm], x.shape, G, (n, c, h, w))
    mean, std = x[mask].mean(), x[mask].std(correction=0)
    result = (x[n, c, h, w] - mean) / (std.square() + 1e-5).sqrt()
    fig, (ax,) = _figure(1, 1, 3.8)
    title = f"{NAMES[norm]}{f', G = {G}' if norm == 'GN' else ''}: the set has {mask.sum()} entries, μ = {mean:.2f}, "
    title += f"σ = {std:.2f}; {x[n, c, h, w]:.0f} becomes {result:.2f}"
    draw_maps(ax, mask, title, cmap=ListedColormap([GRAY, COLORS[norm]]), vmin=0, vmax=1, alpha=0.55)
    _write_numbers(ax, _flat(x), ".0f", 10)
    ax.plot(c * 2 + w, n * 2 + h, "ks", markersize=20, markerfacecolor="none", markeredgewidth=2)
    return fig


def explore():
    """Sliders over :func:`draw_entry`; needs ipywidgets and a running kernel. G offers the divisors of C only."""
    import ipywidgets as widgets
    from IPython.display import display

    norm = widgets.ToggleButtons(options=[(NAMES[k], k) for k in AXES])
    N, C = widgets.IntSlider(3, 1, 4, description="N"), widgets.IntSlider(6, 1, 8, description="C")
    G = widgets.Dropdown(options=[2], description="G (GN)")
    at = {k: widgets.IntSlider(0, 0, 1, description=k) for k in "nchw"}

    def limits(*_):
        before = G.value
        G.options = [g for g in range(1, C.value + 1) if C.value % g == 0]
        G.value = max(g for g in G.options if g <= before)
        at["n"].max, at["c"].max = N.value - 1, C.value - 1

    def draw(norm, N, C, G, n, c, h, w):  # while N or C moves, n and c may still point beyond the new shape
        show(draw_entry(norm, N, C, G, min(n, N - 1), min(c, C - 1), h, w), "the chosen entry and its set")

    limits()
    for slider in (N, C):
        slider.observe(limits, "value")
    picture = widgets.interactive_output(draw, {"norm": norm, "N": N, "C": C, "G": G, **at})
    display(widgets.VBox([norm, widgets.HBox([N, C, G]), widgets.HBox(list(at.values())), picture]))


def draw_choice():
    """Draw which norm when: questions down the left, the answer to a yes on the right."""
    steps = [
        ("Tokens or sequences?\n(transformer, recurrent net)", "LN", "Layer Norm over the features\n(or RMSNorm)"),
        ("Should the contrast of each\nimage go? (style transfer)", "IN", "Instance Norm"),
        ("A convnet, 16 or more images\nper device, which may mix?", "BN", "Batch Norm\n(mind train and eval)"),
    ]
    fig, (ax,) = _figure(1, 1, 4.2)

    def box(x, y, text, color):
        ax.add_patch(Rectangle((x, y - 0.3), 0.42, 0.6, fill=False, edgecolor=color, linewidth=2.5))
        ax.text(x + 0.21, y, text, ha="center", va="center", fontsize=11)

    for k, (question, norm, answer) in enumerate(steps):
        box(0, -k, question, "#555555")
        ax.annotate("", (0.575, -k), (0.425, -k), arrowprops={"arrowstyle": "->"})
        ax.text(0.5, -k + 0.06, "yes", ha="center", va="bottom")
        box(0.58, -k, answer, COLORS[norm])
        ax.annotate("", (0.21, -k - 0.69), (0.21, -k - 0.31), arrowprops={"arrowstyle": "->"})
        ax.text(0.225, -k - 0.5, "no", ha="left", va="center")
    box(0, -len(steps), "Group Norm\n(32 groups, fewer if C is small)", COLORS["GN"])
    ax.set(xlim=(-0.01, 1.01), ylim=(-3.4, 0.4))
    ax.axis("off")
    return fig


def save_figures(folder: str | Path) -> list[Path]:
    """Write the cube's figures to ``folder`` and return their paths."""
    figures = {"toy_batch": draw_toy_batch(), "cube": draw_cubes(), "four_ways": draw_four_ways(toy_images())}
    figures |= {"which_norm": draw_choice(), "explorer": draw_entry("GN", 3, 6, 2, 1, 4, 0, 1)}
    return [Path(folder, plot.save(fig, Path(folder, f"{name}.png"))) for name, fig in figures.items()]
