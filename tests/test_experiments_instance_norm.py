"""What Instance Norm removes: the features, the controls and the records of the experiment."""

import copy
from pathlib import Path

import pytest
import torch

from normcourse import results
from normcourse.data import batches
from normcourse.train import default_settings, percent_correct, predict

pytestmark = pytest.mark.usefixtures("experiments")
PLAIN, KEPT, OWN = "Instance Norm", "Instance Norm with gamma and beta kept", "Group Norm"


@pytest.fixture
def lesson():
    import instance_norm

    return instance_norm


def pooled(lesson, data, norm, behind):
    """The features of the test images, (N, C)."""
    _, new = lesson.features(data)
    return new[:, lesson.ARMS.index((norm, behind))]


def through_last_block(model, data):
    """What goes into C9, into its norm and out of the norm, for the test images: (N, C, H, W)."""
    model, seen = copy.deepcopy(model), {}
    model.C9.register_forward_pre_hook(lambda _, x: seen.update(block=x[0].clone()))
    model.C9.norm.register_forward_hook(lambda _, x, y: seen.update(into=x[0], out=y.clone()))
    images = data.test_images
    x, _ = next(batches(images, data.test_labels, data, len(images)))
    with torch.no_grad():
        model(x)
    return seen["block"], seen["into"], seen["out"]


def hard_swish(y):
    return y * (y + 3).clamp(0, 6) / 6


# --- the features ---------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [PLAIN, KEPT, OWN])
def test_features_are_those_of_the_definition(lesson, small, norm):
    model = lesson.network(small)
    x, into, own = through_last_block(model, small)
    variance, mean = torch.var_mean(into, (2, 3), correction=0, keepdim=True)
    plain = (into - mean) / (variance + 1e-5).sqrt()
    gamma, beta = model.C9.norm.weight.detach(), model.C9.norm.bias.detach()
    kept = gamma.view(-1, 1, 1) * plain + beta.view(-1, 1, 1)
    y = {PLAIN: plain, KEPT: kept, OWN: own}[norm]
    expected = {
        "nothing": y,
        "ReLU": y.clamp(min=0),
        "hard swish": hard_swish(y),
        "skip and hard swish": hard_swish(y + x),
    }
    assert expected.keys() == lesson.BEHIND.keys()
    for behind, between in expected.items():
        features = pooled(lesson, small, norm, behind)
        torch.testing.assert_close(features, between.mean((2, 3)), atol=1e-4, rtol=1e-4)


def test_without_the_branch_the_skip_stands_alone(lesson, small):
    x, _, _ = through_last_block(lesson.network(small), small)
    features = pooled(lesson, small, "no branch", "skip and hard swish")
    torch.testing.assert_close(features, hard_swish(x).mean((2, 3)))


def test_between_minus_3_and_3_hard_swish_hides_what_relu_shows(lesson):
    torch.manual_seed(0)
    even, sharp = torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8).pow(3)  # two images
    y = lesson.norm_layer("in", 1)(torch.cat([even, sharp])).detach()
    assert y.abs().max() < 3
    means = {name: between(y, 0).mean((1, 2, 3)) for name, between in lesson.BEHIND.items()}
    torch.testing.assert_close(means["nothing"], torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(means["hard swish"], torch.full((2,), 1 / 6), atol=1e-3, rtol=0)
    assert (means["ReLU"][0] - means["ReLU"][1]).abs() > 0.02


# --- the controls ---------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [PLAIN, KEPT])
def test_behind_instance_norm_alone_a_classifier_is_at_chance(lesson, small, norm):
    features = pooled(lesson, small, norm, "nothing")
    beta = lesson.network(small).C9.norm.bias.detach() if norm == KEPT else torch.zeros(152)
    torch.testing.assert_close(features, beta.expand_as(features), atol=1e-5, rtol=0)
    figures = lesson.Reader(norm, "nothing", 0).measure(small, Path())["figures"]
    labels = small.train_labels[lesson.third(len(small.train_labels), 0)]
    most = labels.bincount().argmax()  # the class that it names for every image
    assert figures["train_accuracy"] == percent_correct(most.expand_as(labels), labels)
    new = small.test_labels
    assert figures["test_accuracy"] == percent_correct(most.expand_as(new), new)


def test_the_networks_head_on_its_own_features_is_the_network(lesson, small):
    model = lesson.network(small)
    assert model.C9.norm.num_groups == 8 and not model.training
    named = predict(model, small.test_images, small).argmax(1)  # its answers, right or wrong
    data = small._replace(test_labels=named)
    measured = {}
    for norm in (OWN, PLAIN):
        trial = lesson.Reader(norm, "skip and hard swish", 0)
        measured[norm] = trial.measure(data, Path())["figures"]["head_accuracy"]
    assert measured[OWN] == 100 > measured[PLAIN]


# --- trials ---------------------------------------------------------------------------------------


def test_the_thirds_share_no_image_and_leave_out_none(lesson):
    thirds = [lesson.third(80, seed).tolist() for seed in lesson.SEEDS]
    assert [len(part) for part in thirds] == [27, 27, 26]
    assert sorted(sum(thirds, [])) == list(range(80))
    assert thirds[0] != list(range(0, 80, 3)) and thirds[0] == lesson.third(80, 0).tolist()


def test_a_trial_leaves_a_record_and_the_features_as_they_are(lesson, small, tmp_path, monkeypatch):
    import common

    monkeypatch.setattr(common.results, "EXPERIMENTS", tmp_path)
    trials = list(lesson.trials())
    paths = [common.record_path("instance_norm", trial) for trial in trials]
    assert len(set(paths)) == len(paths) == 39 and [t.seed for t in trials[::13]] == [0, 1, 2]
    before = [part.clone() for part in lesson.features(small)]
    common.run_trial("instance_norm", lesson.__doc__, trials[11], small)
    assert all(a.equal(b) for a, b in zip(before, lesson.features(small), strict=True))
    (record,) = results.experiment("instance_norm", tmp_path)
    assert record["arm"] == "Group Norm, skip and hard swish" and record["images"] == [27, 40]
    assert record["parameters"] == 153 * 10 and record["protocol"] == lesson.__doc__
    assert record["figures"]["train_accuracy"] == 100  # 152 features tell 27 images apart


def test_it_learns_from_training_images_and_is_judged_on_test_images(lesson, small):
    trial = lesson.Reader(OWN, "skip and hard swish", 0)
    other = small._replace(test_labels=(small.test_labels + 1) % 10)
    right, wrong = trial.measure(small, Path()), trial.measure(other, Path())
    assert right["figures"]["test_accuracy"] > 40 > wrong["figures"]["test_accuracy"]
    assert right["figures"]["train_accuracy"] == wrong["figures"]["train_accuracy"]


# --- the records ----------------------------------------------------------------------------------


def test_the_records_controls_have_their_known_answers(lesson):
    records = results.experiment("instance_norm")
    assert len(records) == len(list(lesson.trials()))
    for norm in (PLAIN, KEPT):
        chance = results.by_seed(records, f"{norm}, nothing", "test_accuracy")
        assert chance == {0: 10.0, 1: 10.0, 2: 10.0}
    _, published = results.published(default_settings(norm="gn"))
    head = results.by_seed(records, "Group Norm, skip and hard swish", "head_accuracy")
    assert set(head.values()) == {published["history"][-1]["test_accuracy"]}, (
        "the network was trained anew: delete these records and run the experiment again"
    )
