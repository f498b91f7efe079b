"""What the notebooks on CIFAR-10 share: which record is shown, what a norm does inside, the first cell, the addresses."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from normcourse import NormNet, default_settings, lessons, predict
from normcourse.lessons import FIRST_CELL, REPOSITORY, activations, published, trained
from normcourse.norm import NORMS

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("0[0-3]_[!s]*.ipynb"))


@pytest.mark.parametrize("norm", list(NORMS))
def test_the_recipe_of_each_norm_is_published(norm):
    weights, record = published(default_settings(norm=norm))
    assert weights.exists() and record["settings"] == asdict(default_settings(norm=norm))


@pytest.mark.parametrize("change", [{"lr": 0.0123}, {"epochs": 3}, {"seed": 99}, {"weight_decay": 0.5}, {"dropout": 0.5}])
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
    assert record["copy"] in printed and "another copy" in printed


def test_other_images_get_a_network_of_their_own_and_the_published_record(digits, capsys):
    settings = default_settings(norm="bn")
    few = digits._replace(train_images=digits.train_images[:640], train_labels=digits.train_labels[:640])
    model, record = trained(settings, few)
    weights, expected = published(settings)
    assert record == expected and "not CIFAR-10" in capsys.readouterr().out
    scale = model.C1.norm.weight
    assert scale.std() > 0 and not scale.equal(torch.load(weights, weights_only=True)["C1.norm.weight"])


def test_retrain_trains_and_an_unpublished_run_is_trained(small, tmp_path):
    settings = default_settings(norm="bn", epochs=1, batch_size=16)
    for retrain in (True, False):  # the second time it is read
        model, record = trained(settings, small, retrain, runs=tmp_path)
        assert record["data"] == "digits" and record["settings"] == asdict(settings)
    correct = (predict(model, small.test_images, small).argmax(1) == small.test_labels).float().mean().item()
    assert 100 * correct == pytest.approx(record["history"][-1]["test_accuracy"])
    assert len(list(tmp_path.rglob("*.json"))) == 1


@pytest.mark.parametrize(("norm", "axes"), [("bn", (0, 2, 3)), ("ln", (1, 2, 3))])
def test_activations_are_those_of_the_norm_and_leave_the_model_alone(norm, axes):
    torch.manual_seed(0)
    model, x = NormNet(norm).eval(), torch.randn(8, 3, 32, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = activations(model, x, ["C1", "C9"])
    assert list(found) == ["C1", "C9"] and not model.training
    torch.testing.assert_close(found["C1"][0], model.C1.conv(x))
    for _, after in found.values():
        assert after.mean(axes).abs().max() < 1e-5
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_the_pictures_show_every_class_and_every_image(digits):
    assert len(lessons.sample_grid(digits).axes[0].get_yticks()) == 10
    picture = lessons.augmentations(digits, default_settings(), images=2, columns=3)
    assert picture.axes[0].images[0].get_array().shape == (2 * 34, 4 * 34, 3)


# --- the first cell ----------------------------------------------------------------------------------------------


def run_first_cell(monkeypatch, folder, installed=False, colab=False):
    """Run the first cell in a folder; returns the arguments of every pip call. Nothing is installed."""
    calls = []
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(subprocess, "run", lambda command: calls.append(command[4:]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True if installed or len(calls) == 2 else None)
    if colab:
        monkeypatch.setitem(sys.modules, "google.colab", sys)
    exec(compile(FIRST_CELL, "first cell", "exec"), {})
    return calls


def test_first_cell_finds_the_checkout(monkeypatch, tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "normcourse").mkdir()
    (tmp_path / "normcourse" / "__init__.py").touch()
    assert run_first_cell(monkeypatch, tmp_path / "notebooks") == []
    assert sys.path[0] == str(tmp_path.resolve())


def test_first_cell_installs_in_colab_without_touching_torch(monkeypatch, tmp_path):
    monkeypatch.delenv("NORMCOURSE_REPOSITORY", raising=False)
    course, rest = run_first_cell(monkeypatch, tmp_path, colab=True)
    assert course == ["--quiet", "--no-deps", f"git+{REPOSITORY}"]
    assert not any("torch" == package or "torchvision" == package for package in rest)
    assert run_first_cell(monkeypatch, tmp_path, installed=True, colab=True) == []


def test_first_cell_takes_another_address(monkeypatch, tmp_path):
    monkeypatch.setenv("NORMCOURSE_REPOSITORY", "git+file:///somewhere")
    assert run_first_cell(monkeypatch, tmp_path)[0][-1] == "git+file:///somewhere"


def test_first_cell_says_what_to_do_elsewhere(monkeypatch, tmp_path):
    monkeypatch.delenv("NORMCOURSE_REPOSITORY", raising=False)
    with pytest.raises(ModuleNotFoundError, match=f"pip install git\\+{REPOSITORY}"):
        run_first_cell(monkeypatch, tmp_path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_carry_the_address(path, tmp_path):
    text = path.read_text(encoding="utf-8")
    title, first = json.loads(text)["cells"][:2]
    assert "".join(first["source"]) == FIRST_CELL.strip() and lessons.badge(path.name) in "".join(title["source"])
    copied = tmp_path / path.name
    copied.write_text(text.replace("OWNER", "SOMEONE"), encoding="utf-8")
    lessons.address_notebook(copied)  # writes the address that the library has
    assert copied.read_text(encoding="utf-8") == text
