"""Training: the record, the same numbers again, and each piece against plain PyTorch."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from normcourse import (
    CourseError,
    NormNet,
    batches,
    default_settings,
    evaluate,
    fit,
    predict,
    reference_net,
)
from normcourse import train as train_module
from normcourse.data import split_validation
from normcourse.engine import fit as fit_module
from normcourse.engine.cli import make_parser
from normcourse.engine.record import read_record
from normcourse.errors import DivergedError
from normcourse.norm import NORMS
from normcourse.results import command, run_name
from normcourse.train import Muon, Settings, build, learning_rate, make_optimizers, orthogonalize

CPU = torch.device("cpu")


def settings(norm="bn", **changed):
    return default_settings(norm=norm, **{"epochs": 3, "batch_size": 32} | changed)


def same(one, two):
    """Equal in every figure (seconds and the moment apart)."""
    clean = [json.loads(json.dumps(record)) for record in (one, two)]
    for record in clean:
        del record["seconds"], record["finished"]
        for epoch in record["history"]:
            del epoch["seconds"]
    return clean[0] == clean[1]


def weights(folder):
    """The weights of the one run in a folder."""
    (path,) = folder.glob("*.pt")
    return torch.load(path, weights_only=True)


def equal(one, two):
    """The same names, the same tensors to the bit."""
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


def kept(folder):
    """The epochs that the checkpoint below a folder keeps, if there is one."""
    for path in folder.rglob("*.ckpt"):
        return torch.load(path, weights_only=True)["history"]
    return []


@pytest.mark.parametrize("norm", NORMS)
def test_the_record_says_everything(norm, small, tmp_path):
    chosen = settings(norm, epochs=2)
    record = fit(chosen, small, tmp_path, "cpu", progress=False)
    assert len(record["history"]) == 2 and record["parameters"] < 50_000
    keys = {"train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "seconds"}
    for epoch in record["history"]:
        assert set(epoch) == keys and all(map(math.isfinite, epoch.values()))
    assert record["data"] == "digits" and record["copy"] == small.copy
    assert record["settings"] == vars(chosen) and record["images"] == [80, 40]
    assert {"torch", "python", "normcourse"} <= set(record["versions"])
    assert record["device"] and record["threads"] >= 1
    assert sum(map(sum, record["confusion"])) == len(small.test_labels)
    correct = sum(row[i] for i, row in enumerate(record["confusion"]))
    assert record["history"][-1]["test_accuracy"] == 100 * correct / len(small.test_labels)
    model = NormNet(norm).eval()
    model.load_state_dict(weights(tmp_path))
    images = (small.test_images, small.test_images.flip(3))
    both = sum(predict(model, each, small).softmax(1) for each in images)
    right = (both.argmax(1) == small.test_labels).sum().item()
    assert record["flip_accuracy"] == 100 * right / len(small.test_labels)
    name = run_name(chosen, small)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{name}.json", f"{name}.pt"]


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """The record and the weights of a run with dropout that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    return fit(settings(dropout=0.1), small, folder, "cpu", False), weights(folder)


def test_same_seed_same_result_other_seed_another(small, tmp_path, whole):
    again = fit(settings(dropout=0.1), small, tmp_path, "cpu", False)
    assert same(again, whole[0]) and equal(weights(tmp_path), whole[1])
    assert not same(again, fit(settings(dropout=0.1, seed=1), small, None, "cpu", False))


def test_the_result_does_not_depend_on_random_numbers_drawn_before(small):
    one = fit(settings(dropout=0.1, epochs=1), small, None, "cpu", False)
    torch.rand(17)
    assert same(one, fit(settings(dropout=0.1, epochs=1), small, None, "cpu", False))


