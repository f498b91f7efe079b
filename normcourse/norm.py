"""The normalizations: which entries share a mean and a variance, and the layer that a name means.

To add a norm, give it a name in NORMS, its axes in AXES, a layer in ``norm_layer`` (and its class
in ``exchange_norms``), a colour in plot.COLORS and a learning rate in train.LEARNING_RATES.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from normcourse.errors import CourseError

NORMS = {
    "bn": "Batch Norm",
    "ln": "Layer Norm",
    "gn": "Group Norm",
    "in": "Instance Norm",
    "none": "no norm",
}
# The axes of the view (N, G, C/G, H, W) that share one mean and one variance: the whole difference
# between the norms.
AXES = {"bn": (0, 3, 4), "ln": (1, 2, 3, 4), "in": (3, 4), "gn": (2, 3, 4)}


def norm_layer(norm: str, channels: int, num_groups: int = 8) -> nn.Module:
    """The normalization of (N, channels, H, W) that ``norm`` names.

    With a scale and a shift per channel. ``bn`` is Ioffe & Szegedy 2015, section 3.2; ``gn`` is Wu
    & He 2018, section 3. ``ln`` is GroupNorm(1, C): each sample over (C, H, W). ``in`` is
    GroupNorm(C, C): each channel of a sample. Raises CourseError for an unknown norm, or a
    num_groups that does not divide the channels.
    """
    if norm == "bn":
        return nn.BatchNorm2d(channels)
    if norm == "ln":
        return nn.GroupNorm(1, channels)
    if norm == "gn":
        check_groups(num_groups, channels, f"{channels} channels")
        return nn.GroupNorm(num_groups, channels)
    if norm == "in":
        return nn.GroupNorm(channels, channels)
    if norm == "none":
        return nn.Identity()
    raise CourseError(f"unknown norm {norm!r}; allowed: {', '.join(NORMS)}")


def check_groups(num_groups: int, channels: int, of_what: str) -> None:
    """Raise CourseError unless num_groups divides the channels; ``of_what`` says whose they are."""
    if not isinstance(num_groups, int) or num_groups < 1 or channels % num_groups:
        allowed = ", ".join(str(d) for d in range(1, channels + 1) if channels % d == 0)
        message = f"num_groups={num_groups} does not divide {of_what}"
        raise CourseError(f"{message}; allowed here: {allowed}")


# --- who shares a statistic -----------------------------------------------------------------------


def grouped(x: Tensor, num_groups: int) -> Tensor:
    """View a batch (N, C, H, W) as (N, G, C/G, H, W). Raises CourseError unless G divides C."""
    n, c, h, w = x.shape
    check_groups(num_groups, c, f"{c} channels")
    return x.reshape(n, num_groups, c // num_groups, h, w)


def shared_set(
    axes: Sequence[int], shape: Sequence[int], num_groups: int, entry: Sequence[int]
) -> Tensor:
    """S_i (Wu & He 2018, equation 2): the entries that share the statistics of ``entry``.

    A boolean (N, C, H, W). ``axes`` are some of the view's (N, G, C/G, H, W), ``entry`` is (n, c,
    h, w).
    """
    marker = torch.zeros(*shape)
    marker[tuple(entry)] = 1
    z = grouped(marker, num_groups)
    spread = z.amax(tuple(axes), keepdim=True)  # the mark, over the axes that are averaged
    return spread.expand_as(z).reshape(*shape) > 0


# --- the norms of a network -----------------------------------------------------------------------


def exchange_norms(model: nn.Module, make: Callable[[str, nn.Module], nn.Module]) -> nn.Module:
    """Replace every Batch and Group Norm by ``make(name, norm)``; changes the model in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, make(name, module))
    return model


def activations(
    model: nn.Module, x: Tensor, blocks: Sequence[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """What goes into the norm of each named block, and what comes out, as x passes.

    x is (N, 3, H, W), the others (N, C, H, W). In training mode, and on a copy: the model and its
    running statistics stay as they are.
    """
    model = copy.deepcopy(model).train()
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def remember(block: str, _: nn.Module, x: tuple[Tensor], y: Tensor) -> None:
        found[block] = (x[0].clone(), y.clone())

    for block in blocks:
        model.get_submodule(f"{block}.norm").register_forward_hook(partial(remember, block))
    with torch.no_grad():
        model(x)
    return found
