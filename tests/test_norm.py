"""Our Group Norm against PyTorch's: the same module, and in bf16 channels_last the same numbers to bf16's precision."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normcourse.norm import GroupNorm, _ChannelsLast

SHAPES = [
    (4, 24, 32, 32, 8),
    (4, 24, 32, 32, 24),
    (5, 64, 16, 16, 8),
    (3, 96, 8, 8, 2),
    (2, 8, 4, 4, 4),
    (1, 6, 4, 2, 3),
]


def example(n, c, h, w, dtype, offset=0.0):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(n, c, h, w, generator=generator) for _ in range(2))
    x = x * (1 + torch.arange(c).view(1, c, 1, 1) / c) + offset
    return [t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, dy)]


def pair(groups, channels):
    """Ours and torch's, with the same random weight and bias."""
    ours, theirs = GroupNorm(groups, channels), nn.GroupNorm(groups, channels)
    with torch.no_grad():
        ours.weight.uniform_(0.5, 1.5), ours.bias.normal_()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def results(norm, x, dy):
    """Output and the gradients of input, weight and bias."""
    x = x.detach().requires_grad_()
    y = norm(x)
    return (y, *torch.autograd.grad(y, (x, norm.weight, norm.bias), dy))


def test_its_output_can_be_changed_in_place():
    x, dy = example(4, 16, 8, 8, torch.bfloat16)
    ours, _ = pair(4, 16)
    changed, apart = (results(lambda_module(ours, f), x, dy)[1] for f in (F.relu_, F.relu))
    assert torch.equal(changed, apart)


def lambda_module(norm, function):
    """The norm followed by a function."""
    module = nn.Sequential(norm)
    module.weight, module.bias = norm.weight, norm.bias
    module.forward = lambda x: function(norm(x))
    return module


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("offset", [0.0, 20.0])  # 20 standard deviations: E[x^2] - E[x]^2 would fail
@pytest.mark.parametrize(("n", "c", "h", "w", "groups"), SHAPES)
def test_bf16_channels_last_is_as_exact_as_bf16_allows(n, c, h, w, groups, offset, monkeypatch):
    used = []
    monkeypatch.setattr(_ChannelsLast, "apply", lambda *a, f=_ChannelsLast.apply: used.append(1) or f(*a))
    x, dy = example(n, c, h, w, torch.bfloat16, offset)
    ours, theirs = pair(groups, c)
    exact = results(theirs.double(), x.double(), dy.double())
    found = results(ours, x, dy)
    assert used and found[0].dtype == torch.bfloat16 and found[0].is_contiguous(memory_format=torch.channels_last)
    natural = results(lambda_norm(groups, ours), x.contiguous(), dy.contiguous())
    for name, got, native, right in zip("y dx dweight dbias".split(), found, natural, exact, strict=True):
        assert got.shape == right.shape
        assert error(got, right) < max(0.006, 2.5 * error(native, right)) * (1 + offset / 4), name


def lambda_norm(groups, like):
    """torch's own layer in NCHW bf16, its weight and bias in fp32 as autocast has them."""
    norm = nn.GroupNorm(groups, like.num_channels)
    norm.load_state_dict(like.state_dict())
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elsewhere_it_is_torchs_own(dtype):
    x, dy = example(3, 16, 8, 8, dtype)
    ours, theirs = (norm.to(dtype) for norm in pair(4, 16))
    assert all(torch.equal(a, b) for a, b in zip(results(ours, x, dy), results(theirs, x, dy), strict=True))
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("shape", [(2, 8, 3, 3), (2, 8), (2, 8, 16), (2, 8, 4, 4, 4)])
def test_shapes_that_the_fast_way_does_not_take(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours, theirs = pair(4, 8)
    assert torch.equal(ours(x), theirs(x))


def test_gradient_is_orthogonal_to_ones_and_to_x_hat():
    x, dy = example(4, 16, 8, 8, torch.bfloat16)
    ours, _ = pair(4, 16)
    _, dx, _, _ = (t.double() for t in results(ours, x, dy))
    groups = (4, 4, -1)
    x_hat = F.group_norm(x.double(), 4).reshape(groups)
    dx = dx.reshape(groups)
    size = dx.norm(dim=2) * dx.shape[2] ** 0.5
    assert (dx.sum(2).abs() < 0.005 * size).all() and ((dx * x_hat).sum(2).abs() < 0.005 * size).all()