# Six calls an epoch, two a step: at 2 and 8, Muon has taken its step and AdamW has not.
@pytest.mark.parametrize("stop", [1, 2, 7, 8, 13, 15])
def test_an_interrupted_run_goes_on_to_the_same_numbers(stop, small, tmp_path, whole, monkeypatch):
    calls, set_lr = [], train_module.set_lr

    def interrupt(optimizer, lr):
        calls.append(lr)
        if len(calls) == stop:
            raise KeyboardInterrupt
        set_lr(optimizer, lr)

    monkeypatch.setattr(train_module, "set_lr", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(settings(dropout=0.1), small, tmp_path, "cpu", False)
    resumed = fit(settings(dropout=0.1), small, tmp_path, "cpu", False)
    assert len(calls) - stop == 18 - 6 * ((stop - 1) // 6)  # at most one epoch is done again
    assert same(resumed, whole[0]) and equal(weights(tmp_path), whole[1])


def test_dropout_is_drawn_anew_in_each_epoch_and_run(small, monkeypatch):
    seeds, train_epoch = [], train_module.train_epoch

    def noted(*arguments):
        seeds.append(torch.initial_seed())
        return train_epoch(*arguments)

    monkeypatch.setattr(train_module, "train_epoch", noted)
    for seed in (5, 6, 5):  # five and six also draw weights
        fit(settings(seed=seed), small, None, "cpu", False)
    assert len({5, 6, *seeds}) == 8 and seeds[:3] == seeds[6:]


def test_a_finished_run_is_only_read(small, tmp_path, monkeypatch):
    first = fit(settings(epochs=1), small, tmp_path, "cpu", False)
    monkeypatch.setattr(train_module, "train_epoch", lambda *_: pytest.fail("trained again"))
    assert fit(settings(epochs=1), small, tmp_path, "cpu", False) == json.loads(json.dumps(first))


def test_a_folder_that_cannot_be_written_is_found_out_before_the_training(
    small, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_module, "train_epoch", lambda *_: pytest.fail("trained"))
    (tmp_path / "taken").write_text("a file, where a folder should be")
    with pytest.raises(OSError, match="^cannot write .*taken.*; make room or name another"):
        fit(settings(), small, tmp_path / "taken", "cpu", False)


def test_the_first_checkpoint_is_written_before_the_first_epoch(small, tmp_path, monkeypatch):
    found = []

    def look(*_):
        found.extend(tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "train_epoch", look)
    with pytest.raises(KeyboardInterrupt):
        fit(settings(), small, tmp_path, "cpu", False)
    assert found == [tmp_path / f"{run_name(settings(), small)}.ckpt"]
    assert torch.load(found[0], weights_only=True)["history"] == []


def test_runs_with_other_settings_or_data_have_other_names(small):
    chosen = [settings(), settings(lr=0.5), settings(seed=1), settings("ln")]
    names = {run_name(each, small) for each in chosen}
    names.add(run_name(settings(), small._replace(copy="other")))
    assert len(names) == 5


def test_validation_never_touches_the_test_set(small):
    images, labels = torch.full_like(small.test_images, 7), torch.zeros_like(small.test_labels)
    blind = small._replace(test_images=images, test_labels=labels)
    chosen = settings(validate=True, epochs=1)
    one, two = (fit(chosen, data, None, "cpu", False) for data in (small, blind))
    assert same(one, two)
    assert "val_accuracy" in one["history"][0] and "test_accuracy" not in one["history"][0]
    assert one["images"] == [72, 8]


@pytest.mark.parametrize("norm", ["bn", "ln", "gn"])
def test_it_learns(norm, digits):
    images, labels = digits.train_images[:640], digits.train_labels[:640]
    data = digits._replace(train_images=images, train_labels=labels)
    record = fit(settings(norm, epochs=5, shift=0, flip=False), data, None, "cpu", False)
    assert record["history"][-1]["test_accuracy"] > 60  # chance is 10


def test_reference_trains_with_its_published_recipe(small):
    record = fit(default_settings("reference", "bn", epochs=1), small, None, "cpu", False)
    recipe = {"optimizer": "sgd", "schedule": "step", "batch_size": 64, "shift": 0, "flip": False}
    recipe |= {"lr": 0.1, "weight_decay": 1e-3, "l1": 5e-4 / 64, "momentum": 0.9}
    assert recipe.items() <= record["settings"].items()
    assert record["parameters"] == 5_882


@pytest.mark.parametrize(
    ("native", "seconds", "pays"),
    [(True, (1, 4), True), (True, (4, 1), False), (False, (1, 4), False)],
)
def test_bf16_is_used_where_it_is_native_and_faster(native, seconds, pays, small, monkeypatch):
    """An Intel Xeon whose matrix unit the host hides has bf16 at half the speed of fp32."""
    times = dict(zip((torch.bfloat16, torch.float32), seconds, strict=True))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native, raising=False)
    monkeypatch.setattr(fit_module, "product_seconds", times.get)
    uncached = fit_module.has_fast_bf16.__wrapped__  # not what was found before
    monkeypatch.setattr(fit_module, "has_fast_bf16", uncached)
    run = fit_module.start(settings(), small, CPU)
    assert run.origin["precision"] == ("bf16 autocast" if pays else "fp32")
    x = torch.randn(2, 3, 32, 32)
    assert run.forward(x).dtype == (torch.bfloat16 if pays else torch.float32)
    assert run.model(x).dtype == torch.float32  # for evaluation


@pytest.mark.parametrize(("num_groups", "copied"), [(8, True), (4, False)])
def test_group_norm_of_many_groups_trains_on_contiguous_copies(num_groups, copied, small):
    """In bf16 on a CPU, where torch's kernel for channels_last is slow; the numbers stay."""
    x, y = next(batches(small.train_images, small.train_labels, small, 32))
    seen, found = [], []
    for bf16 in (True, False):
        run = fit_module.start(settings("gn", num_groups=num_groups), small, CPU, bf16)
        run.model.C4.norm.register_forward_pre_hook(lambda _, x: seen.append(x[0].is_contiguous()))
        loss = F.cross_entropy(run.forward(x).float(), y)
        loss.backward()
        found.append((loss.item(), run.model.C4.conv[1].weight.grad.flatten()))
        after = run.model.C1(x)  # what the next convolution gets
        assert after.is_contiguous(memory_format=torch.channels_last)
        run.model.eval()(x)
    assert seen == [copied, False, False, False]  # evaluation is in fp32
    (loss, gradient), (expected, of_fp32) = found
    assert loss == pytest.approx(expected, rel=0.01)
    assert F.cosine_similarity(gradient, of_fp32, dim=0) > 0.99


def test_a_folder_may_be_in_the_home(small, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    fit(settings(epochs=1), small, "~/runs", progress=False)
    assert list((tmp_path / "runs").glob("*.json"))


def test_a_product_is_timed():
    assert 0 < fit_module.product_seconds(torch.float32) < 60


# --- the pieces, against PyTorch


@pytest.mark.parametrize("batch_size", [80, 32])  # 32: three steps, the last of 16 images
def test_a_step_equals_plain_pytorch(batch_size, small, monkeypatch):
    """Loss, L1 penalty and update are those of the textbook loop."""
    monkeypatch.setattr(fit_module, "has_fast_bf16", lambda _: False)
    changed = {"multiplier": 1, "epochs": 1, "batch_size": batch_size, "l1": 5e-4}
    run = fit_module.start(default_settings("reference", "ln", **changed), small, CPU)
    torch.manual_seed(0)
    model = reference_net("ln", 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-5)
    images, labels, total = small.train_images, small.train_labels, 0.0
    generator = torch.Generator().manual_seed(0)
    for x, y in batches(images, labels, small, batch_size, generator):
        loss = F.nll_loss(model(x), y)
        total += loss.item() * len(y)
        optimizer.zero_grad()
        (loss + 5e-4 * sum(p.abs().sum() for p in model.parameters())).backward()
        optimizer.step()
    figures = fit_module.run_epoch(run, small)
    assert figures["train_loss"] == pytest.approx(total / 80, rel=1e-4)
    for ours, theirs in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-3)


def test_evaluation_is_in_eval_mode_and_counts_every_image(small):
    net = NormNet("bn", dropout=0.5)
    net(torch.randn(8, 3, 32, 32))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    loss, predicted = evaluate(net.train(), small.test_images, small.test_labels, small)
    assert net.training and equal(before, net.state_dict())
    whole = predict(net, small.test_images, small, batch_size=40)
    parts = predict(net, small.test_images, small, batch_size=7)  # 40 = 5 * 7 + 5: a short last one
    torch.testing.assert_close(whole, parts, atol=1e-4, rtol=1e-4)
    assert loss == pytest.approx(F.cross_entropy(whole, small.test_labels).item(), rel=1e-4)
    assert torch.equal(predicted, whole.argmax(1))


def test_schedules():
    cycle = [learning_rate(settings(lr=1.0, epochs=20), e) for e in (0, 2, 4, 12, 19.999)]
    assert cycle == pytest.approx([0.05, 0.525, 1.0, 0.5, 0], abs=1e-3)
    step = default_settings("reference", "bn")
    rates = [learning_rate(step, e) for e in (0, 7.99, 8, 16, 19.9)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001, 0.001])


