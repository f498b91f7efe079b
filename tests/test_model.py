import pytest
import torch
from receptive_fields import receptive_fields
from torch import nn

from normcourse import CourseError, NormNet, count_parameters, norm_layer, reference_net
from normcourse.model import MirrorConv
from normcourse.norm import NORMS
from normcourse.train import Settings, build

# Of the published designs: step -> (channels at m = 1, size after, receptive field after).
SPEC = {
    "block1": (16, 32, 3),
    "block2": (8, 32, 5),
    "pool1": (8, 16, 6),
    "block3": (16, 16, 10),
    "block4": (8, 16, 14),
    "pool2": (8, 8, 16),
    "block5": (16, 6, 32),
    "block6": (8, 6, 40),
    "block7": (16, 6, 48),
    "pool3": (16, 1, 68),
}


@pytest.mark.parametrize(
    ("norm", "multiplier", "parameters"),
    [("bn", 1, 5_882), ("ln", 2, 73_770), ("ln", 1, 18_842), ("gn", 2, 73_770), ("gn", 1, 18_842)],
)
def test_reference_designs_are_the_published_ones(norm, multiplier, parameters):
    net = reference_net(norm, multiplier)
    assert count_parameters(net) == parameters
    found = {}
    for row in receptive_fields(net):  # the last convolution of a block counts
        found[row.layer.split(".")[0]] = (row.channels // multiplier, row.size, row.receptive_field)
    assert found == SPEC
    logits = net(torch.randn(4, 3, 32, 32))
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(4))  # log-probabilities
    kind = nn.BatchNorm2d if norm == "bn" else nn.GroupNorm
    kinds = [type(layer) for layer in net.block2]
    assert kinds == [nn.Conv2d, nn.Conv2d, kind, nn.Dropout, nn.ReLU]
    assert net.block2[0].groups == (16 if norm == "bn" else 1)
    assert [c.bias is not None for c in layers(net, nn.Conv2d)] == [True] + [False] * 9


def layers(net, kind):
    """The layers of one kind."""
    return [layer for layer in net.modules() if isinstance(layer, kind)]


def test_reference_norms():
    assert {m.num_groups for m in layers(reference_net("ln"), nn.GroupNorm)} == {1}
    assert {m.num_groups for m in layers(reference_net("gn", 1), nn.GroupNorm)} == {4}
    published = layers(reference_net("gn"), nn.GroupNorm)
    assert all(m.num_groups == m.num_channels for m in published)  # Instance Norm
    assert {m.p for m in layers(reference_net("bn", dropout=0.1), nn.Dropout)} == {0.1}


@pytest.mark.parametrize("norm", NORMS)
def test_normnet_is_the_assignments_skeleton(norm):
    net = NormNet(norm)
    names = [name for name, _ in net.named_children()]
    assert names == "C1 C2 c3 P1 C3 C4 C5 c6 P2 C7 C8 C9 GAP C10".split()
    assert count_parameters(net) < 50_000
    assert sum(getattr(block, "skip", False) for block in net.children()) >= 1
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    biases = sum(c.bias is not None for c in layers(net, nn.Conv2d))
    assert biases == (11 if norm == "none" else 1)  # C10 always has one


def shapes(norm):
    """The shape of each parameter."""
    return {name: p.shape for name, p in NormNet(norm).named_parameters()}


def test_only_the_norm_differs():
    assert shapes("bn") == shapes("ln") == shapes("gn") == shapes("in")


