"""What notebooks show: the published network or one trained now, and what goes through a norm."""

from dataclasses import asdict, replace

import pytest
import torch

from normcourse import CourseError, NormNet, default_settings, predict
from normcourse.norm import NORMS, activations
from normcourse.results import published, trained
from normcourse.train import percent_correct


@pytest.mark.parametrize("norm", list(NORMS))
def test_the_recipe_of_each_norm_is_published(norm):
    weights, record = published(default_settings(norm=norm))
    assert weights.exists()
    assert record["settings"] == asdict(default_settings(norm=norm))


@pytest.mark.parametrize(
    "change", [{"lr": 0.0123}, {"epochs": 3}, {"seed": 99}, {"weight_decay": 0.5}, {"dropout": 0.5}]
)
def test_a_record_matches_only_with_every_setting(change):
    assert published(replace(default_settings(norm="bn"), **change)) == (None, None)


def test_the_published_network_is_loaded_whatever_the_copy(small, capsys):
    other_copy = small._replace(name="CIFAR-10", copy="another copy")
    model, record = trained(default_settings(norm="gn"), other_copy)
    weights, expected = published(default_settings(norm="gn"))
    assert record == expected
    for name, value in torch.load(weights, weights_only=True).items():
        assert model.state_dict()[name].equal(value), name
    printed = capsys.readouterr().out
    assert record["copy"] in printed
    assert "another copy" in printed


def test_other_images_get_a_network_of_their_own_and_the_published_record(digits, capsys):
    settings = default_settings(norm="bn")
    images, labels = digits.train_images[:640], digits.train_labels[:640]
    model, record = trained(settings, digits._replace(train_images=images, train_labels=labels))
    weights, expected = published(settings)
    assert record == expected
    assert "not CIFAR-10" in capsys.readouterr().out
    scale = model.C1.norm.weight
    assert scale.std() > 0
    assert not scale.equal(torch.load(weights, weights_only=True)["C1.norm.weight"])


def test_retrain_trains_and_an_unpublished_run_is_trained(small, tmp_path):
    settings = default_settings(norm="bn", epochs=1, batch_size=16)
    for retrain in ("full", None):  # the second time it is read
        model, record = trained(settings, small, retrain, runs=tmp_path)
        assert record["data"] == "digits"
        assert record["settings"] == asdict(settings)
    predicted = predict(model, small.test_images, small).argmax(1)
    accuracy = percent_correct(predicted, small.test_labels)
    assert accuracy == pytest.approx(record["history"][-1]["test_accuracy"])
    assert len(list(tmp_path.rglob("*.json"))) == 1


def test_the_short_recipe_is_the_same_with_fewer_epochs(small, tmp_path):
    settings = default_settings(norm="gn", batch_size=16)
    _, record = trained(settings, small, "short", runs=tmp_path)
    assert record["settings"] == asdict(settings) | {"epochs": 4} and len(record["history"]) == 4
    assert record["history"][-1]["lr"] < 0.1 * settings.lr  # its own cycle ends


@pytest.mark.parametrize("retrain", [True, False, "long", 5])
def test_any_other_retrain_says_what_is_allowed(small, tmp_path, retrain):
    with pytest.raises(CourseError, match="allowed: None, 'short', 'full'"):
        trained(default_settings(), small, retrain, runs=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("norm", "axes"), [("bn", (0, 2, 3)), ("ln", (1, 2, 3))])
def test_activations_are_those_of_the_norm_and_leave_the_model_alone(norm, axes):
    torch.manual_seed(0)
    model, x = NormNet(norm).eval(), torch.randn(8, 3, 32, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = activations(model, x, ["C1", "C9"])
    assert list(found) == ["C1", "C9"]
    assert not model.training
    torch.testing.assert_close(found["C1"][0], model.C1.conv(x))
    for _, after in found.values():
        assert after.mean(axes).abs().max() < 1e-5
    for name, value in model.state_dict().items():
        assert value.equal(before[name]), name