def test_every_step_has_its_rate_in_every_optimizer(small, monkeypatch):
    chosen = settings("gn")
    run = fit_module.start(chosen, small, CPU)
    found = []
    for optimizer in run.optimizers:
        optimizer.register_step_pre_hook(
            lambda this, *_: found.append({group["lr"] for group in this.param_groups})
        )
    fit_module.run_epoch(run, small)
    rates = [learning_rate(chosen, step / 3) for step in range(3)]
    assert found == [{rate} for rate in rates for _ in run.optimizers]


# --- optimizers


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "sgd"])
@pytest.mark.parametrize("net", ["normnet", "reference"])
def test_norms_and_biases_of_normnet_are_not_decayed(net, optimizer):
    chosen = default_settings(net, "gn", optimizer=optimizer, multiplier=None)
    model = build(chosen)
    decays = {}
    for each in make_optimizers(model, chosen):
        for group in each.param_groups:
            decays |= {id(p): group["weight_decay"] for p in group["params"]}
    published = (net, optimizer) == ("reference", "sgd")
    for name, p in model.named_parameters():
        free = p.ndim == 1 and not published
        assert decays[id(p)] == (0 if free else chosen.weight_decay), name


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "sgd"])
@pytest.mark.parametrize("norm", ["bn", "ln", "gn"])
@pytest.mark.parametrize("net", ["normnet", "reference"])
def test_every_weight_is_in_exactly_one_optimizer(net, norm, optimizer):
    chosen = default_settings(net, norm, optimizer=optimizer)
    model, taken = build(chosen), []
    optimizers = make_optimizers(model, chosen)
    for each in optimizers:
        assert isinstance(each, torch.optim.Optimizer)
        for group in each.param_groups:
            taken += map(id, group["params"])
    assert sorted(taken) == sorted(map(id, model.parameters()))
    kinds = {"muon": [Muon, torch.optim.AdamW], "adamw": [torch.optim.AdamW]}
    assert list(map(type, optimizers)) == kinds.get(optimizer, [torch.optim.SGD])


