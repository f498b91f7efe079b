"""The experiments on text and on sequences: their controls, and what a trial records."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("experiments")


@pytest.fixture
def transformer():
    import transformer

    return transformer


@pytest.fixture(scope="module")
def text(experiments):
    import transformer

    return transformer.load(None)


@pytest.fixture
def sequences():
    import sequences

    return sequences


def outside_the_norms(network):
    """The weights that arms share."""
    return {name: p for name, p in network.named_parameters() if "norm" not in name}


def check_trials(trials, seeds):
    """Seed by seed, each arm once a seed, three rates or more for each arm."""
    trials = list(trials)
    arms = [trial.arm for trial in trials if trial.seed == 0]
    assert [(t.seed, t.arm) for t in trials] == [(seed, arm) for seed in seeds for arm in arms]
    assert len(set(arms)) == len(arms)
    for kind in {arm.partition(", rate")[0] for arm in arms}:
        assert sum(arm.startswith(f"{kind}, rate ") for arm in arms) >= 3, kind


def check_record(record, trial, steps):
    """What experiments/common.py asks of a trial, as a file can hold it."""
    record = json.loads(json.dumps(record, allow_nan=False))
    assert record["settings"]["seed"] == trial.seed and record["settings"]["rate"] == trial.rate
    assert [entry["step"] for entry in record["history"]] == steps
    assert all(entry.keys() >= {"train_loss", "val_loss"} for entry in record["history"])
    assert record["parameters"] > 0 and record["seconds"] > 0 and record["precision"] == "fp32"
    assert all(math.isfinite(value) for value in record["figures"].values())
    assert record["diverged"] == (not record["figures"])


# --- the transformer: norms -----------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(nn, "RMSNorm"), reason="torch before 2.4 has no RMSNorm")
@pytest.mark.parametrize("size", [1e-3, 1, 100])
def test_rmsnorm_is_torchs(transformer, size):
    torch.manual_seed(0)
    ours, theirs = transformer.RMSNorm(64), nn.RMSNorm(64, eps=1e-5)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    x = size * torch.randn(3, 5, 64) + size
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("kind", "blind"), [("pre-norm", True), ("pre-RMSNorm", True), ("none", False)]
)
def test_what_a_pre_norm_layer_adds_does_not_depend_on_the_size_of_its_input(
    transformer, kind, blind
):
    torch.manual_seed(0)
    layer = transformer.Layer(transformer.KINDS[kind]).double()
    x = torch.randn(2, 7, 64, dtype=torch.float64)

    def attended(x):
        return layer.attention(layer.norm1(x))

    def added(x):
        return layer.mlp(layer.norm2(x))

    for part in (attended, added):
        usual, larger = part(x), part(10 * x)
        assert torch.allclose(usual, larger, atol=1e-4) is blind
    torch.testing.assert_close(layer(x), x + attended(x) + added(x + attended(x)))


def test_a_post_norm_layer_ends_normalized(transformer):
    torch.manual_seed(0)
    layer = transformer.Layer(transformer.KINDS["post-norm"])
    x = 5 * torch.randn(2, 7, 64) + 3
    middle = layer.norm1(x + layer.attention(x))
    torch.testing.assert_close(layer(x), layer.norm2(middle + layer.mlp(middle)))
    torch.testing.assert_close(layer(x), F.layer_norm(layer(x), (64,)), atol=1e-4, rtol=1e-4)


def test_each_kind_has_the_norms_of_its_name(transformer):
    found = {}
    for name, kind in transformer.KINDS.items():
        modules = list(transformer.Transformer(kind, 10).modules())
        counts = [
            sum(isinstance(m, t) for m in modules) for t in (nn.LayerNorm, transformer.RMSNorm)
        ]
        found[name] = counts
    assert found["post-norm"] == found["post-norm with warm-up"] == [16, 0]
    assert found["pre-norm"] == found["pre-norm, torch's weights"] == [17, 0]
    assert found["pre-RMSNorm"] == [0, 17]
    assert found["none"] == found["none, torch's weights"] == [0, 0]


# --- the transformer: controls --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["post-norm", "pre-RMSNorm", "none"])
def test_with_a_head_of_zeros_the_loss_is_that_of_the_uniform_guess(transformer, text, name):
    torch.manual_seed(0)
    model = transformer.Transformer(transformer.KINDS[name], text.vocabulary)
    few = text._replace(held_out=text.held_out[:140])  # a whole part and a short one
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    uniform = math.log(text.vocabulary)
    assert transformer.loss_of(model, few.held_out).item() == pytest.approx(uniform, rel=1e-5)
    assert transformer.held_out_loss(model, few) == pytest.approx(uniform, rel=1e-5)
    sizes = transformer.gradient_sizes(model, few.held_out[:4])
    assert list(sizes.values()) == [0] * transformer.NUM_LAYERS  # nothing passes such a head


def test_no_prediction_sees_a_later_character(transformer):
    torch.manual_seed(0)
    model = transformer.Transformer(transformer.KINDS["pre-norm"], 10)
    tokens = torch.randint(9, (2, 64))
    changed = tokens.clone()
    changed[:, 30] = 9
    moved = (model(tokens) - model(changed)).abs().amax((0, 2))  # (64,)
    assert moved[:30].max() < 1e-5 and moved[30:].min() > 1e-4


def test_a_network_is_judged_by_the_next_character(transformer, text):
    counted = torch.arange(33 * 65).view(33, 65) % 10

    def knows(tokens):
        return 100.0 * F.one_hot((tokens + 1) % 10, 10)

    assert transformer.loss_of(knows, counted).item() < 1e-5
    assert transformer.held_out_loss(knows, text._replace(held_out=counted)) < 1e-5


def test_the_held_out_loss_is_the_mean_over_all_windows(transformer, text):
    torch.manual_seed(0)
    model = transformer.Transformer(transformer.KINDS["pre-norm"], text.vocabulary)
    few = text._replace(held_out=text.held_out[:140])
    with torch.no_grad():
        expected = transformer.loss_of(model, few.held_out).item()
    assert transformer.held_out_loss(model, few) == pytest.approx(expected, rel=1e-5)


def test_the_size_of_a_gradient_is_the_slope_along_it(transformer, text):
    torch.manual_seed(0)
    model = transformer.Transformer(transformer.KINDS["post-norm"], text.vocabulary).double()
    windows, weight = text.held_out[:2], model.layers[2].second.weight
    size = transformer.gradient_sizes(model, windows)["gradient 3"]
    (direction,) = torch.autograd.grad(transformer.loss_of(model, windows), [weight])
    step = 1e-5 * direction / direction.norm()
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step
            losses.append(transformer.loss_of(model, windows).item())
            weight -= sign * step
    assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(size, rel=1e-3)


def test_the_loss_of_frequencies(transformer, text):
    few = text._replace(vocabulary=2, train=torch.tensor([0] * 6 + [1] * 2))
    seen = few._replace(held_out=torch.tensor([[0, 1, 1], [1, 1, 0]]))
    guess = (3 * math.log(3 / 10) + math.log(7 / 10)) / 4  # one more of each is counted
    assert transformer.frequencies_loss(seen) == pytest.approx(-guess)
    even = text._replace(train=torch.arange(text.vocabulary).repeat(50))
    uniform = math.log(text.vocabulary)
    assert transformer.frequencies_loss(even) == pytest.approx(uniform, rel=1e-5)
    assert 3 < transformer.frequencies_loss(text) < 3.5  # English letters: 2.9, and other signs


# --- the transformer: data and trials -------------------------------------------------------------


def test_each_character_of_the_last_tenth_is_predicted_once(transformer, text):
    from pydoc_data.topics import topics

    whole = "".join(topics[topic] for topic in sorted(topics))
    number = {character: k for k, character in enumerate(sorted(set(whole)))}
    numbers = torch.tensor([number[character] for character in whole])
    assert text.train.equal(numbers[: len(text.train)]) and text.vocabulary == len(number)
    predicted = text.held_out[:, 1:].flatten()
    first = len(text.train) + 1
    assert predicted.equal(numbers[first : first + len(predicted)])
    assert len(numbers) * 0.9 - 1 < len(text.train) <= len(numbers) * 0.9
    assert len(numbers) - first - len(predicted) < transformer.CONTEXT
    windows = next(transformer.batches(text._replace(train=torch.arange(1000)), 0))
    assert (windows.diff(dim=1) == 1).all() and windows.shape == (32, 65)


def test_warm_up_changes_the_first_steps_alone(transformer):
    steps = range(transformer.STEPS)
    plain = [transformer.share(step, warm_up=False) for step in steps]
    risen = [transformer.share(step, warm_up=True) for step in steps]
    assert plain[0] == 1 and 0 < plain[-1] < 0.01 and plain == sorted(plain, reverse=True)
    assert risen[0] == pytest.approx(0.01) and risen[99:] == plain[99:]
    assert all(ours < theirs for ours, theirs in zip(risen[:99], plain, strict=False))


def test_arms_share_first_weights_and_batches(transformer, text):
    weights = {}
    for name, kind in transformer.KINDS.items():
        torch.manual_seed(0)
        weights[name] = outside_the_norms(transformer.Transformer(kind, text.vocabulary))
    for name in weights:
        first = weights["none, torch's weights" if "torch" in name else "none"]
        assert weights[name].keys() == first.keys()
        assert all(weights[name][key].equal(value) for key, value in first.items()), name
    one, other = weights["none"], weights["none, torch's weights"]
    different = {name for name in one if not one[name].equal(other[name])}
    assert different == {name for name in one if "token" not in name and "position" not in name}
    streams = [transformer.batches(text, seed) for seed in (0, 0, 1)]
    batches = [next(stream) for stream in streams]
    assert batches[0].equal(batches[1]) and not batches[0].equal(batches[2])
    assert not next(streams[0]).equal(batches[0])


def test_the_transformers_trials(transformer):
    check_trials(transformer.trials(), transformer.SEEDS)
    assert len(list(transformer.trials())) == 84


def test_a_trial_of_the_transformer_records_it_all(transformer, text, monkeypatch):
    for name, value in {"STEPS": 6, "EVERY": 3, "WARM_UP": 2}.items():
        monkeypatch.setattr(transformer, name, value)
    few = text._replace(held_out=text.held_out[:8])
    trial = transformer.Trial("post-norm with warm-up", 0.004, 1)
    record = trial.measure(few, Path("unused"))
    check_record(record, trial, [3, 6])
    assert record["history"][1]["val_loss"] < record["history"][0]["val_loss"]
    figures = {"validation loss", "letter frequencies", *(f"gradient {k}" for k in range(1, 9))}
    assert record["figures"].keys() == figures
    assert record["figures"]["validation loss"] == record["history"][-1]["val_loss"]
    again = trial.measure(few, Path("unused"))
    assert again["history"] == record["history"] and again["figures"] == record["figures"]


@pytest.mark.parametrize(("rate", "steps"), [(0.02, [3, 6]), (1e30, [])])
def test_a_transformer_that_diverges_is_counted(transformer, text, monkeypatch, rate, steps):
    """Its loss ends above the uniform guess's, or is not finite."""
    for name, value in {"STEPS": 6, "EVERY": 3}.items():
        monkeypatch.setattr(transformer, name, value)
    trial = transformer.Trial("none", rate, 0)
    record = trial.measure(text._replace(held_out=text.held_out[:8]), Path("unused"))
    assert record["diverged"]
    check_record(record, trial, steps)


