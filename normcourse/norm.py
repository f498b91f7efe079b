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

    In bf16 training there, the sums over a group are matrix products with ones instead: the same statistics, of
    differences from the mean, for about a quarter of the time (PyTorch 2.15). Everywhere else it is torch's own.
    """

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, H, W)
        slow = x.device.type == "cpu" and x.dtype == torch.bfloat16 and self.num_groups > 1 and torch.is_grad_enabled()
        fits = x.dim() == 4 and len(x) > 0 and x.shape[2:].numel() % PARTS == 0
        if slow and fits and x.is_contiguous(memory_format=torch.channels_last):
            y: Tensor = _ChannelsLast.apply(x, self.num_groups, self.weight, self.bias, self.eps)
            return y
        return super().forward(x)


PARTS = 8  # a bf16 sum is rounded to 3 digits: the sum of 8 such parts, in fp32, is more exact
NATIVE = 1024  # from this many pixels on, torch's forward pass is the faster one


class _ChannelsLast(torch.autograd.Function):
    """Group Norm of (N, C, H, W) whose memory is ordered (N, H, W, C); pixels below are (N, H * W, C)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        n, c, h, w = x.shape
        if h * w >= NATIVE:
            y, mean, rstd = torch.ops.aten.native_group_norm(x, weight, bias, n, c, h * w, groups, eps)
            mean, rstd = mean.view(n, groups).float(), rstd.view(n, groups).float()
        else:
            pixels = _pixels(x)
            mean = _group_mean(_sums(pixels), groups, h * w)  # (N, G)
            y = torch.empty_like(x)  # not a view of a result: those cannot be changed in place behind a Function
            centred, rest = _minus(pixels, _spread(mean, c), out=_pixels(y)), _spread(_rest(mean), c)
            rstd = (_group_mean(_sums(centred * centred), groups, h * w) - _rest(mean) ** 2 + eps).rsqrt()
            scale = _spread(rstd, c) * weight  # (N, C)
            _minus(centred.mul_(scale.to(x.dtype)[:, None]), rest * scale - bias, out=centred)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, rstd = ctx.saved_tensors
        (_, c, h, w), groups = x.shape, mean.shape[1]
        dy, centred = _pixels(grad.contiguous(memory_format=torch.channels_last)), _minus(_pixels(x), _spread(mean, c))
        product, d_bias = dy * centred, _sums(dy)
        d_weight = (_sums(product) - _spread(_rest(mean), c) * d_bias) * _spread(rstd, c)  # (N, C): sum of dy * x_hat
        # dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)) with g = dy * weight
        of_x = -_group_mean(d_weight * weight, groups, h * w) * rstd**2  # (N, G), as the next
        shift = _group_mean(d_bias * weight, groups, h * w) * rstd + of_x * _rest(mean)
        of_dy = _spread(rstd, c) * weight
        dx = centred.mul_(_spread(of_x, c).to(x.dtype)[:, None])
        dx += torch.mul(dy, of_dy.to(x.dtype)[:, None], out=product)
        return _image(_minus(dx, _spread(shift, c), out=dx), x), None, d_weight.sum(0), d_bias.sum(0), None


def _pixels(x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, H * W, C), a view
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _image(pixels: Tensor, like: Tensor) -> Tensor:  # (N, H * W, C) -> (N, C, H, W), a view
    n, c, h, w = like.shape
    return pixels.view(n, h, w, c).permute(0, 3, 1, 2)


def _sums(pixels: Tensor) -> Tensor:
    """Sum over the pixels, (N, H * W, C) -> (N, C) in fp32, as matrix products with a row of ones."""
    n, size, c = pixels.shape
    ones = pixels.new_ones(1, 1, size // PARTS).expand(n * PARTS, -1, -1)
    return torch.bmm(ones, pixels.view(n * PARTS, size // PARTS, c)).view(n, PARTS, c).float().sum(1)


def _minus(pixels: Tensor, row: Tensor, out: Tensor | None = None) -> Tensor:
    """(N, H * W, C) less (N, C) at each pixel: minus the outer product with ones, which is the fastest way."""
    ones = pixels.new_ones(1, pixels.shape[1], 1).expand(len(pixels), -1, -1)
    return torch.baddbmm(pixels, ones, row.to(pixels.dtype)[:, None], alpha=-1, out=out)


def _rest(mean: Tensor) -> Tensor:
    """What of a mean is lost when it is rounded to bf16, for _minus."""
    return mean - mean.bfloat16().float()


def _group_mean(sums: Tensor, groups: int, size: int) -> Tensor:  # (N, C) sums over H * W -> (N, G) means
    return sums.view(len(sums), groups, -1).mean(2) / size


def _spread(values: Tensor, channels: int) -> Tensor:  # (N, G) -> (N, C)
    return values.repeat_interleave(channels // values.shape[1], 1)