def test_muon_takes_the_matrices_and_adamw_the_rest():
    model, chosen = NormNet("gn"), settings("gn", momentum=0.8)
    muon, adamw = make_optimizers(model, chosen)
    (group,) = muon.param_groups
    orthogonal = set(map(id, group["params"]))
    names = {name for name, p in model.named_parameters() if id(p) in orthogonal}
    blocks = {"C1.conv.0", "c3.conv.0", "c6.conv.0"}
    blocks |= {f"C{k}.conv.1" for k in (2, 3, 4, 5, 7, 8, 9)}
    assert names == {f"{name}.weight" for name in blocks}
    shared = {"lr": chosen.lr, "momentum": 0.8, "weight_decay": chosen.weight_decay}
    assert shared.items() <= group.items()
    filters, vectors = adamw.param_groups
    assert filters["betas"] == vectors["betas"] == (0.8, 0.99)
    assert filters["lr"] == vectors["lr"] == chosen.lr
    assert len(filters["params"]) == 8  # depthwise filters of seven blocks, and the head
    assert len(vectors["params"]) == 21  # ten norms, and C10's bias
    assert vectors["weight_decay"] == 0 and all(p.ndim == 1 for p in vectors["params"])


@pytest.mark.parametrize("shape", [(24, 27), (48, 24), (96, 96)])
def test_muon_steps_along_the_nearest_orthogonal_matrix(shape):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    found = orthogonalize(gradient)
    values = torch.linalg.svdvals(found)
    assert 0.3 < values.min() and values.max() < 1.3  # about 1, from 0.05 to 10 before
    assert F.cosine_similarity(found.flatten(), (u @ v).flatten(), dim=0) > 0.97


