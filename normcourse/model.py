"""Networks: the assignment's skeleton with any normalization, and the published reference designs."""

import copy
import math
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normcourse.data import CourseError
from normcourse.norm import divisors, norm_layer

MAX_PARAMETERS = 50_000  # the assignment asks for fewer


def _check(num_classes: int, dropout: float) -> None:
    """Raise CourseError for what torch.nn would take, or refuse without saying what is allowed."""
    if not isinstance(num_classes, int) or not 0 < num_classes <= 10_000:
        raise CourseError(f"num_classes is {num_classes!r}; allowed: 1 to 10,000")
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise CourseError(f"dropout is {dropout!r}; allowed: 0 up to 1, without 1")


class MirrorConv(nn.Conv2d):
    """A convolution that uses each of its learned filters twice: as it is, and mirrored left-right (Cohen & Welling 2016).

    Channels come in pairs: channel k + C/2 holds the mirror image of what channel k would hold, were the image mirrored.
    So a filter is mirrored by flipping its kernel and, unless it reads the image, by exchanging the pairs that it reads.
    The weight is (C_out/2, C_in/groups, K, K): twice the filters, or for the same parameters wider layers. Written for
    the image, 1x1 and depthwise convolutions; in_channels, but for the image's 3, and out_channels must be even.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.weight = nn.Parameter(self.weight[: self.out_channels // 2].detach().clone())

    def filters(self) -> Tensor:
        """All of its filters, (C_out, C_in/groups, K, K): the learned ones, then their mirror images."""
        pairs = 0 if self.in_channels == 3 else self.weight.shape[1] // 2  # of a depthwise filter's 1 input: none
        return torch.cat([self.weight, self.weight.flip(3).roll(pairs, 1)])

    def forward(self, x: Tensor) -> Tensor:  # (N, C_in, H, W) -> (N, C_out, H, W)
        return self._conv_forward(x, self.filters(), self.bias)


class ConvBlock(nn.Module):
    """Convolution -> norm, plus the input itself where ``skip`` (He et al. 2016) -> hard swish -> dropout.

    A 3x3 convolution here is depthwise-separable, unless its input is the image: a 3x3 filter for each channel, then
    a 1x1 convolution across them. It sees the same 3x3 window for about a ninth of the weights (Howard 2017). Hard
    swish, y * min(max(y + 3, 0), 6) / 6, is nearly ReLU, but smooth around 0 (Howard 2019, section 5.2).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, norm: str, num_groups: int, dropout: float):
        super().__init__()
        bias = norm == "none"  # under any norm there is none, so that only the norm differs
        layers: list[nn.Module] = []
        if kernel_size == 3 and in_channels > 3:
            layers = [MirrorConv(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False)]
            kernel_size = 1
        mixing = MirrorConv(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
        self.conv = nn.Sequential(*layers, mixing)
        self.norm = norm_layer(norm, out_channels, num_groups)
        self.dropout = nn.Dropout(dropout)
        self.skip = bool(layers) and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:  # (N, C_in, H, W) -> (N, C_out, H, W)
        y = self.norm(self.conv(x))
        if self.skip:
            y += x  # in place: no backward pass needs what the norm returned, and memory is time
        return self.dropout(F.hardswish(y))


class NormNet(nn.Module):
    """The assignment's network, C1 C2 c3 P1 C3 C4 C5 c6 P2 C7 C8 C9 GAP C10, in which only the norm varies.

    Takes normalised images (N, 3, H, W), H and W divisible by 4, and returns logits (N, num_classes). Every 3x3
    convolution with as many output as input channels (C4, C5, C8, C9) has a skip around it. Raises CourseError for an
    unknown norm, a num_groups that does not divide every width, or 50,000 parameters and more.
    """

    WIDTHS = {"C1": 24, "C2": 48, "c3": 32, "P1": 0, "C3": 96, "C4": 96, "C5": 96, "c6": 64, "P2": 0, "C7": 152, "C8": 152,
              "C9": 152}  # fmt: skip

    def __init__(self, norm: str = "bn", num_classes: int = 10, num_groups: int = 8, dropout: float = 0.0):
        super().__init__()
        _check(num_classes, dropout)
        common = math.gcd(*self.WIDTHS.values())  # of 0 and n it is n
        if norm == "gn" and (not isinstance(num_groups, int) or num_groups < 1 or common % num_groups):
            raise CourseError(f"num_groups={num_groups} does not divide every width of NormNet; allowed: {divisors(common)}")
        channels = 3
        for name, width in self.WIDTHS.items():
            if name[0] == "P":
                self.add_module(name, nn.MaxPool2d(2))
            else:
                kernel_size = 1 if name[0] == "c" else 3
                self.add_module(name, ConvBlock(channels, width, kernel_size, norm, num_groups, dropout))
                channels = width
        self.GAP = nn.AdaptiveAvgPool2d(1)
        self.C10 = nn.Conv2d(channels, num_classes, 1)
        if count_parameters(self) >= MAX_PARAMETERS:
            count = f"{num_classes} classes make {count_parameters(self):,} parameters"
            raise CourseError(f"{count}; the assignment allows fewer than {MAX_PARAMETERS:,}: use fewer classes")

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, num_classes)
        for layer in self.children():
            x = layer(x)
        return x.flatten(1)