# --- sequences: norms -----------------------------------------------------------------------------


def test_layer_norm_and_rmsnorm_of_a_step_are_torchs(sequences):
    torch.manual_seed(0)
    z = 3 * torch.randn(6, 32) + 1
    gain = torch.full((32,), 0.1)
    torch.testing.assert_close(sequences.LayerNorm()(z, None, 0), F.layer_norm(z, (32,), gain))
    if hasattr(F, "rms_norm"):  # since torch 2.4
        expected = F.rms_norm(z, (32,), gain, eps=1e-5)
        torch.testing.assert_close(sequences.RMSNorm()(z, None, 0), expected)


def test_batch_norm_of_a_step_is_torchs_of_the_sequences_that_go_on(sequences):
    torch.manual_seed(0)
    ours, theirs = sequences.BatchNorm(), nn.BatchNorm1d(32)
    nn.init.constant_(theirs.weight, 0.1)
    real = torch.tensor([True, False, True, True, False, True])
    for _ in range(3):
        z = 3 * torch.randn(6, 32) + 1
        torch.testing.assert_close(ours(z, real, 5)[real], theirs(z[real]))
    torch.testing.assert_close(ours.means[5], theirs.running_mean)
    torch.testing.assert_close(ours.variances[5], theirs.running_var)
    others = [step for step in range(16) if step != 5]
    assert ours.means[others].eq(0).all() and ours.variances[others].eq(1).all()
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(z, real, 5), theirs(z))