@pytest.mark.parametrize("shape", [(4, 3, 1, 1), (4, 3, 3, 3)])
def test_a_muon_step_is_that_of_the_formula_bit_for_bit(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    p = torch.nn.Parameter(weight.clone())
    optimizer = Muon([p], lr=0.1, momentum=0.9, weight_decay=0.02)
    textbook, exact = weight.clone(), weight.clone()
    mean, exact_mean = torch.zeros_like(weight), torch.zeros_like(weight)
    size = 0.2 * max(shape[0], weight[0].numel()) ** 0.5
    for _ in range(3):
        g = torch.randn(shape)
        p.grad = g.clone()
        optimizer.step()
        mean = 0.9 * mean + 0.1 * g
        step = orthogonalize((0.1 * g + 0.9 * mean).flatten(1)).view(shape)
        textbook = textbook * (1 - 0.1 * 0.02) - 0.1 * size * step
        # and as torch rounds it
        exact_mean = torch.lerp(exact_mean, g, 1 - 0.9)
        step = orthogonalize(torch.lerp(g, exact_mean, 0.9).flatten(1)).view(shape)
        exact = torch.sub(exact * (1 - 0.1 * 0.02), step, alpha=size * 0.1)
    torch.testing.assert_close(p.data, textbook)
    assert torch.equal(p.data, exact)


# --- what is refused


def test_devices():
    assert fit_module.pick_device("cpu") == CPU
    assert fit_module.pick_device().type in ("cpu", "cuda")
    for wrong in ("tpu", "cuda:99", ""):
        with pytest.raises(CourseError, match=f"no device '{wrong}' here; allowed: auto, cpu"):
            fit_module.pick_device(wrong)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"epochs": 0}, "1 to 20"),
        ({"epochs": 21}, "--more-epochs"),
        ({"lr": 0}, "above 0"),
        ({"lr": math.nan}, "above 0"),
        ({"lr": math.inf}, "above 0"),
        ({"momentum": 1.0}, "at least 0, below 1"),
        ({"weight_decay": -1}, "0 or more"),
        ({"batch_size": 0}, "1 or more"),
        ({"dropout": 1.0}, "at least 0, below 1"),
        ({"seed": -1}, "seed"),
        ({"num_groups": 5}, "does not divide"),
        ({"norm": "batchnorm"}, "bn, ln, gn, in, none"),
        ({"net": "vgg"}, "normnet, reference"),
        ({"optimizer": "adam"}, "adamw, sgd"),
        ({"norm": "bn", "num_groups": 7}, "1, 2, 4, 8"),
        ({"multiplier": 2}, "only the reference designs"),
        ({"schedule": "cosine"}, "onecycle, step"),
        ({"shift": 40}, "0 to 16"),
    ],
)
def test_settings_that_are_not_allowed(changed, words):
    with pytest.raises(CourseError) as error:
        default_settings(**{"norm": "gn"} | changed)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "changed", [{"optimizer": "rmsprop"}, {"schedule": "cosine"}, {"epochs": 0}]
)
def test_fit_refuses_settings_that_were_not_checked(changed, small, tmp_path):
    with pytest.raises(CourseError, match=next(iter(changed))):
        fit(Settings(**changed), small, tmp_path)
    assert not list(tmp_path.iterdir())


