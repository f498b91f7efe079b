"""Group Norm for channels_last tensors in bf16 on a CPU, where PyTorch's own backward pass is slow.

The sums over pixels are matrix products with ones, and what is left to do for each number is done
in few passes: the same statistics, of differences from the mean, for about a third of the time
(PyTorch 2.15).
"""

from typing import Any

import torch
from torch import Tensor, nn

from normcourse.norm import exchange_norms


def use_fast_group_norm(model: nn.Module) -> nn.Module:
    """Put FastGroupNorm in the place of every Group Norm, in place; its parameters stay."""
    return exchange_norms(model, faster)


def faster(name: str, norm: nn.Module) -> nn.Module:
    """The same Group Norm, fast; of one group torch's own is as fast."""
    if not isinstance(norm, nn.GroupNorm) or norm.num_groups == 1:
        return norm
    fast = FastGroupNorm(norm.num_groups, norm.num_channels, norm.eps)
    fast.weight, fast.bias = norm.weight, norm.bias
    return fast


class FastGroupNorm(nn.GroupNorm):
    """torch.nn.GroupNorm (Wu & He 2018) in all but time.

    What is not slow in torch is torch's own.
    """

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, H, W)
        training = x.dtype == torch.bfloat16 and torch.is_grad_enabled()
        fits = x.dim() == 4 and len(x) > 0 and x.shape[2:].numel() % PARTS == 0
        if training and fits and x.is_contiguous(memory_format=torch.channels_last):
            return ChannelsLast.apply(x, self.num_groups, self.weight, self.bias, self.eps)
        return super().forward(x)


# Of so many adjacent pixels we make a row. A bf16 sum is rounded to 3 digits: the sum in fp32 of 8
# sums, one for each place in a row, is more exact. And a long row is a long inner loop for what
# differs between channels, not pixels.
PARTS = 8


class ChannelsLast(torch.autograd.Function):
    """Group Norm of (N, C, H, W) whose memory is ordered (N, H, W, C).

    G groups have D channels each.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Any:
        n, c, h, w = x.shape
        rows, pixels = as_rows(x), h * w
        ctx.native = pixels >= 1024 and c >= 32  # torch's forward pass is the faster one
        if ctx.native:
            sizes = (n, c, pixels, groups)
            y, mean, rstd = torch.ops.aten.native_group_norm(x, weight, bias, *sizes, eps)
            mean, rstd = mean.view(n, groups, 1).float(), rstd.view(n, groups, 1).float()
        else:
            rows, mean = centre(rows, group_mean(pixel_sums(rows, groups), pixels), c)
            square = group_mean(pixel_sums(rows * rows, groups), pixels)  # (N, G, 1), as the mean
            rstd = (square - mean**2 + eps).rsqrt()
            scale = rstd * weight.view(groups, -1)  # (N, G, D)
            shift = bias.view(groups, -1) - mean * scale
            y = torch.empty_like(x)  # no view: a view cannot be changed in place behind a Function
            torch.addcmul(spread(shift, c), rows, spread(scale, c), out=as_rows(y))
        ctx.save_for_backward(rows, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, weight, mean, rstd = ctx.saved_tensors
        (n, c, h, w), weight = grad.shape, weight.view(mean.shape[1], -1)  # (G, D)
        if ctx.native:
            rows, mean = centre(rows, mean, c)
        dy = as_rows(grad.contiguous(memory_format=torch.channels_last))
        product, d_bias = dy * rows, pixel_sums(dy, len(weight))  # (N, G, D)
        d_weight = (pixel_sums(product, len(weight)) - mean * d_bias) * rstd  # of dy * x_hat
        # dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)), where g = dy * weight, is a sum of
        # dy, x and a constant, each with its factor.
        of_x = -group_mean(d_weight * weight, h * w) * rstd**2  # (N, G, 1)
        shift = -group_mean(d_bias * weight, h * w) * rstd - of_x * mean
        dx = torch.addcmul(spread(shift, c), dy, spread(rstd * weight, c), out=product)
        dx.addcmul_(rows, spread(of_x, c))
        dx = dx.view(n, h, w, c).permute(0, 3, 1, 2)
        return dx, None, d_weight.sum(0).flatten(), d_bias.sum(0).flatten(), None


def as_rows(x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, H * W / PARTS, PARTS * C), a view
    return x.permute(0, 2, 3, 1).view(len(x), -1, PARTS * x.shape[1])


def centre(rows: Tensor, mean: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """The rows less the mean of each group, and what is left of the mean.

    That is what was lost as the mean was rounded to bf16.
    """
    return rows - spread(mean, channels), mean - mean.bfloat16()


def pixel_sums(rows: Tensor, groups: int) -> Tensor:
    """Sum over the pixels, -> (N, G, D) in fp32, by a matrix product with ones."""
    ones = rows.new_ones(1, 1, rows.shape[1]).expand(len(rows), -1, -1)
    return torch.bmm(ones, rows).view(len(rows), PARTS, groups, -1).sum(1, dtype=torch.float32)


def group_mean(sums: Tensor, pixels: int) -> Tensor:  # (N, G, D) -> (N, G, 1)
    return sums.mean(2, keepdim=True) / pixels


def spread(values: Tensor, channels: int) -> Tensor:
    """(N, G, D) or (N, G, 1) -> (N, 1, PARTS * C) in bf16.

    The values of a row's pixels, which are all the same.
    """
    each = values.bfloat16().expand(-1, -1, channels // values.shape[1]).flatten(1)  # (N, C)
    return each.repeat(1, PARTS)[:, None]
