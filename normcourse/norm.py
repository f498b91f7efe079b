"""The normalizations: which one a name means, and a Group Norm that is fast where PyTorch's own is slow."""

from typing import Any

import torch
from torch import Tensor, nn

from normcourse.data import CourseError

NORMS = {"bn": "Batch Norm", "ln": "Layer Norm", "gn": "Group Norm", "in": "Instance Norm", "none": "no norm"}


def norm_layer(norm: str, channels: int, num_groups: int = 8) -> nn.Module:
    """The normalization of (N, channels, H, W) that ``norm`` names, with a scale and a shift per channel.

    ``ln`` is GroupNorm(1, C): each sample over (C, H, W). ``in`` is GroupNorm(C, C): each channel of a sample.
    Raises CourseError for an unknown norm, or a num_groups that does not divide the channels.
    """
    if norm == "bn":
        return nn.BatchNorm2d(channels)
    if norm == "none":
        return nn.Identity()
    groups = {"ln": 1, "gn": num_groups, "in": channels}.get(str(norm))
    if groups is None:
        raise CourseError(f"unknown norm {norm!r}; allowed: {', '.join(NORMS)}")
    if not isinstance(groups, int) or groups < 1 or channels % groups:
        raise CourseError(f"num_groups={groups} does not divide {channels} channels; allowed here: {divisors(channels)}")
    return GroupNorm(groups, channels)


def divisors(number: int) -> str:
    """The divisors of a number, as a reader would list them."""
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


class GroupNorm(nn.GroupNorm):
    """torch.nn.GroupNorm (Wu & He 2018) in all but time: its backward pass is slow in channels_last on a CPU.

    In bf16 training there, the sums over pixels are matrix products with ones, and what is left to do for each number
    is done in few passes: the same statistics, of differences from the mean, for about a third of the time (PyTorch
    2.15). Everywhere else it is torch's own.
    """

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, H, W)
        slow = x.device.type == "cpu" and x.dtype == torch.bfloat16 and self.num_groups > 1 and torch.is_grad_enabled()
        fits = x.dim() == 4 and len(x) > 0 and x.shape[2:].numel() % PARTS == 0
        if slow and fits and x.is_contiguous(memory_format=torch.channels_last):
            y: Tensor = _ChannelsLast.apply(x, self.num_groups, self.weight, self.bias, self.eps)
            return y
        return super().forward(x)


# Of so many adjacent pixels we make a row. A bf16 sum is rounded to 3 digits: the sum in fp32 of 8 sums, one for each
# place in a row, is more exact. And a long row is a long inner loop for what differs between channels, not pixels.
PARTS = 8


class _ChannelsLast(torch.autograd.Function):
    """Group Norm of (N, C, H, W) whose memory is ordered (N, H, W, C). Below, G groups have D channels each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        (n, c, h, w), rows = x.shape, _rows(x)
        ctx.native = h * w >= 1024 and c >= 32  # torch's forward pass is the faster one
        if ctx.native:
            y, mean, rstd = torch.ops.aten.native_group_norm(x, weight, bias, n, c, h * w, groups, eps)
            mean, rstd = mean.view(n, groups, 1).float(), rstd.view(n, groups, 1).float()
        else:
            rows, mean = _centre(rows, _group_mean(_sums(rows, groups), h * w), c)  # mean: (N, G, 1)
            rstd = (_group_mean(_sums(rows * rows, groups), h * w) - mean**2 + eps).rsqrt()
            scale = rstd * weight.view(groups, -1)  # (N, G, D)
            shift = bias.view(groups, -1) - mean * scale
            y = torch.empty_like(x)  # not a view of a result: those cannot be changed in place behind a Function
            torch.addcmul(_row(shift, c), rows, _row(scale, c), out=_rows(y))
        ctx.save_for_backward(rows, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, weight, mean, rstd = ctx.saved_tensors
        (n, c, h, w), weight = grad.shape, weight.view(mean.shape[1], -1)  # (G, D)
        if ctx.native:
            rows, mean = _centre(rows, mean, c)
        dy = _rows(grad.contiguous(memory_format=torch.channels_last))
        product, d_bias = dy * rows, _sums(dy, len(weight))  # (N, G, D)
        d_weight = (_sums(product, len(weight)) - mean * d_bias) * rstd  # the sums of dy * x_hat
        # dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)) with g = dy * weight, as a sum of dy, x and a constant
        of_x = -_group_mean(d_weight * weight, h * w) * rstd**2  # (N, G, 1)
        shift = -_group_mean(d_bias * weight, h * w) * rstd - of_x * mean
        dx = torch.addcmul(_row(shift, c), dy, _row(rstd * weight, c), out=product).addcmul_(rows, _row(of_x, c))
        return dx.view(n, h, w, c).permute(0, 3, 1, 2), None, d_weight.sum(0).flatten(), d_bias.sum(0).flatten(), None


def _rows(x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, H * W / PARTS, PARTS * C), a view
    return x.permute(0, 2, 3, 1).view(len(x), -1, PARTS * x.shape[1])


def _centre(rows: Tensor, mean: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """The rows less the mean of each group, and what is left of the mean, which is rounded to bf16 for that."""
    return rows - _row(mean, channels), mean - mean.bfloat16()


def _sums(rows: Tensor, groups: int) -> Tensor:
    """Sum over the pixels, -> (N, G, D) in fp32, by a matrix product with ones."""
    ones = rows.new_ones(1, 1, rows.shape[1]).expand(len(rows), -1, -1)
    return torch.bmm(ones, rows).view(len(rows), PARTS, groups, -1).sum(1, dtype=torch.float32)


def _group_mean(sums: Tensor, pixels: int) -> Tensor:  # (N, G, D) -> (N, G, 1)
    return sums.mean(2, keepdim=True) / pixels


def _row(values: Tensor, channels: int) -> Tensor:
    """(N, G, D) or (N, G, 1) -> (N, 1, PARTS * C) in bf16: the values of a row's pixels, which are all the same."""
    each = values.bfloat16().expand(-1, -1, channels // values.shape[1]).flatten(1)  # (N, C)
    return each.repeat(1, PARTS)[:, None]
