"""The recorded experiments: their controls, resuming, and what is recorded."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from normcourse import fit
from normcourse.norm import exchange_norms
from normcourse.train import build

FOLDER = Path(__file__).resolve().parent.parent / "experiments"


@pytest.fixture(scope="module", autouse=True)
def _path():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture
def common(tmp_path, monkeypatch):
    """The shared module, its records in a folder of the test."""
    import common

    monkeypatch.setattr(common, "RECORDS", tmp_path)
    return common


@pytest.fixture
def shared():
    import shared_statistics

    return shared_statistics


@pytest.fixture
def command(common):
    """experiments/run.py, which is not the only module of that name."""
    spec = importlib.util.spec_from_file_location("experiments_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_precise_and_batch_statistics(shared, small):
    torch.manual_seed(0)
    trial = shared.batch_norm("k = 2", 2, seed=0)
    model = build(trial.settings)
    exchange_norms(model, lambda _, norm: shared.PartBatchNorm(norm.num_features, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    precise = shared.precise_statistics(model, small)
    image = torch.cat(shared.inputs(shared.some_images(small, 80), 80))
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
    runs = [common.start(short(trial), data) for trial in list(shared.trials())[:7]]
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
    assert common.run_trial("whole", "", trial, None) == json.loads(
        json.dumps(whole)
    )  # is only read


def test_a_trial_that_diverges_is_counted(shared, common, small):
    trial = short(shared.batch_norm("k = 2", 2, seed=0), lr=1e8, weight_decay=1e8)
    record = common.run_trial("diverged", "", trial, common.held_out(small, 16))
    assert (
        record["diverged"] and record["figures"] == {} and not list(common.RECORDS.rglob("*.ckpt"))
    )


def test_every_trial_has_its_record_and_the_list_says_what_is_missing(shared, common, command):
    paths = [trial.path("shared_statistics") for trial in shared.trials()]
    assert len(set(paths)) == len(paths) == 24
    paths[0].parent.mkdir(parents=True)
    paths[0].with_suffix(".json").write_text('{"seconds": 7200}')
    text = command.told("shared_statistics")
    assert text.startswith("shared_statistics: 1 of 24 trials, 2.0 hours")
    assert paths[0].name not in text and paths[1].name in text


@pytest.mark.parametrize(
    "path", sorted(FOLDER.glob("records/*/*.json")), ids=lambda path: path.stem
)
def test_a_committed_record_is_whole(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["data"] == "CIFAR-10" and record["experiment"] == path.parent.name
    assert record["protocol"] and record["device"] and record["versions"] and record["precision"]
    assert record["diverged"] or len(record["history"]) == record["settings"]["epochs"]
    assert record["diverged"] or all(0 <= value <= 100 for value in record["figures"].values())


@pytest.mark.parametrize("words", [["nothing"], ["--part", "2/2"], ["--part", "half"]])
def test_bad_words_are_refused(words, command, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(words)
    assert stop.value.code == 2 and "error" in capsys.readouterr().err