@pytest.mark.parametrize("left", [0, 1])
def test_with_one_sequence_left_batch_norm_uses_running_statistics(sequences, left):
    torch.manual_seed(0)
    norm, z = sequences.BatchNorm(), torch.randn(4, 32)
    norm.means.normal_(), norm.variances.uniform_(1, 2)
    before = norm.means.clone()
    trained = norm(z, torch.arange(4) < left, 3)
    torch.testing.assert_close(trained, norm.eval()(z, torch.ones(4).bool(), 3))
    assert norm.means.equal(before)


def test_with_two_sequences_left_it_uses_theirs(sequences):
    torch.manual_seed(0)
    norm, z = sequences.BatchNorm(), torch.randn(4, 32)
    expected = F.batch_norm(z[:2], None, None, norm.gamma, None, True)
    torch.testing.assert_close(norm(z, torch.arange(4) < 2, 3)[:2], expected)


def test_what_judges_is_read_with_running_statistics(sequences):
    torch.manual_seed(0)
    network = sequences.Recurrent("Batch Norm")
    batch = sequences.draw(8, 8, 8, sequences.seeded(0))
    before = network.norm.means.clone()
    together = sequences.evaluate(network, batch)
    alone = [
        sequences.evaluate(network, sequences.Batch(*(x[k : k + 1] for x in batch)))
        for k in range(8)
    ]
    assert torch.tensor(alone).mean(0).tolist() == pytest.approx(together, rel=1e-5)
    assert network.norm.means.equal(before) and network.training


