"""What it means for a layer to equal torch.nn: the tests check our layers, and mutants of them."""

import copy

import torch
from torch import nn

KINDS = ("BatchNorm", "LayerNorm", "InstanceNorm", "GroupNorm")
TOLERANCE = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
}
BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
INSTANCE_NORMS = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}


def pair(
    defs, kind: str, shape: tuple[int, ...], num_groups: int = 2
) -> tuple[nn.Module, nn.Module]:
    """Our layer and PyTorch's for a batch (N, C, ...), with the same random gamma and beta."""
    ours, theirs = new_pair(defs, kind, shape, num_groups)
    for p in theirs.parameters():
        nn.init.normal_(p, mean=1.0)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def new_pair(
    defs, kind: str, shape: tuple[int, ...], num_groups: int
) -> tuple[nn.Module, nn.Module]:
    """The two layers as they are made."""
    C, rank = shape[1], len(shape)
    if kind == "BatchNorm":
        return defs.BatchNorm(C), BATCH_NORMS[rank](C)
    if kind == "LayerNorm":
        return defs.LayerNorm(shape[1:]), nn.LayerNorm(shape[1:])
    if kind == "InstanceNorm":
        return defs.InstanceNorm(), INSTANCE_NORMS[rank](C)
    assert kind == "GroupNorm"
    return defs.GroupNorm(num_groups, C), nn.GroupNorm(num_groups, C)


def run(layer: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradients of input and parameters, and buffers after one step forward and back."""
    layer.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    torch.manual_seed(1)  # the same upstream gradient for both layers
    y.backward(torch.randn(y.shape, dtype=y.dtype))
    found = {"output": y.detach(), "input gradient": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in layer.named_parameters()}
    return found | {name: b.clone() for name, b in layer.named_buffers()}


def check_equal(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    """Both layers find the same on x."""
    a, b = run(ours, x), run(theirs, x)
    assert a.keys() == b.keys(), f"{sorted(a)} against {sorted(b)}"
    for name in b:
        torch.testing.assert_close(
            a[name], b[name], **TOLERANCE[x.dtype], msg=lambda m, name=name: f"{name}: {m}"
        )


def check_training(defs, kind: str) -> None:
    """Training: output, gradients and running statistics, over several batches."""
    torch.manual_seed(0)
    ours, theirs = pair(defs, kind, (4, 6, 5, 3))
    for step in range(3):
        check_equal(ours, theirs, 2 * torch.randn(4, 6, 5, 3) + step)


def check_evaluation(defs, kind: str) -> None:
    """Evaluation after training: output and gradients, and buffers that stay as they are."""
    torch.manual_seed(0)
    ours, theirs = pair(defs, kind, (4, 6, 5, 3))
    x = 2 * torch.randn(4, 6, 5, 3) + 1
    for layer in (ours, theirs):
        layer(x)
    check_equal(ours.eval(), theirs.eval(), x + 1)


def check_large_mean(defs, kind: str) -> None:
    """Inputs around 3000 with standard deviation 1: nothing may drown in rounding."""
    torch.manual_seed(0)
    shape = (4, 6, 5, 3)
    x = 3000 + torch.randn(shape)
    ours, theirs = pair(defs, kind, shape)
    exact = copy.deepcopy(theirs).double()(x.double())
    assert (ours(x) - exact).abs().max() < 5e-3
    theirs(x)
    ours_found, theirs_found = dict(ours.named_buffers()), dict(theirs.named_buffers())
    torch.testing.assert_close(ours_found, theirs_found, rtol=1e-3, atol=1e-3)


def check_small_variance(defs, kind: str) -> None:
    """Inputs with standard deviation 0.001, where eps has a say."""
    torch.manual_seed(0)
    ours, theirs = (layer.double() for layer in pair(defs, kind, (4, 6, 5, 3)))
    check_equal(ours, theirs, 1e-3 * torch.randn(4, 6, 5, 3, dtype=torch.float64))


def check_state_dict(defs, kind: str) -> None:
    """The same names, shapes and types, both ways, and a trained state survives the round trip."""
    torch.manual_seed(0)
    ours, theirs = pair(defs, kind, (4, 6, 5, 3))
    ours(torch.randn(4, 6, 5, 3) + 1)
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    for name in b:
        assert (a[name].shape, a[name].dtype) == (b[name].shape, b[name].dtype)
    theirs.load_state_dict(a)
    x = torch.randn(4, 6, 5, 3)
    torch.testing.assert_close(theirs.eval()(x), ours.eval()(x), **TOLERANCE[torch.float32])


CHECKS = (
    check_training,
    check_evaluation,
    check_large_mean,
    check_small_variance,
    check_state_dict,
)
