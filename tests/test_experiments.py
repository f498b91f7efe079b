"""The recorded experiments: their controls, resuming, and what is recorded."""

import importlib
import importlib.util
import json
import math
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import EXPERIMENTS, script
from torch import nn

from normcourse import fit, results
from normcourse.engine.record import read_record
from normcourse.norm import exchange_norms
from normcourse.train import Settings, build, default_settings, learning_rate

pytestmark = pytest.mark.usefixtures("experiments")


@pytest.fixture
def common(tmp_path, monkeypatch):
    """The shared module; records are in a folder of the test."""
    import common

    monkeypatch.setattr(common.results, "EXPERIMENTS", tmp_path)
    return common


@pytest.fixture
def shared():
    import shared_statistics

    return shared_statistics


@pytest.fixture
def command(common):
    """experiments/run.py."""
    return script("run")


def short(trial, **changed):
    return replace(
        trial, settings=replace(trial.settings, **{"epochs": 2, "batch_size": 16} | changed)
    )


# --- statistics from k images ---------------------------------------------------------------------


@pytest.mark.parametrize("k", [8, 4, 2])
def test_the_layer_is_torchs_batch_norm_of_each_part(shared, k):
    torch.manual_seed(0)
    x = (3 * torch.randn(8, 5, 4, 4) + 2).requires_grad_()
    ours = shared.PartBatchNorm(5, k)
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    y = ours(x)
    (gradient,) = torch.autograd.grad(y.pow(3).sum(), x)
    parts, means, variances = 8 // k, [], []
    for p in range(parts):
        theirs = nn.BatchNorm2d(5)
        theirs.load_state_dict(
            {"weight": ours.weight, "bias": ours.bias}
            | {"running_mean": torch.zeros(5), "running_var": torch.ones(5)}
            | {"num_batches_tracked": torch.tensor(0)}
        )
        images = slice(p * k, (p + 1) * k)
        part = x[images].detach().requires_grad_()
        expected = theirs(part)
        torch.testing.assert_close(y[images], expected)
        (expected_gradient,) = torch.autograd.grad(expected.pow(3).sum(), part)
        torch.testing.assert_close(gradient[images], expected_gradient)
        means.append(theirs.running_mean)
        variances.append(theirs.running_var)
    torch.testing.assert_close(ours.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(ours.running_var, torch.stack(variances).mean(0))


def test_frozen_statistics_are_used_and_stay(shared):
    torch.manual_seed(0)
    layer, x = shared.PartBatchNorm(5, 2), torch.randn(8, 5, 4, 4) + 3
    layer(x)
    before = layer.running_mean.clone()
    expected = layer.eval()(x)
    layer.train().frozen = True
    torch.testing.assert_close(layer(x), expected)
    assert layer.running_mean.equal(before)


def test_with_all_images_it_trains_like_the_course_to_the_last_bit(shared, common, small):
    data = small._replace(
        train_images=small.train_images[:64], train_labels=small.train_labels[:64]
    )
    trial = short(shared.batch_norm("k = 16", 16, seed=0), validate=False)
    record = common.run_trial("shared_statistics", "", replace(trial, bf16=False), data)
    settings = trial.settings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("normcourse.engine.fit.has_fast_bf16", lambda device: False)
        ours = fit(settings, data, progress=False)
    for figures, expected in zip(record["history"], ours["history"], strict=True):
        assert {**figures, "seconds": 0} == {**expected, "seconds": 0}


def test_precise_and_batch_statistics(shared, common, small):
    torch.manual_seed(0)
    trial = shared.batch_norm("k = 2", 2, seed=0)
    model = build(trial.settings)
    exchange_norms(model, lambda _, norm: shared.PartBatchNorm(norm.num_features, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    precise = common.with_precise_statistics(shared.plain_copy(model), small)
    image = torch.cat(common.inputs(common.some_images(small, 80), 80))
    first = precise.C1.conv(image)
    torch.testing.assert_close(
        precise.C1.norm.running_mean, first.mean((0, 2, 3)), atol=1e-4, rtol=1e-3
    )
    by_batch = shared.with_batch_statistics(model).eval()
    with torch.no_grad():
        assert (by_batch(image[:2]) - by_batch(image[:8])[:2]).abs().max() > 1e-3
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


# --- trials ---------------------------------------------------------------------------------------


def test_arms_of_a_seed_share_first_weights_and_order(shared, common, small):
    data = common.held_out(small, 16)
    assert len(data.train_labels) % 16 == 0 and len(data.test_labels) == 8
    runs = []
    for trial in list(shared.trials())[:7]:
        settings = short(trial).settings
        runs.append(common.fit.start(settings, data, common.CPU, True, trial.prepare))
    first = runs[0].model.state_dict()
    for run in runs[1:]:
        assert run.generator.get_state().equal(runs[0].generator.get_state())
        for name, value in run.model.state_dict().items():
            if ".norm." not in name:
                assert value.equal(first[name]), name


def test_a_stopped_trial_goes_on_to_the_same_record(shared, common, small, monkeypatch):
    data = common.held_out(small, 16)
    trial = short(shared.batch_norm("k = 2", 2, seed=0))
    whole = common.run_trial("whole", shared.__doc__, trial, data)
    epoch = common.fit.train_and_evaluate

    def stop(run, data, progress):
        if run.history:
            raise KeyboardInterrupt
        return epoch(run, data, progress)

    monkeypatch.setattr(common.fit, "train_and_evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        common.run_trial("stopped", shared.__doc__, trial, data)
    monkeypatch.setattr(common.fit, "train_and_evaluate", epoch)
    resumed = common.run_trial("stopped", shared.__doc__, trial, data)
    for a, b in zip(whole["history"], resumed["history"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    assert whole["figures"] == resumed["figures"] and whole["figures"].keys() >= {
        "precise",
        "batch",
    }
    assert whole["protocol"] == shared.__doc__ and whole["precision"] == "bf16 autocast"
    path = common.record_path("whole", trial)
    assert json.loads(path.read_text()) == json.loads(json.dumps(whole))


def test_a_trial_that_diverges_is_counted(shared, common, small):
    trial = short(shared.batch_norm("k = 2", 2, seed=0), lr=1e8, weight_decay=1e8)
    record = common.run_trial("diverged", "", trial, common.held_out(small, 16))
    assert (
        record["diverged"]
        and record["figures"] == {}
        and not list(common.results.EXPERIMENTS.rglob("*.ckpt"))
    )


def test_the_list_says_what_is_missing(shared, common, command):
    paths = [common.record_path("shared_statistics", trial) for trial in shared.trials()]
    assert len(set(paths)) == len(paths) == 24
    write(paths[0], made_here(common, seconds=7200))
    text = command.told("shared_statistics", shared)
    where = common.device_name(common.CPU)
    first = f"shared_statistics: 1 of 24 trials, 2.0 hours of training ({where})"
    assert text.splitlines()[0] == first
    assert "k = 128, seed 0" not in text and "k = 32, seed 0" in text


def made_here(common, **more):
    return common.origin(common.CPU, "fp32") | {"seconds": 60} | more


def write(path, record):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def test_a_seed_that_another_processor_began_is_trained_anew(shared, common):
    trials = list(shared.trials())
    paths = [common.record_path("shared_statistics", trial) for trial in trials]
    for path in paths[:8]:  # all of seed 0, elsewhere
        write(path, made_here(common, device="another"))
    write(paths[8], made_here(common))
    write(paths[9], made_here(common, device="another"))
    left = common.missing("shared_statistics", trials)
    assert left == trials[9:]
    paths[0].unlink()
    assert common.missing("shared_statistics", trials) == trials[:8] + trials[9:]


def test_no_two_processes_train_the_same(common, tmp_path):
    path = tmp_path / "folder" / "arm-seed0.json"
    with common.claimed(path) as first, common.claimed(path) as second:
        assert first and not second
    with common.claimed(path) as again:
        assert again
    assert not list(tmp_path.rglob("*.lock"))


def test_run_trains_what_is_missing_and_the_trials_that_wait_for_it(
    common, command, capsys, monkeypatch
):
    class Experiment:
        """Two arms; the second is known only when the first has its record."""

        __doc__, __name__ = "protocol", "toy"

        @staticmethod
        def load(source):
            return type("Text", (), {"name": "text", "copy": "0"})

        @staticmethod
        def trials():
            yield Toy("first")
            if common.record_path("toy", Toy("first")).exists():
                yield Toy("second")

    monkeypatch.setattr(command, "NAMES", ("toy",))
    monkeypatch.setitem(sys.modules, "toy", Experiment)
    command.main(["--list"])
    assert "toy: 0 of 1 trials" in capsys.readouterr().out
    command.main([])
    records = results.experiment("toy", results.EXPERIMENTS)
    assert [record["arm"] for record in records] == ["first", "second"]
    assert records[0]["protocol"] == "protocol"
    out = capsys.readouterr().out
    assert "toy, first, seed 0: accuracy 50" in out and "toy: 2 of 2 trials" in out
    command.main([])
    (out,) = capsys.readouterr().out.splitlines()  # nothing is missing
    assert "toy: 2 of 2 trials" in out


@dataclass(frozen=True)
class Toy:
    """A trial that only counts."""

    arm: str
    seed: int = 0

    def measure(self, data, path):
        figures = {"accuracy": 50.0}
        return {"settings": {"seed": 0}, "figures": figures, "diverged": False, "seconds": 1}


# --- the search for a rate ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracies", "steps", "best"),
    [
        ({0: 50, 1: 60, 2: 40}, [0, 1, 2], 1),
        ({0: 50, 1: 40, 2: 30}, [-1, 0, 1, 2], None),
        ({0: 50, 1: 40, 2: 30, -1: 45}, [-1, 0, 1, 2], 0),
        ({0: 10, 1: 40, 2: 50}, [0, 1, 2, 3], None),
        ({0: 10, 1: 40}, [0, 1, 2], None),
        ({0: 10, 1: 40, 2: None}, [0, 1, 2], 1),
    ],
)
def test_the_best_rate_lies_inside_the_grid(common, accuracies, steps, best):
    def at(step):
        return [common.Training(f"rate {2.0**step}", Settings(lr=2.0**step, validate=True))]

    for step, value in accuracies.items():  # None: diverged, counts as 10 %
        figures = {} if value is None else {"val_accuracy": value}
        record = {"diverged": value is None, "figures": figures}
        write(common.record_path("toy", at(step)[0]), record)
    assert common.search("toy", (0, 1, 2), at) == (steps, best)


def test_he_initialization_keeps_the_scale_and_is_the_same_in_every_arm(common):
    nets = {}
    for norm in ("bn", "none"):
        torch.manual_seed(0)
        nets[norm] = build(Settings(norm=norm))
        common.he_initialization(nets[norm])
    weights = dict(nets["none"].named_parameters())
    for name, weight in nets["bn"].named_parameters():
        if ".conv." in name:
            assert weight.equal(weights[name]), name
    torch.manual_seed(0)
    x = torch.randn(16, 3, 32, 32)
    assert 0.05 < nets["none"](x).std(0).mean() < 1  # with PyTorch's: 1e-7
    assert build(Settings(norm="none"))(x).std(0).mean() < 1e-3
    assert nets["none"].C1.conv[0].weight.std().item() == pytest.approx((2 / 27) ** 0.5, rel=0.1)
    assert nets["none"].C9.conv[1].weight.std().item() == pytest.approx((1 / 152) ** 0.5, rel=0.1)


# --- the other experiments ------------------------------------------------------------------------


def module(name):
    return importlib.import_module(name)


def trained(common, trial, data, **changed):
    """The history of a trial, in fp32, without the seconds."""
    record = common.run_trial("toy", "", replace(short(trial, **changed), bf16=False), data)
    return [{**epoch, "seconds": 0} for epoch in record["history"]]


def test_one_group_trains_like_layer_norm_and_c_groups_like_instance_norm(common, small):
    groups, data = module("groups"), common.held_out(small, 16)
    for num_groups, norm in ((1, "ln"), ("C", "in")):
        trial = groups.arm(num_groups, 0, seed=1)
        plain = common.Training(norm, Settings(norm=norm, lr=0.03, seed=1, validate=True))
        assert trained(common, trial, data) == trained(common, plain, data)


def test_groups_tries_rates_with_seed_0_and_judges_with_others(common):
    groups = module("groups")
    first = list(groups.trials())
    assert len(first) == 15 and {trial.seed for trial in first} == {0}
    for trial in first:
        best = 0.03 if trial.settings.norm == "gn" else 0.06
        accuracy = 80 - abs(trial.settings.lr - best)
        record = {"diverged": False, "figures": {"val_accuracy": accuracy}}
        write(common.record_path("groups", trial), record)
    (longer,) = [trial for trial in groups.trials() if trial.arm == "G = C, rate 0.12"]
    record = {"diverged": True, "figures": {}}
    write(common.record_path("groups", longer), record)
    judged = [trial for trial in groups.trials() if trial.seed > 0]
    assert {trial.seed for trial in judged} == {1, 2, 3} and len(judged) == 15
    rates = {trial.settings.lr for trial in judged if trial.settings.norm == "in"}
    assert rates == {0.06}


def test_precise_statistics_change_nothing_without_running_averages(common, small):
    torch.manual_seed(0)
    model = build(Settings(norm="gn"))
    before = common.predict(model, small.test_images, small)
    common.with_precise_statistics(model, small)
    assert common.predict(model, small.test_images, small).equal(before)


def test_the_main_table_publishes_what_the_command_trains(common, small, tmp_path, monkeypatch):
    table = module("main_table")
    monkeypatch.setattr(table, "RESULTS", tmp_path / "published")
    (tmp_path / "published").mkdir()
    trial = next(iter(table.trials()))
    history = trained(common, trial, small, epochs=1)
    assert 0 <= history[0].pop("precise_accuracy") <= 100
    (path,) = (tmp_path / "published").glob("*.json")
    record = read_record(path)
    published = {**record["history"][0], "seconds": 0}
    assert 0 <= published.pop("precise_accuracy") <= 100 and published == history[0]
    assert path.with_suffix(".pt").exists()  # of seed 0
    arms = [trial.arm for trial in table.trials()]
    assert len(arms) == 24 and arms.count("Group Norm") == 5 and arms.count("no norm, He") == 3


def test_per_pixel_is_over_c_h_w_on_maps_of_one_pixel():
    torch.manual_seed(0)
    x = torch.randn(4, 6, 1, 1)
    norm = module("layer_norm_axes").PixelLayerNorm(6)
    torch.testing.assert_close(norm(x), nn.GroupNorm(1, 6)(x))
    x = torch.randn(4, 6, 5, 5)
    expected = (x - x.mean(1, True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), expected)


def test_the_designs_are_trained_as_published():
    designs = module("published_designs")
    trials = list(designs.trials())
    assert len(trials) == 26 and not any(trial.bf16 for trial in trials)
    theirs = [trial for trial in trials if isinstance(trial, designs.AsPublished)]
    assert len(theirs) == 11
    for trial in theirs:
        s = trial.settings
        assert (s.batch_size, s.optimizer, s.schedule, s.momentum) == (64, "sgd", "step", 0.9)
        assert s.l1 * s.batch_size == pytest.approx(5e-4) and not s.flip and s.shift == 0
        rate = (0.1, 1e-3, 0.0) if s.norm == "bn" else (0.01, 1e-5, 0.001 * (s.norm == "gn"))
        assert (s.lr, s.weight_decay, s.dropout) == rate
    for trial in set(trials) - set(theirs):
        ours = default_settings(norm=trial.settings.norm)
        same = ("batch_size", "optimizer", "schedule", "lr", "weight_decay", "l1", "shift", "flip")
        for name in same:
            assert getattr(trial.settings, name) == getattr(ours, name)


def test_rates_of_both_arms_before_longer_trainings(common):
    rates = module("larger_rates")
    first = list(rates.trials())
    assert {trial.settings.epochs for trial in first} == {2}
    for trial in first:
        best = 0.1 if trial.settings.norm == "bn" else 0.01
        accuracy = 80 - abs(math.log(trial.settings.lr / best))
        record = {"diverged": False, "figures": {"val_accuracy": accuracy}}
        write(common.record_path("larger_rates", trial), record)
    longer = [trial for trial in rates.trials() if trial.settings.epochs == 5]
    arms = {(trial.settings.norm, trial.settings.lr) for trial in longer}
    assert arms == {("bn", 0.1), ("bn", 0.01), ("none", 0.1), ("none", 0.01)}
    assert {trial.seed for trial in longer} == {3, 4, 5} and len(longer) == 12
    assert all(learning_rate(trial.settings, 1.9) == trial.settings.lr for trial in first)


def test_behind_a_norm_the_gradient_is_across_the_weights(common, small):
    rates = module("rates_by_norm")
    figures = {}
    for norm in ("bn", "ln", "gn", "in", "none"):
        (trial, *_) = rates.trainings(norm, -3)
        figures[norm] = common.run_trial("toy", "", short(trial, epochs=1), small)["figures"]
    assert all(figures[norm]["along"] < 1e-3 for norm in ("bn", "ln", "gn", "in"))
    assert figures["none"]["along"] > 0.02
    assert all(value > 0 for name, value in figures["bn"].items() if name.startswith("growth"))


def test_every_experiment_has_a_protocol_and_the_command_knows_it(common, command):
    for name in command.NAMES:
        experiment = module(name)
        for word in ("Varies:", "Held:", "Judged", "Control", "Seeds", "Cost", "found"):
            assert word in experiment.__doc__, (name, word)
        paths = [common.record_path(name, trial) for trial in experiment.trials()]
        assert len(set(paths)) == len(paths) > 0
    others = {"common", "run", "publish", "lr_search"}
    assert {path.stem for path in EXPERIMENTS.glob("*.py")} - others == set(command.NAMES)


# --- the committed records ------------------------------------------------------------------------


def committed():
    return sorted(results.EXPERIMENTS.glob("*/*.json"))


@pytest.mark.parametrize("path", committed(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_committed_record_is_whole(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["experiment"] == path.parent.name
    assert record["protocol"] == module(path.parent.name).__doc__
    assert record["device"] and record["versions"] and record["precision"]
    assert all(map(math.isfinite, record["figures"].values()))
    assert record["diverged"] or record["figures"]


@pytest.mark.parametrize("name", sorted({path.parent.name for path in committed()}))
def test_arms_of_a_seed_share_processor_version_and_precision(name):
    made = {}
    for record in results.experiment(name):
        kind = (record["device"], record["versions"]["torch"], record["precision"])
        made.setdefault(record["settings"]["seed"], set()).add(kind)
    assert all(len(kinds) == 1 for kinds in made.values()), made


@pytest.mark.parametrize("words", [["nothing"], ["--nothing"]])
def test_bad_words_are_refused(words, command, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(words)
    assert stop.value.code == 2 and "error" in capsys.readouterr().err