def test_one_reference_network_has_one_name(small):
    same_network = [{}, {"multiplier": 1}, {"num_groups": 4}]
    chosen = [default_settings("reference", "bn", **changed) for changed in same_network]
    assert len({run_name(each, small) for each in chosen}) == 1
    assert default_settings("reference", "ln").multiplier == 2


def test_more_epochs_on_request():
    assert default_settings(epochs=21, more_epochs=True).epochs == 21


def test_a_loss_that_is_no_longer_finite_says_so(small, tmp_path):
    with pytest.raises(DivergedError, match="lr, weight_decay or l1"):
        fit(settings("none", lr=1e8, optimizer="sgd"), small, tmp_path, "cpu", False)
    assert not list(tmp_path.glob("*.json"))


@pytest.fixture(scope="module")
def finished(small):
    """The record of a run of one epoch."""
    return fit(settings(epochs=1), small, None, "cpu", False)


@pytest.mark.parametrize(
    "key", ["command", "versions", "classes", "confusion", "history", "seconds", "settings"]
)
def test_a_record_that_lacks_something_is_named(tmp_path, finished, key):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(finished))
    assert read_record(path) == json.loads(json.dumps(finished))
    path.write_text(json.dumps({k: v for k, v in finished.items() if k != key}))
    with pytest.raises(CourseError, match="x.json is not a whole record"):
        read_record(path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"settings": {}}', '{"settings": {"nrm": 1}}', "null", "\x00\x01"],
)
def test_a_record_cut_short_is_named(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(CourseError, match="x.json is not a whole record"):
        read_record(tmp_path / "x.json")


def refused(small, path):
    """The line that says why a run cannot go on from a checkpoint, which stays."""
    before = path.read_bytes()
    with pytest.raises(CourseError) as error:
        fit(settings(), small, path.parent, "cpu", False)
    assert list(path.parent.iterdir()) == [path] and path.read_bytes() == before
    text = str(error.value)
    assert text.startswith(f"cannot go on from {path} (") and "\n" not in text
    assert text.endswith("; delete it to start this run again")
    return text


def test_a_broken_checkpoint_is_named(small, tmp_path):
    path = tmp_path / f"{run_name(settings(), small)}.ckpt"
    path.write_bytes(b"PK\x03\x04 cut")
    refused(small, path)


def test_a_checkpoint_of_the_earlier_layout_is_refused(small, tmp_path):
    run = fit_module.start(settings(), small, CPU)
    path = tmp_path / f"{run_name(settings(), small)}.ckpt"
    fit_module.save_checkpoint(run, path)
    state = torch.load(path, weights_only=True)
    del state["optimizers"]
    state |= {"optimizer": {"steps": 3, "moments": []}, "cpu": torch.get_rng_state()}
    torch.save(state, path)
    assert "(KeyError: 'optimizers')" in refused(small, path)


def test_settings_are_complete_in_the_command():
    changed = {"num_groups": 4, "lr": 0.5, "flip": False, "validate": True, "seed": 3}
    changed = default_settings("normnet", "gn", **changed)
    words = command(vars(changed)).split()[3:]
    options = vars(make_parser().parse_args(words))
    for unused in ("command", "runs", "device"):
        options.pop(unused)
    (norm,), (seed,) = options.pop("norm"), options.pop("seed")
    assert default_settings(norm=norm, seed=seed, **options) == changed
    # 128 is the default of Settings, not of this recipe.
    published = command(vars(default_settings("reference", "bn", batch_size=128)))
    for words in ("--batch-size 128", "--l1 7.8125e-06", "--no-flip"):
        assert words in published


def test_split_needs_ten_images(small):
    nine = {"train_images": small.train_images[:9], "train_labels": small.train_labels[:9]}
    with pytest.raises(CourseError, match="too few"):
        split_validation(small._replace(**nine))
