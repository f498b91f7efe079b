"""The miniatures: what they train on, that they go on where they stopped, their records."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from normcourse import CourseError, NormNet, count_parameters, default_settings, predict
from normcourse.data import batches
from normcourse.norm import NORMS
from normcourse.results import EXPERIMENTS, experiment
from normcourse.train import LEARNING_RATES, Settings

FILE = Path(__file__).resolve().parent.parent / "experiments" / "miniatures.py"
spec = importlib.util.spec_from_file_location("run_miniatures", FILE)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
NAMES = list(script.EPOCHS)


def command(folder, *words):
    """Run the script on digits, tiny, in a folder."""
    places = ["--work", f"{folder}/work", "--out", f"{folder}/out"]
    script.main([*words, "--data", "digits", "--preliminary", *places])


def shrink(monkeypatch):
    """One seed, and fewer points of each miniature."""
    monkeypatch.setattr(script, "SEEDS", (0,))
    monkeypatch.setattr(script, "OTHER_SEEDS", (3,))
    monkeypatch.setattr(script, "FACTORS", (1, 3))
    monkeypatch.setattr(script, "BATCH_SIZES", (8, 2))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All miniatures, small, made by the command."""
    folder = tmp_path_factory.mktemp("miniatures")
    with pytest.MonkeyPatch.context() as monkeypatch:
        shrink(monkeypatch)
        command(folder)
    return folder


# --- the data -------------------------------------------------------------------------------------


