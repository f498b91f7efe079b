"""Networks: the assignment's skeleton with any normalization, and the published designs."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normcourse.errors import CourseError
from normcourse.norm import check_groups, norm_layer

MAX_PARAMETERS = 50_000  # the assignment asks for fewer


def check_network(num_classes: int, dropout: float) -> None:
    """Raise CourseError for what torch.nn would accept silently or refuse unclearly."""
    if not isinstance(num_classes, int) or not 0 < num_classes <= 10_000:
        raise CourseError(f"num_classes is {num_classes!r}; allowed: 1 to 10,000")
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise CourseError(f"dropout is {dropout!r}; allowed: at least 0, below 1")


class MirrorConv(nn.Conv2d):
    """A convolution that uses each learned filter twice (Cohen & Welling 2016).

    As it is, and mirrored left-right. Channels come in pairs: channel k + C/2 holds the mirror
    image of what channel k would hold, were the image mirrored. So a filter is mirrored by flipping
    its kernel and, unless it reads the image, by exchanging the pairs that it reads. The weight is
    (C_out/2, C_in/groups, K, K): twice the filters, or for the same parameters wider layers.
    Written for the image, 1x1 and depthwise convolutions; in_channels, but for the image's 3, and
    out_channels must be even.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.weight = nn.Parameter(self.weight[: self.out_channels // 2].detach().clone())

    def filters(self) -> Tensor:
        """All filters, (C_out, C_in/groups, K, K): the learned ones, then their mirror images."""
        pairs = self.weight.shape[1] // 2  # of a depthwise filter's one input: none
        if self.in_channels == 3:  # the image's channels are no pairs
            pairs = 0
        return torch.cat([self.weight, self.weight.flip(3).roll(pairs, 1)])

    def forward(self, x: Tensor) -> Tensor:  # (N, C_in, H, W) -> (N, C_out, H, W)
        return self._conv_forward(x, self.filters(), self.bias)


class ConvBlock(nn.Module):
    """Convolution -> norm -> hard swish -> dropout, with a skip where it fits.

    Where ``skip``, the input is added after the norm (He et al. 2016). A 3x3 convolution here is
    depthwise-separable, unless its input is the image: a 3x3 filter for each channel, then a 1x1
    convolution across them. It sees the same 3x3 window for about a ninth of the weights (Howard
    2017). Hard swish, y * min(max(y + 3, 0), 6) / 6, is nearly ReLU, but smooth around 0 (Howard
    2019, section 5.2).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        norm: str,
        num_groups: int,
        dropout: float,
    ):
        super().__init__()
        self.conv = nn.Sequential()
        separable = kernel_size == 3 and in_channels > 3
        if separable:
            each = {"padding": 1, "groups": in_channels, "bias": False}
            self.conv.append(MirrorConv(in_channels, in_channels, 3, **each))
            kernel_size = 1
        size = {"kernel_size": kernel_size, "padding": kernel_size // 2}
        self.conv.append(MirrorConv(in_channels, out_channels, bias=False, **size))
        if norm == "none":  # a norm has its own; at 0, so that no arm draws more numbers
            self.conv[-1].bias = nn.Parameter(torch.zeros(out_channels))
        self.norm = norm_layer(norm, out_channels, num_groups)
        self.dropout = nn.Dropout(dropout)
        self.skip = separable and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:  # (N, C_in, H, W) -> (N, C_out, H, W)
        y = self.norm(self.conv(x))
        if self.skip:
            y += x  # in place: no backward pass needs what the norm returned, and memory is time
        return self.dropout(F.hardswish(y))


class NormNet(nn.Module):
    """The assignment's network, in which only the norm varies.

    C1 C2 c3 P1 C3 C4 C5 c6 P2 C7 C8 C9 GAP C10. Takes normalized images (N, 3, H, W), H and W
    divisible by 4, and returns logits (N, num_classes). Every 3x3 convolution with as many output
    as input channels (C4, C5, C8, C9) has a skip around it. Raises CourseError for an unknown norm,
    a num_groups that does not divide every width, or 50,000 parameters and more.
    """

    WIDTHS = dict(
        C1=24, C2=48, c3=32, P1=0, C3=96, C4=96, C5=96, c6=64, P2=0, C7=152, C8=152, C9=152
    )

    def __init__(
        self, norm: str = "bn", num_classes: int = 10, num_groups: int = 8, dropout: float = 0.0
    ):
        super().__init__()
        check_network(num_classes, dropout)
        if norm == "gn":  # math.gcd: of 0, a pooling, and n it is n
            check_groups(num_groups, math.gcd(*self.WIDTHS.values()), "every width of NormNet")
        channels = 3
        for name, width in self.WIDTHS.items():
            if name[0] == "P":
                self.add_module(name, nn.MaxPool2d(2))
                continue
            kernel_size = 1 if name[0] == "c" else 3
            block = ConvBlock(channels, width, kernel_size, norm, num_groups, dropout)
            self.add_module(name, block)
            channels = width
        self.GAP = nn.AdaptiveAvgPool2d(1)
        self.C10 = nn.Conv2d(channels, num_classes, 1)
        if (count := count_parameters(self)) >= MAX_PARAMETERS:
            message = f"{num_classes} classes make {count:,} parameters"
            limit = f"the assignment allows fewer than {MAX_PARAMETERS:,}"
            raise CourseError(f"{message}; {limit}: use fewer, or the net 'reference'")

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, num_classes)
        for layer in self.children():
            x = layer(x)
        return x.flatten(1)


DESIGNS = (("bn", 1), ("ln", 1), ("ln", 2), ("gn", 1), ("gn", 2))  # norm and multiplier


def reference_net(
    norm: str, multiplier: int | None = None, num_classes: int = 10, dropout: float = 0.0
) -> nn.Sequential:
    """The published designs, layer for layer.

    Takes (N, 3, 32, 32), returns log-probabilities (N, num_classes). ``bn``, multiplier 1: 5,882
    parameters. ``ln`` and ``gn`` were published with multiplier 2: 73,770 parameters, which breaks
    the assignment's limit (and the published "GN", GroupNorm(C, C), is Instance Norm). With
    multiplier 1 they have 18,842 and keep it; ``gn`` is then GroupNorm(4, C). Raises CourseError
    for anything else.
    """
    check_network(num_classes, dropout)
    m = design_multiplier(norm, multiplier)
    few, many, wide = 8 * m, 16 * m, 32 * m  # channels
    groups = 16 if norm == "bn" else 1  # of the wide convolutions: depthwise in the BN design
    kind = "in" if (norm, m) == ("gn", 2) else norm
    block = partial(reference_block, kind, dropout)

    def squeeze() -> nn.Sequential:
        widen = nn.Conv2d(many, wide, 3, padding=1, groups=groups, bias=False)
        return block(widen, nn.Conv2d(wide, few, 1, bias=False))

    def expand(dilation: int = 1) -> nn.Sequential:  # the dilated one turns 8 x 8 into 6 x 6
        return block(nn.Conv2d(few, many, 3, padding=1, dilation=dilation, bias=False))

    net = nn.Sequential()
    net.add_module("block1", block(nn.Conv2d(3, many, 3, padding=1)))
    net.add_module("block2", squeeze())
    net.add_module("pool1", nn.MaxPool2d(2))
    net.add_module("block3", expand())
    net.add_module("block4", squeeze())
    net.add_module("pool2", nn.MaxPool2d(2))
    net.add_module("block5", expand(dilation=2))
    net.add_module("block6", squeeze())
    net.add_module("block7", expand())
    net.add_module("pool3", nn.AvgPool2d(6))
    net.add_module("flatten", nn.Flatten())
    net.add_module("linear", nn.Linear(many, num_classes))
    net.add_module("log_softmax", nn.LogSoftmax(dim=1))
    return net


def reference_block(kind: str, dropout: float, *convolutions: nn.Conv2d) -> nn.Sequential:
    """Convolutions -> norm -> dropout -> ReLU."""
    norm = norm_layer(kind, convolutions[-1].out_channels, num_groups=4)
    return nn.Sequential(*convolutions, norm, nn.Dropout(dropout), nn.ReLU())


def design_multiplier(norm: str, multiplier: int | None) -> int:
    """The multiplier of a design, as published where it is None.

    Raises CourseError if there is no such design.
    """
    if multiplier is None:
        multiplier = 1 if norm == "bn" else 2
    if (norm, multiplier) not in DESIGNS:
        message = f"no reference design for norm {norm!r}, multiplier {multiplier}"
        raise CourseError(f"{message}; there are bn 1, ln 1 or 2, gn 1 or 2")
    return multiplier


def count_parameters(model: nn.Module) -> int:
    """Number of learned parameters; running statistics are buffers and do not count."""
    return sum(p.numel() for p in model.parameters())