def test_a_mirrored_image_gives_mirrored_activations_in_exchanged_pairs():
    for norm in ("ln", "gn", "in", "none"):
        net = NormNet(norm).eval()
        for block in net.children():  # without a norm there are biases: the same for mirror images
            if norm == "none" and hasattr(block, "conv"):
                block.conv[-1].bias.data.fill_(0.1)
        net.C10 = nn.Identity()
        x = torch.randn(3, 3, 32, 32)
        seen, mirrored = net(x), net(x.flip(3))  # (N, C): what the head reads
        torch.testing.assert_close(mirrored, seen.roll(seen.shape[1] // 2, 1), atol=1e-5, rtol=1e-5)
        assert seen.std() > 1e-3  # not all equal


def exchanged(x, channels):
    """The mirror image, its pairs of channels exchanged; an image's three are no pairs."""
    x = x.flip(3)
    return x if channels == 3 else x.roll(x.shape[1] // 2, 1)


@pytest.mark.parametrize(
    ("channels", "out_channels", "size", "groups"), [(3, 8, 3, 1), (8, 12, 1, 1), (8, 8, 3, 8)]
)
def test_mirror_conv_is_a_convolution_with_all_its_filters(channels, out_channels, size, groups):
    shape = {"kernel_size": size, "padding": size // 2, "groups": groups, "bias": False}
    conv = MirrorConv(channels, out_channels, **shape)
    plain = nn.Conv2d(channels, out_channels, **shape)
    plain.weight = nn.Parameter(conv.filters().detach())
    x = torch.randn(2, channels, 6, 6)
    y = conv(x)
    torch.testing.assert_close(y, plain(x))
    assert 2 * conv.weight.numel() == plain.weight.numel()
    mirrored = conv(exchanged(x, channels)).flip(3)
    torch.testing.assert_close(mirrored, y.roll(out_channels // 2, 1))
    # a learned filter's gradient is that of both its uses
    y.square().sum().backward()
    plain(x).square().sum().backward()
    first, second = plain.weight.grad.chunk(2)
    both = first + exchanged(second, channels)
    torch.testing.assert_close(conv.weight.grad, both, atol=1e-4, rtol=1e-4)


def test_skip_adds_the_input():
    block = NormNet("bn").C4.eval()
    x = torch.randn(2, 96, 8, 8)
    assert block.skip
    torch.testing.assert_close(block(x), nn.functional.hardswish(x + block.norm(block.conv(x))))


@pytest.mark.parametrize(
    ("norm", "plain"),
    [
        ("bn", nn.BatchNorm2d(24)),
        ("ln", nn.GroupNorm(1, 24)),
        ("gn", nn.GroupNorm(8, 24)),
        ("in", nn.GroupNorm(24, 24)),
        ("none", nn.Identity()),
    ],
)
def test_a_norm_is_torchs_own_layer(norm, plain):
    layer = norm_layer(norm, 24)
    assert type(layer) is type(plain) and repr(layer) == repr(plain)
    x = torch.randn(2, 24, 4, 4)
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize(("norm", "axes"), [("bn", (0, 2, 3)), ("in", (2, 3)), ("ln", (1, 2, 3))])
def test_norm_layers_average_over_the_right_axes(norm, axes):
    y = norm_layer(norm, 8)(torch.randn(4, 8, 5, 5) * 3 + 2)
    torch.testing.assert_close(y.mean(axes), torch.zeros_like(y.mean(axes)), atol=1e-5, rtol=0)


def test_receptive_field_equals_the_gradients_footprint():
    net = reference_net("bn")[:10].eval()  # up to the last pool, before the linear layer
    net.pool1, net.pool2 = nn.AvgPool2d(2), nn.AvgPool2d(2)  # all of a window get a gradient
    for p in net.parameters():
        p.data.abs_()  # nothing cancels, no ReLU is off
    x = torch.rand(1, 3, 128, 128, requires_grad=True)
    y = net(x)
    y[0, 0, y.shape[2] // 2, y.shape[3] // 2].backward()
    rows = x.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    field = receptive_fields(reference_net("bn"))[-1].receptive_field
    assert rows.max() - rows.min() + 1 == field == 68


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: norm_layer("xx", 8), ["'xx'", "bn, ln, gn, in, none"]),
        (
            lambda: norm_layer("gn", 24, 7),
            ["num_groups=7", "24 channels", "1, 2, 3, 4, 6, 8, 12, 24"],
        ),
        (lambda: norm_layer("gn", 24, -1), ["num_groups=-1", "1, 2, 3"]),
        (lambda: NormNet("gn", num_groups=3), ["num_groups=3", "allowed here: 1, 2, 4, 8"]),
        (lambda: NormNet("gn", num_groups=0), ["num_groups=0", "1, 2, 4, 8"]),
        (lambda: NormNet("bn", num_classes=500), ["500 classes", "fewer than 50,000"]),
        (lambda: reference_net("in"), ["'in'", "bn 1, ln 1 or 2"]),
        (lambda: reference_net("bn", 2), ["multiplier 2", "bn 1"]),
        (lambda: build(Settings(net="resnet")), ["'resnet'", "normnet, reference"]),
    ],
)
def test_bad_input_says_what_is_allowed(call, words):
    with pytest.raises(CourseError) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)