@pytest.fixture
def numbered(digits):
    """100 training images of 10 classes, sorted as an image folder's; a number is a colour."""
    colours = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1)
    images = colours.expand(100, 3, 32, 32).contiguous()
    return digits._replace(train_images=images, train_labels=torch.arange(100) // 10)


def numbers(images):
    return images[:, 0, 0, 0].tolist()


def test_a_subset_is_stratified_seeded_and_of_training_images_only(numbered):
    part = script.subset(numbered, images=50, held_out=20)
    assert (
        part.train_labels.bincount().tolist() == [5] * 10
        and part.test_labels.bincount().tolist() == [2] * 10
    )
    kept, held = numbers(part.train_images), numbers(part.test_images)
    assert len(set(kept) | set(held)) == 70  # none twice, none in both
    assert [n // 10 for n in kept + held] == part.train_labels.tolist() + part.test_labels.tolist()
    assert (
        numbers(script.subset(numbered, 30, 20).test_images) == held
    )  # judged on the same images whatever the size
    assert held != sorted(held)  # classes mixed, for batch statistics
    assert (
        part.copy != script.subset(numbered, 30, 20).copy != numbered.copy
    )  # records of different sizes never mix


def test_a_subset_larger_than_the_data_is_an_error(numbered):
    with pytest.raises(CourseError, match="class '0' has 10"):
        script.subset(numbered, 90, 20)


# --- the plan -------------------------------------------------------------------------------------


def test_learning_rates_are_scaled_by_the_rule_of_the_optimizer(monkeypatch):
    recipe = default_settings(norm="bn")
    assert script.scaled_rate("bn", recipe.batch_size) == recipe.lr == LEARNING_RATES["bn"]
    for optimizer, factor in (("adamw", 0.25), ("sgd", 1 / 16)):
        monkeypatch.setattr(
            script, "default_settings", lambda o=optimizer, **_: Settings(lr=1.0, optimizer=o)
        )
        assert script.scaled_rate("bn", 8) == factor  # from 128


@pytest.mark.parametrize("name", NAMES)
def test_every_point_sees_the_same_number_of_samples(name):
    rates = {"points": []}
    for norm in NORMS:
        for lr in (0.1, 0.2):
            rates["points"].append({"norm": norm, "lr": lr, "val_accuracy": [lr]})
    points = script.plan(name, rates=rates)  # all of them train on the same images
    assert len({p.settings.epochs for p in points}) == 1 and len(set(points)) == len(points)
    assert [p.settings.seed for p in points] == sorted(p.settings.seed for p in points)
    assert len({p.settings.seed for p in points}) == 3 and not any(
        p.settings.validate for p in points
    )
    if name == "norms":  # each at its best, with seeds that did not choose it
        assert {p.settings.lr for p in points} == {0.2} and {p.settings.seed for p in points} == {
            3,
            4,
            5,
        }
    if name == "bn_rates":  # "step" lowers the rate after 8 epochs only
        assert all(p.settings.schedule == "step" and p.settings.epochs <= 8 for p in points)
    if name == "groups":
        common = math.gcd(*NormNet.WIDTHS.values())
        groups = {p.settings.num_groups for p in points if p.settings.norm == "gn"}
        assert groups | {1} == {g for g in range(1, common + 1) if common % g == 0}


def test_norms_waits_for_all_of_rates(tmp_path, capsys):
    command(tmp_path, "norms")
    assert "waits for all of `rates`" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_parts_share_the_work_and_do_nothing_twice(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(
        script, "run", lambda point, data, work: done.append(script.stem(point, data))
    )
    for part in ("0/3", "1/3", "2/3"):
        command(tmp_path, "rates", "groups", "layer_norms", "--part", part)
    assert len(done) == len(set(done)) == 75 + 6 + 9  # LN, GN and IN of groups are points of rates
    seeds = [name.split("seed")[1][0] for name in done[:30]]
    assert seeds == sorted(seeds)


@pytest.mark.parametrize("words", [["what"], ["--part", "2/2"], ["--part", "half"]])
def test_bad_words_are_refused(words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        command(tmp_path, *words)
    assert stop.value.code == 2 and (
        "there are rates" in (error := capsys.readouterr().err) or "expected K/N" in error
    )


# --- running it -----------------------------------------------------------------------------------


def test_the_command_makes_every_record(made):
    for name in NAMES:
        record = experiment(name, made / "out")
        assert record["complete"] and record["preliminary"] and record["data"] == "digits"
        assert record["images"] == [40, 40] and record["samples_seen"] == 40
        assert all(
            set(vars(default_settings())) <= set(p) for p in record["points"]
        )  # a point has every setting


def test_a_second_call_trains_nothing_and_ends_with_the_same_records(made, monkeypatch):
    before = {file.name: file.read_text() for file in (made / "out").iterdir()}
    assert sorted(before) == sorted(f"{name}.json" for name in NAMES)
    shrink(monkeypatch)
    monkeypatch.setattr(script, "train", None)
    command(made)
    assert {file.name: file.read_text() for file in (made / "out").iterdir()} == before


def test_a_run_that_is_stopped_keeps_what_is_finished(tmp_path, monkeypatch):
    train, count = script.train, []

    def stop_at_third(point, data):
        count.append(point)
        if len(count) == 3:
            raise KeyboardInterrupt
        return train(point, data)

    monkeypatch.setattr(script, "train", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        command(tmp_path, "layer_norms")
    record = experiment("layer_norms", tmp_path / "out")
    assert len(record["points"]) == 2 and not record["complete"]
    assert record["not_run"][:7] == ["seed 0, layer pixel", *record["not_run"][1:7]]
    command(tmp_path, "layer_norms")
    record = experiment("layer_norms", tmp_path / "out")
    assert record["complete"] and len(count) == 3 + 7  # the stopped one again, none of the finished
    assert record["not_run"] == script.NOT_RUN["layer_norms"]
    assert (
        len({p["parameters"] for p in record["points"]}) == 2
    )  # GN(1) and per-pixel LN have as many


def test_a_diverged_run_is_recorded_as_guessing(digits, tmp_path):
    part = script.subset(digits, 40, 40)
    settings = default_settings(norm="none", lr=1e8, epochs=3, batch_size=8, schedule="step")
    result = script.run(script.Point(settings), part, tmp_path)
    assert result["diverged"] and result["val_accuracy"] == result["train_accuracy"] == [10.0] * 3
    assert script.run(script.Point(settings), part, tmp_path) == result


# --- what it does to a network --------------------------------------------------------------------


@pytest.fixture
def trained(small):
    """A Batch Norm network whose running averages are not yet those of the data."""
    torch.manual_seed(0)
    model = NormNet("bn")
    model(next(batches(small.train_images, small.train_labels, small, 8))[0])
    return model.eval()


def test_precise_statistics_equal_a_direct_computation(trained, small):
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    precise = script.precise_statistics(trained, small, batch_size=40)  # two batches of equal size
    x = torch.cat([x for x, _ in batches(small.train_images, small.train_labels, small, 80)])
    drawn = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    halves = trained.C1.conv(x[drawn]).detach().chunk(2)  # each (40, C, H, W)
    mean = torch.stack([half.mean((0, 2, 3)) for half in halves]).mean(0)
    var = torch.stack([half.var((0, 2, 3)) for half in halves]).mean(0)
    torch.testing.assert_close(precise.C1.norm.running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(precise.C1.norm.running_var, var, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(trained.C1.norm.running_mean, mean, rtol=0.1)
    assert all(
        torch.equal(value, before[key]) for key, value in trained.state_dict().items()
    )  # a copy was changed
    whole = script.precise_statistics(
        trained, small, count=80, batch_size=80
    )  # in one batch: training mode itself
    torch.testing.assert_close(
        whole(x), trained.train()(x), rtol=1e-2, atol=1e-2
    )  # biased and unbiased variance


def test_batch_statistics_are_those_of_training_mode(trained, small):
    x = next(batches(small.test_images, small.test_labels, small, 8))[0]
    logits = predict(
        script.with_batch_statistics(trained), small.test_images[:8], small, batch_size=8
    )
    assert trained.C1.norm.running_mean is not None
    torch.testing.assert_close(logits, trained.train()(x).detach(), rtol=1e-4, atol=1e-4)


def test_layer_norms_of_the_same_network():
    nets = {}
    for kind in ("", "chw", "pixel"):
        torch.manual_seed(0)
        nets[kind] = script.with_layer_norm(NormNet("ln"), kind) if kind else NormNet("ln")
    x = torch.randn(2, 3, 32, 32)
    outputs = {kind: net(x) for kind, net in nets.items()}
    torch.testing.assert_close(
        outputs["chw"], outputs[""], rtol=1e-4, atol=1e-4
    )  # equal while gamma is 1, beta is 0
    assert (outputs["pixel"] - outputs[""]).abs().max() > 1e-3
    assert (
        count_parameters(nets["pixel"])
        == count_parameters(nets[""])
        < count_parameters(nets["chw"])
    )
    norms = [m for m in nets["chw"].modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == sum(name[0] in "Cc" for name in NormNet.WIDTHS) and norms[
        0
    ].normalized_shape[1:] == (32, 32)


def test_per_pixel_layer_norm_averages_over_channels():
    x, norm = torch.randn(2, 8, 5, 5), script.PixelLayerNorm(8)
    mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
    torch.testing.assert_close(
        norm(x), (x - mean) / torch.sqrt(var + norm.eps), rtol=1e-4, atol=1e-5
    )


# --- reading them ---------------------------------------------------------------------------------


def test_a_record_that_is_not_there_or_broken_is_an_error(tmp_path):
    with pytest.raises(CourseError, match="there are: none"):
        experiment("groups", tmp_path)
    (tmp_path / "groups.json").write_text("{")
    with pytest.raises(CourseError, match="not a whole record"):
        experiment("groups", tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_published_miniatures_are_whole(name):
    record = experiment(name)
    assert (
        record["data"] == "CIFAR-10"
        and record["name"] == name
        and record["what"]
        and record["not_run"]
    )
    assert all(
        record[key]
        for key in ("copy", "device", "threads", "precision", "versions", "system", "command")
    )
    points = record["points"]
    missing = len(record["not_run"]) - len(script.NOT_RUN[name])
    assert record["complete"] == (missing == 0) and points
    assert {p["seed"] for p in points} <= set(record["seeds"]) and len(record["seeds"]) == 3
    for p in points:
        assert len(p["val_accuracy"]) == len(p["train_accuracy"]) == p["epochs"]
        assert p["epochs"] * record["images"][0] == record["samples_seen"]
        assert all(0 <= accuracy <= 100 for accuracy in p["val_accuracy"])
        assert (name == "batch_size" and p["norm"] == "bn") == ("precise_accuracy" in p)


def test_published_miniatures_are_not_preliminary():
    files = EXPERIMENTS.glob("*.json")
    preliminary = [file.stem for file in files if json.loads(file.read_text())["preliminary"]]
    assert not preliminary, "run experiments/miniatures.py"
