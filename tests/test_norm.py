"""The fast Group Norm against PyTorch's: the same module, the same numbers to bf16's precision."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normcourse import NormNet, default_settings, reference_net
from normcourse.engine import fit
from normcourse.engine.fast_norm import ChannelsLast, FastGroupNorm, use_fast_group_norm

CPU = torch.device("cpu")
SHAPES = [
    (4, 24, 32, 32, 8),
    (4, 24, 32, 32, 24),
    (5, 64, 16, 16, 8),
    (3, 96, 8, 8, 2),
    (2, 8, 4, 4, 4),
    (1, 6, 4, 2, 3),
    (2, 32, 32, 32, 8),  # torch's forward pass, our backward pass
]


def example(n, c, h, w, dtype, offset=0.0):
    """An input and the gradient of an output, (n, c, h, w) in channels_last."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(n, c, h, w, generator=generator) for _ in range(2))
    x = x * (1 + torch.arange(c).view(1, c, 1, 1) / c) + offset
    return [t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, dy)]


def pair(groups, channels):
    """Ours and torch's, with the same random weight and bias."""
    ours, theirs = FastGroupNorm(groups, channels), nn.GroupNorm(groups, channels)
    torch.manual_seed(0)
    with torch.no_grad():
        ours.weight.uniform_(0.5, 1.5)
        ours.bias.normal_()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def results(norm, x, dy, then=None):
    """Output and the gradients of input, weight and bias; ``then``: what follows the norm."""
    x = x.detach().requires_grad_()
    y = norm(x)
    if then:
        y = then(y)
    return (y, *torch.autograd.grad(y, (x, norm.weight, norm.bias), dy))


@pytest.fixture
def used(monkeypatch):
    """The calls of the fast way."""
    calls, apply = [], ChannelsLast.apply

    def noted(*arguments):
        calls.append(arguments)
        return apply(*arguments)

    monkeypatch.setattr(ChannelsLast, "apply", noted)
    return calls


def test_its_output_can_be_changed_in_place():
    x, dy = example(4, 16, 8, 8, torch.bfloat16)
    ours, _ = pair(4, 16)
    changed, apart = results(ours, x, dy, F.relu_), results(ours, x, dy, F.relu)
    assert all(torch.equal(a, b) for a, b in zip(changed, apart, strict=True))


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    "offset", [0.0, 20.0]
)  # 20 standard deviations: E[x^2] - E[x]^2 would fail
@pytest.mark.parametrize(("n", "c", "h", "w", "groups"), SHAPES)
def test_bf16_channels_last_is_as_exact_as_bf16_allows(n, c, h, w, groups, offset, used):
    x, dy = example(n, c, h, w, torch.bfloat16, offset)
    ours, theirs = pair(groups, c)
    found = results(ours, x, dy)
    assert used and found[0].dtype == torch.bfloat16
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    natural = results(theirs, x.contiguous(), dy.contiguous())  # in NCHW; weight and bias in fp32
    exact = results(theirs.double(), x.double(), dy.double())
    names = ("y", "dx", "dweight", "dbias")
    for name, got, native, right in zip(names, found, natural, exact, strict=True):
        assert got.shape == right.shape
        bound = max(0.006, 2.5 * error(native, right)) * (1 + offset / 4)
        assert error(got, right) < bound, name


@pytest.mark.parametrize(("n", "c", "h", "w", "groups"), SHAPES[:3] + SHAPES[-1:])
def test_what_the_mean_loses_in_bf16_is_not_lost_in_the_gradient(n, c, h, w, groups):
    """Seen where the gradient grows with an input that is far from zero."""
    x, dy = example(n, c, h, w, torch.bfloat16, offset=20.0)
    ours, theirs = pair(groups, c)
    x_hat = F.group_norm(x.float(), groups)
    dy = (dy + 3 * x_hat / ours.weight.detach().view(1, c, 1, 1)).to(dy)
    found = results(ours, x, dy)
    exact = results(theirs.double(), x.double(), dy.double())
    assert error(found[1], exact[1]) < 0.04


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elsewhere_it_is_torchs_own(dtype, used):
    x, dy = example(3, 16, 8, 8, dtype)
    ours, theirs = (norm.to(dtype) for norm in pair(4, 16))
    pairs = zip(results(ours, x, dy), results(theirs, x, dy), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
        x = x.bfloat16()  # nothing to train: torch's forward pass
        assert torch.equal(ours.bfloat16()(x), theirs.bfloat16()(x))
    assert not used


@pytest.mark.parametrize("shape", [(2, 8, 3, 3), (2, 8), (2, 8, 16), (2, 8, 4, 4, 4), (0, 8, 4, 4)])
def test_shapes_that_the_fast_way_does_not_take(shape, used):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    ours, theirs = pair(4, 8)
    assert torch.equal(ours(x), theirs(x)) and not used


def test_gradient_is_orthogonal_to_ones_and_to_x_hat():
    x, dy = example(4, 16, 8, 8, torch.bfloat16)
    ours, _ = pair(4, 16)
    _, dx, _, _ = (t.double() for t in results(ours, x, dy))
    groups = (4, 4, -1)
    x_hat = F.group_norm(x.double(), 4).reshape(groups)
    dx = dx.reshape(groups)
    size = dx.norm(dim=2) * dx.shape[2] ** 0.5
    assert (dx.sum(2).abs() < 0.005 * size).all()
    assert ((dx * x_hat).sum(2).abs() < 0.005 * size).all()


# --- put into a network by the run


def norms(model):
    """The norms of a network by name, Batch or Group Norm."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            found[name] = module
    return found


@pytest.mark.parametrize("make", [lambda: NormNet("gn"), lambda: reference_net("gn", 1)])
def test_it_takes_the_place_of_group_norm_and_nothing_else_changes(make):
    torch.manual_seed(0)
    model = make()
    weights, before = dict(model.named_parameters()), norms(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert use_fast_group_norm(model) is model
    for name, norm in norms(model).items():
        assert type(norm) is FastGroupNorm and type(before[name]) is nn.GroupNorm
        assert repr(norm).removeprefix("Fast") == repr(before[name])  # groups, channels, eps
    after = dict(model.named_parameters())
    assert list(after) == list(weights)
    assert all(after[name] is weights[name] for name in weights)  # what an optimizer may hold
    make().load_state_dict(model.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("norm", ["bn", "ln", "none"])
def test_other_norms_stay(norm):
    model = NormNet(norm)
    before = norms(model)
    assert norms(use_fast_group_norm(model)) == before  # modules are equal only to themselves
    assert FastGroupNorm not in map(type, before.values())


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("norm", ["bn", "ln", "gn", "in", "none"])
def test_a_run_in_bf16_on_a_cpu_uses_it_and_others_do_not(norm, bf16, small, used, monkeypatch):
    monkeypatch.setattr(fit, "has_fast_bf16", lambda _: bf16)
    settings = default_settings(norm=norm, batch_size=40)
    run = fit.start(settings, small, CPU)
    fast = bf16 and norm in ("gn", "in")
    kinds = {type(layer) for layer in norms(run.model).values()}
    plain = {"bn": {nn.BatchNorm2d}, "none": set()}.get(norm, {nn.GroupNorm})
    assert kinds == ({FastGroupNorm} if fast else plain)
    fit.run_epoch(run, small)
    assert len(used) == (20 if fast else 0)  # ten norms, two steps
    loaded = NormNet(norm)
    loaded.load_state_dict(run.model.state_dict())  # the weights of a run fit torch's own layers