def test_beyond_the_longest_batch_norm_has_the_statistics_of_the_last_step(sequences):
    torch.manual_seed(0)
    norm, z, real = sequences.BatchNorm().eval(), torch.randn(4, 32), torch.ones(4).bool()
    norm.means.normal_()
    assert norm(z, real, 40).equal(norm(z, real, 15))
    assert not norm(z, real, 14).equal(norm(z, real, 15))


# --- sequences: controls --------------------------------------------------------------------------


@pytest.fixture
def two_batches(sequences):
    """Two batches of 8 sequences; the first of both is the same."""
    batch, other = (sequences.draw(8, 8, 8, sequences.seeded(seed)) for seed in (0, 1))
    other.tokens[0] = batch.tokens[0]
    return batch, other


@pytest.mark.parametrize(
    ("name", "blind"),
    [
        ("no norm", True),
        ("no norm, learned gain", True),
        ("Layer Norm", True),
        ("RMSNorm", True),
        ("Batch Norm", False),
    ],
)
def test_padding_changes_no_answer_and_the_batchmates_only_batch_norms(
    sequences, two_batches, name, blind
):
    torch.manual_seed(0)
    network = sequences.Recurrent(name)  # in training mode
    batch, other = two_batches
    usual, moved = (network(each.tokens, each.real)[0] for each in (batch, other))
    padded = network(F.pad(batch.tokens, (0, 8), value=5), F.pad(batch.real, (0, 8)))
    torch.testing.assert_close(padded[0], usual)
    assert torch.allclose(moved, usual, atol=1e-5) is blind


def test_a_gain_of_one_is_no_norm_to_the_last_bit(sequences, two_batches):
    answers = []
    for name in ("no norm", "no norm, learned gain"):
        torch.manual_seed(0)
        network = sequences.Recurrent(name)
        if name != "no norm":
            assert network.norm.gamma.eq(0.1).all()
            nn.init.ones_(network.norm.gamma)
        answers.append(network(two_batches[0].tokens, two_batches[0].real))
    assert answers[0].equal(answers[1])


@pytest.mark.parametrize(("name", "blind"), [("Batch Norm", True), ("Layer Norm", False)])
@pytest.mark.parametrize("part", ["W", "U"])
def test_batch_norm_takes_the_size_out_of_each_part_by_itself(
    sequences, two_batches, name, blind, part
):
    torch.manual_seed(0)
    network, batch = sequences.Recurrent(name), two_batches[0]
    nn.init.uniform_(network.norm.gamma)
    usual = network(batch.tokens, batch.real)
    with torch.no_grad():
        getattr(network, part).mul_(10)
    moved = network(batch.tokens, batch.real)
    assert torch.allclose(moved, usual, atol=0.02) is blind  # but for EPS


def test_each_part_has_a_gain_of_its_own(sequences, two_batches):
    torch.manual_seed(0)
    network, batch = sequences.Recurrent("Batch Norm"), two_batches[0]
    nn.init.zeros_(network.norm_input.gamma)
    assert network(batch.tokens, batch.real).eq(0).all()  # no input, no state


def test_precise_statistics_are_those_of_many_sequences(sequences):
    torch.manual_seed(0)
    network = sequences.Recurrent("Batch Norm")
    precise = sequences.with_precise_statistics(network)
    assert network.norm.means.eq(0).all() and network.norm.momentum == 0.1  # stays
    first, later = torch.arange(sequences.COMMANDS), torch.arange(sequences.TOKENS)
    for step, tokens in ((0, first), (9, later)):  # W x of a token drawn evenly
        values = network.W.detach()[tokens]
        difference = precise.norm_input.means[step] - values.mean(0)
        assert difference.abs().max() < 5 * values.std() / 2000**0.5
    assert precise.norm.means[0].eq(0).all() and precise.norm.means[15].ne(0).all()


# --- sequences: data and trials -------------------------------------------------------------------


def test_the_answer_is_the_last_command(sequences):
    batch = sequences.draw(200, 3, 12, sequences.seeded(0))
    lengths = batch.real.sum(1)
    assert lengths.min() == 3 and lengths.max() == 12
    for tokens, real, answer in zip(*batch, strict=True):
        read = tokens[: real.sum()].tolist()
        assert [token for token in read if token < 4][-1] == answer and real[: real.sum()].all()


def test_what_judges_has_the_lengths_of_its_name_and_is_in_no_training(sequences):
    batches = sequences.load(None).batches
    lengths = {name: batch.real.sum(1) for name, batch in batches.items()}
    for name, least, most in (("validation", 1, 16), ("known", 1, 16), ("longer", 17, 64)):
        assert lengths[name].min() == least and lengths[name].max() == most
    for n in sequences.LENGTHS:
        assert lengths[f"length {n}"].eq(n).all()
    assert not batches["validation"].tokens.equal(batches["known"].tokens)
    for seed in sequences.SEEDS:
        tokens = sequences.draw(32, 1, 16, sequences.seeded(seed)).tokens
        for batch in batches.values():
            width = min(16, batch.tokens.shape[1])
            assert not tokens[:, :width].equal(batch.tokens[:32, :width])


def test_arms_of_sequences_share_first_weights(sequences):
    weights = []
    for name in sequences.RATES:
        torch.manual_seed(0)
        weights.append(outside_the_norms(sequences.Recurrent(name)))
    for other in weights[1:]:
        assert other.keys() == weights[0].keys() == {"W", "U", "out", "beta"}
        assert all(other[key].equal(value) for key, value in weights[0].items())


