import json
import math
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from normcourse import CourseError, NormNet, default_settings, evaluate, fit, predict
from normcourse import train as train_module
from normcourse.data import split_validation
from normcourse.norm import NORMS
from normcourse.train import _start, learning_rate, make_optimizer, pick_device, read_record, run_name

CPU = torch.device("cpu")


def settings(norm="bn", **changed):
    return default_settings(norm=norm, **{"epochs": 3, "batch_size": 32} | changed)


def same(one, two):
    """Equal in every figure (seconds and the moment apart)."""
    clean = [json.loads(json.dumps(r)) for r in (one, two)]
    for record in clean:
        record.pop("seconds"), record.pop("finished")
        for epoch in record["history"]:
            epoch.pop("seconds")
    return clean[0] == clean[1]


@pytest.mark.parametrize("norm", NORMS)
def test_the_record_says_everything(norm, small, tmp_path):
    record = fit(settings(norm, epochs=2), small, tmp_path, "cpu", progress=False)
    assert len(record["history"]) == 2 and record["parameters"] < 50_000
    keys = {"train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "seconds"}
    assert all(set(epoch) == keys and all(map(math.isfinite, epoch.values())) for epoch in record["history"])
    assert record["data"] == "digits" and record["copy"] == small.copy and record["settings"]["norm"] == norm
    assert {"torch", "python", "normcourse"} <= set(record["versions"]) and record["device"] and record["threads"] >= 1
    assert sum(map(sum, record["confusion"])) == len(small.test_labels)
    correct = sum(row[i] for i, row in enumerate(record["confusion"]))
    assert record["history"][-1]["test_accuracy"] == 100 * correct / len(small.test_labels)
    model = NormNet(norm).eval()
    model.load_state_dict(torch.load(next(tmp_path.glob("*.pt")), weights_only=True))
    both = sum(predict(model, images, small).softmax(1) for images in (small.test_images, small.test_images.flip(3)))
    assert record["flip_accuracy"] == 100 * (both.argmax(1) == small.test_labels).sum().item() / len(small.test_labels)
    name = run_name(settings(norm, epochs=2), small)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{name}.json", f"{name}.pt"]


def test_same_seed_same_result_other_seed_another(small, tmp_path):
    one, two = (fit(settings(dropout=0.1), small, tmp_path / str(i), "cpu", False) for i in range(2))
    assert same(one, two)
    weights = [torch.load(next((tmp_path / str(i)).glob("*.pt")), weights_only=True) for i in range(2)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not same(one, fit(settings(dropout=0.1, seed=1), small, None, "cpu", False))


def test_the_result_does_not_depend_on_random_numbers_drawn_before(small):
    one = fit(settings(dropout=0.1, epochs=1), small, None, "cpu", False)
    torch.rand(17)
    assert same(one, fit(settings(dropout=0.1, epochs=1), small, None, "cpu", False))


@pytest.mark.parametrize("stop", [1, 4, 7, 8])  # in the first epoch, in the second, and in the third and last
def test_an_interrupted_run_goes_on_to_the_same_numbers(stop, small, tmp_path, monkeypatch):
    whole = fit(settings(dropout=0.1), small, tmp_path / "whole", "cpu", False)
    steps = []

    def interrupt(optimizer, lr):
        steps.append(lr)
        if len(steps) == stop:
            raise KeyboardInterrupt
        set_lr(optimizer, lr)

    set_lr = train_module.set_lr
    monkeypatch.setattr(train_module, "set_lr", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(settings(dropout=0.1), small, tmp_path / "cut", "cpu", False)
    resumed = fit(settings(dropout=0.1), small, tmp_path / "cut", "cpu", False)
    assert len(steps) - stop == 9 - 3 * ((stop - 1) // 3)  # at most one epoch is done again
    assert same(whole, resumed)
    weights = [torch.load(next((tmp_path / f).glob("*.pt")), weights_only=True) for f in ("whole", "cut")]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_a_finished_run_is_only_read(small, tmp_path, monkeypatch):
    first = fit(settings(epochs=1), small, tmp_path, "cpu", False)
    monkeypatch.setattr(train_module, "_train_epoch", lambda *_: pytest.fail("trained again"))
    assert fit(settings(epochs=1), small, tmp_path, "cpu", False) == json.loads(json.dumps(first))


def test_runs_with_other_settings_or_data_have_other_names(small, digits):
    names = {run_name(settings(), small), run_name(settings(lr=0.5), small), run_name(settings(seed=1), small),
             run_name(settings(), small._replace(copy="other")), run_name(settings("ln"), small)}  # fmt: skip
    assert len(names) == 5


def test_validation_never_touches_the_test_set(small):
    blind = small._replace(
        test_images=torch.full_like(small.test_images, 7), test_labels=torch.zeros_like(small.test_labels)
    )
    one, two = (fit(settings(validate=True, epochs=1), data, None, "cpu", False) for data in (small, blind))
    assert same(one, two) and "val_accuracy" in one["history"][0] and "test_accuracy" not in one["history"][0]
    assert one["images"] == [72, 8]


def test_it_learns(digits):
    for norm in ("bn", "ln", "gn"):
        data = digits._replace(train_images=digits.train_images[:640], train_labels=digits.train_labels[:640])
        record = fit(settings(norm, epochs=5, shift=0, flip=False), data, None, "cpu", False)
        assert record["history"][-1]["test_accuracy"] > 60, norm  # chance is 10


def test_reference_trains_with_its_published_recipe(small):
    record = fit(default_settings("reference", "bn", epochs=1), small, None, "cpu", False)
    chosen = record["settings"]
    assert (chosen["lr"], chosen["weight_decay"], chosen["l1"], chosen["momentum"]) == (0.1, 1e-3, 5e-4, 0.9)
    assert (chosen["optimizer"], chosen["schedule"], chosen["batch_size"], chosen["shift"], chosen["flip"]) == (
        "sgd",
        "step",
        64,
        0,
        False,
    )
    assert record["parameters"] == 5_882


@pytest.mark.parametrize("native, seconds, pays", [(True, (1, 4), True), (True, (4, 1), False), (False, (1, 4), False)])
def test_bf16_is_used_where_it_is_native_and_faster(native, seconds, pays, small, monkeypatch):
    """An Intel Xeon whose matrix unit the host hides has bf16 at half the speed of fp32."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native, raising=False)
    monkeypatch.setattr(train_module, "_product_seconds", lambda dtype: seconds[dtype == torch.float32])
    monkeypatch.setattr(train_module, "has_fast_bf16", train_module.has_fast_bf16.__wrapped__)  # not what was found before
    run = _start(settings(), small, CPU)
    assert run["bf16"] == pays and run["origin"]["precision"] == ("bf16 autocast" if pays else "fp32")


def test_a_product_is_timed():
    assert 0 < train_module._product_seconds(torch.float32, size=64, rounds=2) < 60


# --- the pieces, against PyTorch


def test_one_step_equals_plain_pytorch(small):
    """Loss, L1 penalty and the update of one whole-batch step are those of the textbook loop."""
    chosen = default_settings("reference", "ln", multiplier=1, epochs=1, batch_size=80)
    run = _start(chosen, small, CPU) | {"bf16": False}
    torch.manual_seed(0)
    from normcourse import batches, reference_net

    model = reference_net("ln", 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-5)
    x, y = next(batches(small.train_images, small.train_labels, small, 80, torch.Generator().manual_seed(0)))
    loss = F.nll_loss(model(x), y)
    (loss + 5e-4 * sum(p.abs().sum() for p in model.parameters())).backward()
    optimizer.step()
    figures = train_module._train_epoch(run, chosen, small, small.train_images, small.train_labels, False)
    assert figures["train_loss"] == pytest.approx(loss.item(), rel=1e-4)
    for ours, theirs in zip(run["model"].parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-3)


def test_evaluation_is_in_eval_mode_and_counts_every_image(small):
    net = NormNet("bn", dropout=0.5)
    net(torch.randn(8, 3, 32, 32))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    loss, predicted = evaluate(net.train(), small.test_images, small.test_labels, small)
    assert net.training and all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    whole = predict(net, small.test_images, small, batch_size=40)
    parts = predict(net, small.test_images, small, batch_size=7)  # 40 = 5 * 7 + 5: a short last batch
    torch.testing.assert_close(whole, parts, atol=1e-4, rtol=1e-4)
    assert loss == pytest.approx(F.cross_entropy(whole, small.test_labels).item(), rel=1e-4)
    assert torch.equal(predicted, whole.argmax(1))


def test_schedules():
    cycle = [learning_rate(settings(lr=1.0, epochs=20), e) for e in (0, 2, 4, 12, 19.999)]
    assert cycle == pytest.approx([0.05, 0.525, 1.0, 0.5, 0], abs=1e-3)
    step = default_settings("reference", "bn")
    assert [learning_rate(step, e) for e in (0, 7.99, 8, 16, 19.9)] == pytest.approx([0.1, 0.1, 0.01, 0.001, 0.001])


def test_norms_and_biases_of_normnet_are_not_decayed():
    net = NormNet("gn")
    *decayed, free = make_optimizer(net, settings("gn")).param_groups
    assert {group["weight_decay"] for group in decayed} == {settings().weight_decay} and free["weight_decay"] == 0
    assert {p.ndim for p in free["params"]} == {1} and len(free["params"]) == 21  # ten norms, and C10's bias


def test_devices():
    assert pick_device("cpu") == CPU and pick_device().type in ("cpu", "cuda")
    for wrong in ("tpu", "cuda:99", ""):
        with pytest.raises(CourseError, match="allowed here: auto, cpu"):
            pick_device(wrong)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"epochs": 0}, "1 to 20"), ({"epochs": 21}, "--more-epochs"), ({"lr": 0}, "above 0"), ({"lr": math.nan}, "above 0"),
        ({"lr": math.inf}, "above 0"), ({"momentum": 1.0}, "0 up to 1"), ({"weight_decay": -1}, "0 or more"),
        ({"batch_size": 0}, "1 or more"), ({"dropout": 1.0}, "0 up to 1"), ({"seed": -1}, "seed"),
        ({"num_groups": 5}, "does not divide"),
        ({"norm": "batchnorm"}, "bn, ln, gn, in, none"), ({"net": "vgg"}, "normnet, reference"),
        ({"optimizer": "adam"}, "adamw, sgd"),
        ({"norm": "bn", "num_groups": 7}, "1, 2, 4, 8"), ({"multiplier": 2}, "only the reference designs"),
        ({"schedule": "cosine"}, "onecycle, step"), ({"shift": 40}, "0 to 16"),
    ],
)  # fmt: skip
def test_settings_that_are_not_allowed(changed, words):
    with pytest.raises(CourseError) as error:
        default_settings(**{"norm": "gn"} | changed)
    assert words in str(error.value)


def test_one_reference_network_has_one_name(small):
    same_network = [{}, {"multiplier": 1}, {"num_groups": 4}]
    assert len({run_name(default_settings("reference", "bn", **changed), small) for changed in same_network}) == 1
    assert default_settings("reference", "ln").multiplier == 2


def test_more_epochs_on_request():
    assert default_settings(epochs=21, more_epochs=True).epochs == 21


def test_a_loss_that_is_no_longer_finite_says_so(small, tmp_path):
    with pytest.raises(CourseError, match="lr, weight_decay or l1"):
        fit(settings("none", lr=1e8, optimizer="sgd"), small, tmp_path, "cpu", False)
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("key", ["command", "versions", "classes", "confusion", "history", "seconds", "settings"])
def test_a_record_that_lacks_something_is_named(tmp_path, small, key):
    record = fit(settings(epochs=1), small, tmp_path, "cpu", False)
    (path,) = tmp_path.glob("*.json")
    path.write_text(json.dumps({k: v for k, v in record.items() if k != key}))
    with pytest.raises(CourseError, match="is not a whole record"):
        read_record(path)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"settings": {}}', '{"settings": {"nrm": 1}}', "null", "\x00\x01"]
)
def test_a_record_cut_short_is_named(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(CourseError, match="x.json is not a whole record"):
        read_record(tmp_path / "x.json")


def test_a_broken_checkpoint_is_named(small, tmp_path):
    (tmp_path / f"{run_name(settings(), small)}.ckpt").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(CourseError, match="delete it to start"):
        fit(settings(), small, tmp_path, "cpu", False)


def test_settings_are_complete_in_the_command():
    changed = default_settings("normnet", "gn", num_groups=4, lr=0.5, flip=False, validate=True, seed=3)
    from normcourse.cli import make_parser
    from normcourse.train import command

    words = command(vars(changed)).split()[3:]
    options = vars(make_parser().parse_args(words))
    for unused in ("command", "runs", "device"):
        options.pop(unused)
    (norm,), (seed,) = options.pop("norm"), options.pop("seed")
    assert default_settings(norm=norm, seed=seed, **options) == changed
    published = command(
        vars(default_settings("reference", "bn", batch_size=128))
    )  # 128 is Settings' default, not the recipe's
    assert "--batch-size 128" in published and "--l1 0.0005" in published and "--no-flip" in published


def test_split_needs_ten_images(small):
    with pytest.raises(CourseError, match="too few"):
        split_validation(small._replace(train_images=small.train_images[:9], train_labels=small.train_labels[:9]))


@pytest.mark.parametrize("shape", [(24, 27), (48, 24), (96, 96)])
def test_muon_steps_along_the_nearest_orthogonal_matrix(shape):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    values = torch.linalg.svdvals(train_module.orthogonalize(gradient))
    assert 0.3 < values.min() and values.max() < 1.3  # about 1, from 0.05 to 10 before
    assert F.cosine_similarity(train_module.orthogonalize(gradient).flatten(), (u @ v).flatten(), dim=0) > 0.97


def test_muon_takes_every_weight_once_and_the_matrices_orthogonally():
    model = NormNet("gn")
    optimizer = make_optimizer(model, settings("gn"))
    taken = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(taken) == sorted(id(p) for p in model.parameters())
    orthogonal = {id(p) for p in optimizer.param_groups[0]["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in orthogonal}
    blocks = {"C1.conv.0", "c3.conv.0", "c6.conv.0", *(f"C{k}.conv.1" for k in (2, 3, 4, 5, 7, 8, 9))}
    assert names == {f"{name}.weight" for name in blocks}
    vectors = optimizer.param_groups[2]
    assert vectors["weight_decay"] == 0 and all(p.ndim == 1 for p in vectors["params"])


def test_a_muon_step_is_that_of_the_formula_and_the_rest_is_torchs_adamw_bit_for_bit():
    torch.manual_seed(0)
    weight, matrix, vector = torch.randn(4, 3, 1, 1), torch.randn(7, 5), torch.randn(5)
    ours = [torch.nn.Parameter(t.clone()) for t in (weight, matrix, vector)]
    groups = [{"params": ours[:1], "orthogonal": True}, {"params": ours[1:2]}, {"params": ours[2:], "weight_decay": 0.0}]
    optimizer = train_module.Muon(groups, lr=0.1, betas=(0.9, 0.99), weight_decay=0.02)
    theirs = [torch.nn.Parameter(t.clone()) for t in (matrix, vector)]
    groups = [{"params": theirs[:1]}, {"params": theirs[1:], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.99), weight_decay=0.02, foreach=True)
    expected, mean = weight.clone(), torch.zeros_like(weight)
    for _ in range(3):
        gradients = torch.randn(4, 3, 1, 1), torch.randn(7, 5), torch.randn(5)
        for p, g in zip((*ours, *theirs), (*gradients, *gradients[1:]), strict=True):
            p.grad = g.clone()
        optimizer.step(), adamw.step()
        mean = 0.9 * mean + 0.1 * gradients[0]
        step = train_module.orthogonalize((0.1 * gradients[0] + 0.9 * mean).flatten(1)).view_as(weight)
        expected = expected * (1 - 0.1 * 0.02) - 0.1 * 0.2 * 2 * step  # 2: the root of the longer side, 4
    torch.testing.assert_close(ours[0].data, expected)
    assert all(torch.equal(a, b) for a, b in zip(ours[1:], theirs, strict=True))


WITHOUT_COMPILER = """
import sys
from normcourse import default_settings, fit, load_data
data = load_data("digits")
few = {name: getattr(data, name)[:8] for name in ("train_images", "train_labels", "test_images", "test_labels")}
fit(default_settings(epochs=1, batch_size=8), data._replace(**few), progress=False)
print("torch._dynamo" in sys.modules)
"""


def test_a_training_does_without_torchs_compiler_which_would_take_150_mb():
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr
