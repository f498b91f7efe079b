"""What one output of a network sees of the image: the oracle for the published designs."""

import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Field(NamedTuple):
    """One row of the receptive-field table, in pixels of the input image."""

    layer: str
    kind: str
    channels: int  # of its output
    size: int  # height = width of its output
    jump: int  # distance of two neighbouring outputs
    receptive_field: int


def receptive_fields(model: nn.Module, size: int = 32) -> list[Field]:
    """The receptive field after each convolution and pooling (Araujo et al. 2019, eq. 2).

    Along the longest path. Read from the modules as an image passes: the field grows by (kernel -
    1) * dilation * jump, so a 2x2 pool adds its jump and does not double anything; the jump is
    multiplied by the stride.
    """
    rows: list[Field] = []

    def visit(name: str, layer: nn.Module, x: tuple[Tensor], y: Tensor) -> None:
        kernel, stride, dilation = window(layer, x[0].shape[-1])
        jump, field = (rows[-1].jump, rows[-1].receptive_field) if rows else (1, 1)
        field += (kernel - 1) * dilation * jump
        kind, channels, size = type(layer).__name__, y.shape[1], y.shape[-1]
        rows.append(Field(name, kind, channels, size, jump * stride, field))

    model, parameter = copy.deepcopy(model).eval(), next(model.parameters())
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d | nn.AdaptiveAvgPool2d):
            layer.register_forward_hook(partial(visit, name))
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype))
    return rows


def window(layer: Any, size: int) -> tuple[int, int, int]:
    """Kernel, stride and dilation of a layer along one side.

    An adaptive pool to 1 x 1 sees its whole input.
    """
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        return size, size, 1
    dilation = getattr(layer, "dilation", 1)  # an average pool has none
    return one_side(layer.kernel_size), one_side(layer.stride), one_side(dilation)


def one_side(sides: int | tuple[int, int]) -> int:
    """The height where torch was given a height and a width."""
    return sides[0] if isinstance(sides, tuple) else sides