def test_arms_of_sequences_train_on_the_same_batches(sequences, monkeypatch):
    monkeypatch.setattr(sequences, "STEPS", 2)
    data, draw, drawn = sequences.load(None), sequences.draw, []
    monkeypatch.setattr(sequences, "draw", lambda *words: drawn.append(draw(*words)) or drawn[-1])
    for name in ("no norm", "RMSNorm"):
        torch.manual_seed(len(drawn))
        trial = sequences.Trial(name, 8, 0.03, 0)
        sequences.train(sequences.Recurrent(name), trial, data)
    assert len(drawn) == 4 and drawn[0].tokens.shape == (8, 16)
    assert drawn[0].tokens.equal(drawn[2].tokens) and drawn[1].tokens.equal(drawn[3].tokens)
    assert not drawn[0].tokens.equal(drawn[1].tokens)


def test_the_trials_of_sequences(sequences):
    check_trials(sequences.trials(), sequences.SEEDS)
    assert len(list(sequences.trials())) == 200


@pytest.mark.parametrize("name", ["no norm", "Batch Norm"])
def test_a_trial_of_sequences_records_it_all(sequences, monkeypatch, name):
    monkeypatch.setattr(sequences, "STEPS", 100)
    data = sequences.load(None)
    trial = sequences.Trial(name, 8, 0.01, 2)
    record = trial.measure(data, Path("unused"))
    check_record(record, trial, [50, 100])
    precise = {"known, precise", "longer, precise"} if name == "Batch Norm" else set()
    assert record["figures"].keys() == {"validation loss", *data.batches, *precise}
    assert record["figures"]["length 1"] > 90 and record["figures"]["known"] > 40  # it learns
    assert record["figures"]["validation loss"] == record["history"][-1]["val_loss"]
    again = trial.measure(data, Path("unused"))
    assert again["history"] == record["history"] and again["figures"] == record["figures"]


def test_sequences_that_diverge_are_counted(sequences, monkeypatch):
    monkeypatch.setattr(sequences, "STEPS", 50)
    trial = sequences.Trial("no norm", 8, 1e36, 0)
    record = trial.measure(sequences.load(None), Path("unused"))
    assert record["diverged"]
    check_record(record, trial, [])


@pytest.fixture
def rates(monkeypatch):
    """The rates of all steps that Adam takes in a test."""
    taken = []
    for optimizer in (torch.optim.Adam, torch.optim.AdamW):

        class Spy(optimizer):
            def step(self, closure=None):
                taken.append(self.param_groups[0]["lr"])
                return super().step(closure)

        monkeypatch.setattr(torch.optim, optimizer.__name__, Spy)
    return taken


def test_the_rate_of_sequences_falls_in_a_line(sequences, monkeypatch, rates):
    monkeypatch.setattr(sequences, "STEPS", 4)
    network, trial = sequences.Recurrent("no norm"), sequences.Trial("no norm", 8, 0.1, 0)
    sequences.train(network, trial, sequences.load(None))
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])


@pytest.mark.parametrize(
    ("name", "parts"),
    [("post-norm", [1, 0.75, 0.5, 0.25]), ("post-norm with warm-up", [0.5, 0.75, 0.5, 0.25])],
)
def test_the_rate_of_the_transformer(transformer, text, monkeypatch, rates, name, parts):
    monkeypatch.setattr(transformer, "STEPS", 4)
    monkeypatch.setattr(transformer, "WARM_UP", 2)
    model = transformer.Transformer(transformer.KINDS[name], text.vocabulary)
    transformer.train(model, transformer.Trial(name, 0.001, 0), text)
    assert rates == pytest.approx([0.001 * part for part in parts])


# --- both -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["transformer", "sequences"])
def test_each_trial_has_a_record_of_its_own(name):
    import importlib

    import common

    module = importlib.import_module(name)
    trials = list(module.trials())
    assert len({common.record_path(name, trial) for trial in trials}) == len(trials)
