"""Plant an error in a layer of notebook 00: the checks that pass on the layer must find it."""

import pytest
from layer_checks import CHECKS, KINDS
from notebook_tools import definitions

VARIANCE = "var = (x - mean).square().mean(axes, keepdim=True)  # divides by the number of entries"
UNBIASED = "var = x.var(axes, correction=1, keepdim=True)"
OF_SQUARES = "var = x.square().mean(axes, keepdim=True) - mean.square()"
RETURN = "return mean, var\n"
ROOT = "torch.sqrt(var + eps)\n"
# the name of the error, the check that has to notice it, the line, the line with the error
IN_ALL_LAYERS = [  # the layers share `statistics` and `normalize`, so each of them must notice
    ("unbiased variance", "training", VARIANCE, UNBIASED),
    ("statistics without gradient", "training", RETURN, "return mean.detach(), var.detach()\n"),
    ("mean without gradient", "training", RETURN, "return mean.detach(), var\n"),
    ("E[x^2] - E[x]^2", "large_mean", VARIANCE, OF_SQUARES),
    ("eps outside the root", "small_variance", ROOT, "(torch.sqrt(var) + eps)\n"),
]
MEAN_BUFFER = 'self.register_buffer("running_mean", torch.zeros(num_features))'
NO_BUFFER = "self.running_mean = torch.zeros(num_features)"
PARAMETER = "self.running_mean = nn.Parameter(torch.zeros(num_features))"
VAR_BUFFER = 'self.register_buffer("running_var", torch.ones(num_features))'
NOT_SAVED = VAR_BUFFER[:-1] + ", persistent=False)"
NEIGHBOURS = """z = x.reshape(N, self.num_groups, C // self.num_groups, H, W)  # (N, G, C/G, H, W)
        x_hat = normalize(z, *statistics(z, (2, 3, 4)), self.eps).reshape(x.shape)"""
IN_TURN = """z = x.reshape(N, C // self.num_groups, self.num_groups, H, W)
        x_hat = normalize(z, *statistics(z, (1, 3, 4)), self.eps).reshape(x.shape)"""
POSITIONS = "return normalize(x, *statistics(x, (2, 3)))"
ENTRIES = "self.eps) * self.weight + self.bias"
BATCH = "statistics(x, (0, 2, 3))  # (1, C, 1, 1)"
IN_ONE_LAYER = {
    "BatchNorm": [
        ("biased running variance", "training", "var * m / (m - 1)", "var"),
        ("eval ignored", "evaluation", "if self.training:", "if True:"),
        ("running_mean no buffer", "state_dict", MEAN_BUFFER, NO_BUFFER),
        ("running_mean a parameter", "training", MEAN_BUFFER, PARAMETER),
        ("running_var not saved", "state_dict", VAR_BUFFER, NOT_SAVED),
        ("momentum of the other convention", "training", "momentum=0.1", "momentum=0.9"),
        ("batches not counted", "training", "self.num_batches_tracked += 1\n", "pass\n"),
        ("mean over the batch only", "training", BATCH, "statistics(x, (0,))"),
    ],
    "LayerNorm": [
        ("over the last axis only", "training", "range(-len(self.normalized_shape), 0)", "[-1]"),
        ("no shift", "training", ENTRIES, ENTRIES.replace(" + self.bias", "")),
    ],
    "InstanceNorm": [
        ("over all channels", "training", POSITIONS, POSITIONS.replace("(2, 3)", "(1, 2, 3)"))
    ],
    "GroupNorm": [("channels dealt out to groups in turn", "training", NEIGHBOURS, IN_TURN)],
}
CASES = [(kind, *mutant) for mutant in IN_ALL_LAYERS for kind in KINDS]
CASES += [(kind, *mutant) for kind, mutants in IN_ONE_LAYER.items() for mutant in mutants]


def failures(defs, kind):
    """The checks that the layer fails; any error counts: a reader's layer would stop there too."""
    failed = []
    for check in CHECKS:
        try:
            check(defs, kind)
        except (AssertionError, RuntimeError, TypeError):
            failed.append(check.__name__)
    return failed


@pytest.mark.parametrize("kind", KINDS)
def test_the_original_fails_nothing(kind):
    assert failures(definitions(), kind) == []


@pytest.mark.parametrize(
    ("kind", "name", "check", "old", "new"),
    CASES,
    ids=[f"{kind}: {name}" for kind, name, *_ in CASES],
)
def test_mutant_is_caught(kind, name, check, old, new):
    mutant = definitions(
        replace=(old, new)
    )  # outside the try: a substitution that fits nothing fails the test
    assert f"check_{check}" in failures(mutant, kind), name


@pytest.mark.parametrize(
    "replace", [("no such line", "anything"), ("return", "return"), ("mean", "median")]
)
def test_a_substitution_that_does_not_fit_fails(replace):
    with pytest.raises(AssertionError, match="not well defined"):
        definitions(replace=replace)