def reference_net(norm: str, multiplier: int | None = None, num_classes: int = 10, dropout: float = 0.0) -> nn.Sequential:
    """The published designs, layer for layer; takes (N, 3, 32, 32), returns log-probabilities (N, num_classes).

    ``bn``, multiplier 1: 5,882 parameters. ``ln`` and ``gn`` were published with multiplier 2: 73,770 parameters, which
    breaks the assignment's limit (and the published "GN", GroupNorm(C, C), is Instance Norm). With multiplier 1 they
    have 18,842 and keep it; ``gn`` is then GroupNorm(4, C). Raises CourseError for anything else.
    """
    _check(num_classes, dropout)
    m = multiplier if multiplier is not None else 1 if norm == "bn" else 2
    if (norm, m) not in (("bn", 1), ("ln", 1), ("ln", 2), ("gn", 1), ("gn", 2)):
        designs = "bn 1, ln 1 or 2, gn 1 or 2"
        raise CourseError(f"no reference design for norm {norm!r}, multiplier {multiplier}; there are {designs}")

    def block(*convolutions: nn.Conv2d) -> nn.Sequential:
        channels = convolutions[-1].out_channels
        kind = "in" if (norm, m) == ("gn", 2) else norm
        return nn.Sequential(*convolutions, norm_layer(kind, channels, num_groups=4), nn.Dropout(dropout), nn.ReLU())

    def squeeze() -> nn.Sequential:  # 16m -> 32m -> 8m channels
        groups = 16 if norm == "bn" else 1  # depthwise in the BN design, dense in the others
        wide = nn.Conv2d(16 * m, 32 * m, 3, padding=1, groups=groups, bias=False)
        return block(wide, nn.Conv2d(32 * m, 8 * m, 1, bias=False))

    def expand(dilation: int = 1) -> nn.Sequential:  # 8m -> 16m channels; the dilated one turns 8 x 8 into 6 x 6
        return block(nn.Conv2d(8 * m, 16 * m, 3, padding=1, dilation=dilation, bias=False))

    layers = {
        "block1": block(nn.Conv2d(3, 16 * m, 3, padding=1)), "block2": squeeze(), "pool1": nn.MaxPool2d(2),
        "block3": expand(), "block4": squeeze(), "pool2": nn.MaxPool2d(2),
        "block5": expand(dilation=2), "block6": squeeze(), "block7": expand(),
        "pool3": nn.AvgPool2d(6), "flatten": nn.Flatten(), "linear": nn.Linear(16 * m, num_classes),
        "log_softmax": nn.LogSoftmax(dim=1),
    }  # fmt: skip
    return nn.Sequential(OrderedDict(layers))


def build(net: str, norm: str, num_classes: int = 10, num_groups: int = 8, multiplier: int | None = None,
          dropout: float = 0.0) -> nn.Module:  # fmt: skip
    """Build the network that a record names: ``normnet`` or ``reference``."""
    if net == "normnet":
        return NormNet(norm, num_classes, num_groups, dropout)
    if net == "reference":
        return reference_net(norm, multiplier, num_classes, dropout)
    raise CourseError(f"unknown network {net!r}; allowed: normnet, reference")


def count_parameters(model: nn.Module) -> int:
    """Number of learned parameters; running statistics are buffers and do not count."""
    return sum(p.numel() for p in model.parameters())


class Field(NamedTuple):
    """One row of the receptive-field table, in pixels of the input image."""

    layer: str
    kind: str
    channels: int  # of its output
    size: int  # height = width of its output
    jump: int  # distance of two neighbouring outputs
    receptive_field: int


def receptive_fields(model: nn.Module, size: int = 32) -> list[Field]:
    """The receptive field after each convolution and pooling, along the longest path (Araujo et al. 2019, eq. 2).

    Read from the modules as an image passes: the field grows by (kernel - 1) * dilation * jump, so a 2x2 pool adds its
    jump and does not double anything; the jump is multiplied by the stride.
    """
    rows: list[Field] = []

    def visit(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        kernel, stride, dilation = _window(layer, x.shape[-1])
        jump, field = (rows[-1].jump, rows[-1].receptive_field) if rows else (1, 1)
        field += (kernel - 1) * dilation * jump
        rows.append(Field(name, type(layer).__name__, y.shape[1], y.shape[-1], jump * stride, field))

    model, parameter = copy.deepcopy(model).eval(), next(model.parameters())
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)):
            layer.register_forward_hook(lambda layer, x, y, name=name: visit(name, layer, x[0], y))
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype))
    return rows


def _window(layer: Any, size: int) -> tuple[int, int, int]:
    """Kernel, stride and dilation of a layer along one side; an adaptive pool to 1 x 1 sees its whole input."""
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        return size, size, 1
    sides = (layer.kernel_size, layer.stride, getattr(layer, "dilation", 1))
    kernel, stride, dilation = (side[0] if isinstance(side, tuple) else side for side in sides)
    return kernel, stride, dilation
