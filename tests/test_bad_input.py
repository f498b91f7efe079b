"""Generated bad input: each case works or ends in one clear line, and leaves nothing half-written.

The cases are the same at each run (derandomize); together they are more than 200.
"""

import copy
import io
import json
import math
import os
import pickle
import re
import shutil
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from conftest import Evil, checksums, make_folder, write_batches
from hypothesis import HealthCheck, example, given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from normcourse import CourseError, Settings, default_settings, fit, load_data
from normcourse.engine import cli, sources
from normcourse.engine import fit as fit_module
from normcourse.engine.record import find_records, read_record
from normcourse.engine.report import report, write_report
from normcourse.norm import NORMS
from normcourse.results import RESULTS, groups, run_name, trained
from normcourse.train import build, check_settings

ODD_NUMBERS = [0, -1, 1, 3, 7, 16, 2**31, 2**63, 10**30, 0.5, 1.0, 1e-320, 1e300]
ODD_NUMBERS += [math.nan, math.inf, -math.inf]
ODD_TEXTS = ["", " ", "bn", "BN", "é漢", "..", "\n", "a\x00b", "\udcff", "x" * 5000, "%s{}"]
ODD_TEXTS += ["--", "-1", "None"]


def cases(count):
    """As many generated cases, the same each time; fixtures are shared by them."""
    shared = HealthCheck.function_scoped_fixture
    fine = [shared, HealthCheck.too_slow, HealthCheck.filter_too_much]
    same = {"derandomize": True, "database": None, "deadline": None}
    return given_settings(max_examples=count, suppress_health_check=fine, **same)


def complains(function):
    """The message of the CourseError, one line that fits a screen; None where all is well."""
    try:
        function()
    except CourseError as error:
        message = str(error)
        assert len(message.strip().splitlines()) == 1 and len(message) < 2000, message
        return message
    return None


# --- the command line

NUMBERS = ["--epochs", "--seed", "--lr", "--momentum", "--weight-decay", "--batch-size"]
NUMBERS += ["--dropout", "--num-groups", "--multiplier", "--l1", "--shift"]
WORDS = {
    "--norm": [*NORMS, "bn ln"],
    "--net": ["normnet", "reference"],
    "--optimizer": ["adamw", "sgd"],
    "--schedule": ["onecycle", "step"],
    "--device": ["auto", "cpu", "cuda", "mps"],
}
FLAGS = ["--flip", "--no-flip", "--validate", "--sync-bn", "--nonsense", "--", "report"]
PLACES = [*ODD_TEXTS, "cifar10", "/dev/null", "/dev/zero", "/proc"]
odd = [*ODD_NUMBERS, *ODD_TEXTS, "1", "2", "1e-3", "0x10", "9" * 5000]
option = st.one_of(
    st.tuples(st.sampled_from(NUMBERS), st.sampled_from(odd)),
    *(st.tuples(st.just(name), st.sampled_from(good + ODD_TEXTS)) for name, good in WORDS.items()),
    st.tuples(st.sampled_from([*FLAGS, "--publish"])),
    st.tuples(st.sampled_from(["--data", "--runs"]), st.sampled_from(PLACES)),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("tiny") / "tiny", count=4)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An empty working directory, no network, and no pictures, which take seconds."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sources, "MIRRORS", ())
    monkeypatch.setattr(cli, "write_report", lambda folder, _: str(len(find_records(folder))))
    monkeypatch.setenv("NORMCOURSE_DATA", "nowhere")
    return tmp_path


@cases(100)
@given(options=st.lists(option, min_size=1, max_size=3))
def test_options_of_train(options, tiny, alone):
    words = ["train", "--data", str(tiny), "--runs", "runs", "--epochs", "1", "--norm", "bn"]
    for name, *value in options:
        words.append(name)
        if value:
            words += str(value[0]).split(" ")[:2]
    status, out, err = command(words)
    lines = [line for line in err.splitlines() if line.strip()]
    assert status in (0, 2), (words, err)
    if status == 2:
        assert len(lines) == 1 and lines[0].startswith("error: "), (words, err)
    else:
        assert "tiny (image folder" in out and not lines, (words, out, err)
    for path in alone.rglob("*"):
        assert path.suffix not in (".tmp", ".ckpt"), path
        assert path.suffix != ".json" or read_record(path)
        assert status == 0 or path.suffix not in (".json", ".pt") or path.stat().st_size > 0


def command(words):
    """Exit status, output and error output of the command."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            status = cli.main(words)
        except SystemExit as exit_:
            status = exit_.code
    return status, out.getvalue(), err.getvalue()


report_words = ["report", "--runs", "--data", "--publish", "here", *ODD_TEXTS]


@cases(30)
@given(words=st.lists(st.sampled_from(report_words), max_size=4))
def test_options_of_report(words, alone):
    status, _, err = command(["report", *words])
    assert status == 2 and err.startswith("error: "), (words, err)
    assert len(err.strip().splitlines()) == 1, (words, err)
    assert not list((alone / "here").iterdir())


def test_a_loss_that_explodes_leaves_no_record(tiny, alone):
    words = ["train", "--data", str(tiny), "--norm", "none", "--epochs", "2", "--lr", "1e8"]
    status, _, err = command(words)
    assert status == 2 and "no longer finite in epoch" in err and not list(alone.rglob("*.json"))


# --- settings and models


names = [*vars(default_settings()), "epoch", "learning_rate"]
others = [*ODD_TEXTS[:4], True, [], ["bn"], {}, b"x", "gn", "reference", "sgd", 2]
changes = st.dictionaries(
    st.sampled_from(names), st.sampled_from(ODD_NUMBERS + others), min_size=1, max_size=3
)


@cases(80)
@given(changes)
def test_settings(changed):
    if not (message := complains(lambda: default_settings(**changed))):
        chosen = default_settings(**changed)
        assert json.dumps(vars(chosen), allow_nan=False)
        assert build(chosen, 3)
    else:
        assert any(word in message for word in ("allowed", "there are", "only the reference")), (
            message
        )


@cases(60)
@given(
    st.sampled_from(["normnet", "reference", "vgg", None]),
    st.sampled_from([*NORMS, "BN", "", None, 1, ["bn"]]),
    st.sampled_from([10, 2, *ODD_NUMBERS, "10", None]),
    st.sampled_from([8, *ODD_NUMBERS, "8", None]),
    st.sampled_from([None, 1, 2, *ODD_NUMBERS, "1"]),
    st.sampled_from([0.0, *ODD_NUMBERS, "0", None]),
)
@example("normnet", "bn", 10, 8, None, 0.0)
@example("normnet", "bn", 0, 8, None, 0.0)
@example("normnet", "gn", 10, 4.0, None, 0.0)
@example("normnet", "gn", 10**12, 8, None, math.nan)
@example("reference", "ln", -1, 8, 1, 0.0)
@example("reference", "gn", 10, 8, 2, 2)
def test_models(net, norm, num_classes, num_groups, multiplier, dropout):
    settings, made = Settings(net, norm, multiplier, num_groups, dropout), []
    message = complains(lambda: made.append(build(settings, num_classes)))
    if message:
        assert any(word in message for word in ("allowed", "allows", "there are")), message
    else:
        assert made[0].eval()(torch.zeros(2, 3, 32, 32)).shape == (2, num_classes)


@pytest.mark.parametrize("make", [numpy.float64, numpy.float32, torch.tensor])
def test_a_number_of_numpy_or_torch_is_taken_as_pythons(make):
    """A loop over numpy.logspace: as it was, no checkpoint of such a run could be read again."""
    chosen = default_settings(lr=make(0.25), seed=numpy.int64(3), flip=numpy.bool_(True))
    assert (type(chosen.lr), type(chosen.seed), type(chosen.flip)) == (float, int, bool)
    assert chosen == default_settings(lr=0.25, seed=3, flip=True)
    message = complains(lambda: check_settings(replace(chosen, lr=make(0.25))))
    assert message.endswith("; allowed: float")


# --- loaders: what may lie in a folder


def truncate(path, part):
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])


def spoil_image(content):
    return lambda root: (root / "train" / "bee" / "1.png").write_bytes(content)


def remove(*names):
    return lambda root: [
        shutil.rmtree(root / n) if (root / n).is_dir() else (root / n).unlink() for n in names
    ]


def add(name, make=lambda path: path.mkdir(parents=True)):
    return lambda root: make(root / name)


def link(target):
    return lambda path: path.symlink_to(target)


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path.parents[2] / "train" / "bee" / "0.png", path)


HUGE = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes.fromhex("7fffffff7fffffff0802000000") + b"\0\0\0\0"
STARTS = (b"", b"\x89PNG", b"GIF89a", b"<svg/>", HUGE, b"P6 99999 99999 255 ", bytes(5000))
SPOIL = [
    *(spoil_image(content) for content in STARTS),
    remove("train"),
    remove("test"),
    remove("test/bee"),
    remove("train/ant", "train/bee", "test/ant", "test/bee"),
    remove(*(f"train/bee/{n}.png" for n in range(4))),
    remove("train/bee/0.png"),
    add("train/bee/folder.png"),
    add("train/empty"),
    add("train/.hidden"),
    add("test/\udcff"),
    add("notes"),
    add("train/bee/pipe.png", os.mkfifo if hasattr(os, "mkfifo") else Path.mkdir),
    add("train/bee/loop.png", link("loop.png")),
    add("train/bee/gone.jpg", link("nowhere")),
    add("train/bee/zero.png", link("/dev/zero")),
    add("train/loop", link("..")),
    add("data_batch_1", Path.touch),
    add("cifar-10-batches-py"),
    add("cifar-10-python.tar.gz", Path.touch),
    add("train/bee/notes.txt", Path.touch),
    add("train/bee/" + "n" * 240 + ".png", image),
    add("train/bee/\udcff\n$.PNG", image),
    lambda root: [image(root / part / "\udcfe $x" / "0.png") for part in ("train", "test")],
    lambda root: [image(root / part / ("c" * 200) / "0.png") for part in ("train", "test")],
]


@cases(60)
@given(
    st.lists(st.sampled_from(SPOIL), min_size=1, max_size=3, unique_by=id),
    st.sampled_from([1, 1, 0.01, 0.5, 0.9, 0.99]),
)
def test_image_folders(tiny, spoil, part):
    with tempfile.TemporaryDirectory() as folder:
        root = shutil.copytree(tiny, Path(folder) / "mine")
        truncate(root / "train" / "ant" / "0.png", part)
        for each in spoil:
            try:
                each(root)
            except OSError:  # two of them may not go together
                continue
        check_source(root)


def check_source(root):
    """Loads, and every name can be printed; or says where it is wrong. The cache stays whole."""
    loaded = []
    message = complains(lambda: loaded.append(load_data(root)))
    if message:
        assert str(root) in message, message
    else:
        data = loaded[0]
        assert len(data.train_images) == len(data.train_labels) > 0
        assert "".join((data.name, *data.classes)).encode()
    assert not list(sources.cache_folder().glob("*.tmp"))
    return message


@cases(50)
@given(
    st.sampled_from(["data_batch_1", "data_batch_5", "test_batch", "batches.meta"]),
    st.one_of(
        st.tuples(st.sampled_from([0, 1, 0.5, 0.999]), st.binary(max_size=8)),
        st.tuples(
            st.integers(0, 300),
            st.sampled_from([b"\x00", b"\xff", b".", b"0", b"N", b"\x80\x05", b"}", b")"]),
        ),
    ),
)
def test_batches_cut_short_or_altered(official, name, change):
    """A part of the file with something behind it, or some bytes replaced near its start."""
    file, (place, put) = official / name, change
    content = file.read_bytes()
    if isinstance(place, float) or place < 2:
        altered = content[: int(place * len(content))] + put
    else:
        altered = content[:place] + put + content[place + len(put) :]
    file.write_bytes(altered)
    try:
        message = check_source(official)
    finally:
        file.write_bytes(content)
    assert message is None if altered == content else f"{name} is not the official file" in message


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    root = tmp_path_factory.mktemp("official") / "cifar-10-batches-py"
    write_batches(root, per_file=4, classes=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "OFFICIAL_MD5", checksums(root))
        yield root


@cases(30)
@given(
    source=st.one_of(
        st.sampled_from([*ODD_TEXTS, "/dev/null", "~", "~root/x", "digit"]), st.text(max_size=20)
    )
)
def test_sources(source, alone):
    message = complains(lambda: load_data(source))
    assert message and ("allowed:" in message or "expected {train,test}" in message), message


# --- records and weights

RECORD = json.loads(next(iter(sorted(RESULTS.glob("normnet-gn-*.json")))).read_text())


def places(value, path=()):
    """The path of every value in nested lists and dicts; of long lists, the first and the last."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list) and value:
        for index in {0, len(value) - 1}:
            yield from places(value[index], (*path, index))


VALUES = [None, True, -1, 0, 10**400, 2.5, "", "x", "\ud800", [], [[]], {}, {"a": 1}, ["a"] * 10]
VALUES += [math.nan, math.inf, 1e308]


@cases(120)
@given(st.sampled_from(list(places(RECORD))), st.sampled_from(["drop", "double", *VALUES]))
def test_records(tmp_path, digits, path, value):
    """A record with one value changed is refused with its name, or its table is made."""
    record = copy.deepcopy(RECORD)
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    if value == "drop":
        del inner[path[-1]]
    elif value == "double":
        inner[path[-1]] = [inner[path[-1]]] * 2
    else:
        inner[path[-1]] = value
    file = tmp_path / "normnet-gn-seed0-01234567.json"
    file.write_text(json.dumps(record))
    message = complains(lambda: read_record(file))
    if message:
        assert f"{file} is not a whole record" in message and "delete it and train again" in message
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("normcourse.engine.report.draw_pictures", lambda *_: None)
            assert "| NormNet | Group Norm" in write_report(tmp_path)


@cases(40)
@given(st.one_of(st.binary(max_size=60), st.integers(0, 400)))
def test_records_cut_short_or_of_any_bytes(tmp_path, content):
    file = tmp_path / "normnet-gn-seed0-01234567.json"
    whole = json.dumps(RECORD).encode()
    file.write_bytes(
        content if isinstance(content, bytes) else whole[: content * len(whole) // 401]
    )
    assert "is not a whole record" in complains(lambda: read_record(file))


def test_pictures_of_odd_values(tmp_path):
    """What the reader of records lets through can also be drawn."""
    record = copy.deepcopy(RECORD)
    record["classes"] = ["", "$x$", "a" * 200, "\n", "{", "<b>", "%", "\\frac", "_", "^"]
    record["data"] = "$a_b$ {}"
    record["confusion"][0], record["mistakes"] = [0] * 10, []
    odd = {"train_loss": 0, "test_loss": 1e299, "test_accuracy": 0}
    record["history"] = [record["history"][0] | odd]
    (tmp_path / "normnet-gn-seed0-01234567.json").write_text(json.dumps(record))
    write_report(tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 3


@pytest.mark.parametrize(
    "save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))]
)
def test_no_file_of_tensors_runs_code(save, tiny, small, tmp_path, cache):
    """Checkpoints are refused, decoded images are decoded again."""
    fit(default_settings("reference", epochs=1), small, tmp_path, "cpu", False)
    (weights,) = tmp_path.glob("*.pt")
    save({"model": Evil(tmp_path / "written")}, weights.with_suffix(".ckpt"))
    weights.with_suffix(".json").unlink()
    with pytest.raises(
        CourseError, match="^cannot go on from .*; delete it to start this run again$"
    ):
        fit(default_settings("reference", epochs=1), small, tmp_path, "cpu", False)
    copied = load_data(tiny).copy
    for file in cache.glob("*.pt"):
        save(Evil(tmp_path / "written"), file)
    assert load_data(tiny).copy == copied and not (tmp_path / "written").exists()


CACHES = {
    "nine numbers": lambda data: tuple(range(9)),
    "labels beyond the classes": lambda data: data._replace(train_labels=data.train_labels + 50),
    "labels below zero": lambda data: data._replace(test_labels=data.test_labels - 1),
    "labels that are no integers": lambda data: data._replace(test_labels=data.test_labels / 2),
    "fewer labels": lambda data: data._replace(train_labels=data.train_labels[1:]),
    "no images": lambda data: data._replace(
        test_images=data.test_images[:0], test_labels=data.test_labels[:0]
    ),
    "images of another size": lambda data: data._replace(train_images=data.train_images[..., 1:]),
    "other pixels": lambda data: data._replace(test_images=255 - data.test_images),
    "classes that are no text": lambda data: data._replace(classes=(1, 2, 3)),
    "other names of the classes": lambda data: data._replace(classes=("x", "y", "z")),
    "another name": lambda data: data._replace(name="CIFAR-10"),
    "the same numbers in another shape": lambda data: data._replace(
        train_images=data.train_images.view(-1, 3, 16, 64)
    ),
    "a mean that is a little off": lambda data: data._replace(
        mean=(data.mean[0] + 1e-9, *data.mean[1:])
    ),
    "a spread of zero": lambda data: data._replace(std=(0.0, 0.0, 0.0)),
    "a mean of nothing": lambda data: data._replace(mean=()),
}


@pytest.mark.parametrize("kind", CACHES)
def test_decoded_images_that_were_altered_are_decoded_again(kind, tiny, cache):
    for file in cache.glob("*.pt"):  # of other tests
        file.unlink()
    data = load_data(tiny)
    (file,) = cache.glob("*.pt")
    seal, *_ = torch.load(file, weights_only=True)
    torch.save((seal, *CACHES[kind](data)), file)
    again = load_data(tiny)
    assert again[:5] == data[:5]
    for one, two in zip(again[5:], data[5:], strict=True):
        assert torch.equal(one, two)


REFERENCE = default_settings("reference", epochs=2)
EPOCH = {"train_accuracy": 50.0, "test_accuracy": 50.0}
EPOCH |= {"train_loss": 1.0, "test_loss": 1.0, "seconds": 1.0}
HISTORIES = {
    "numbers": [1, 2],
    "text": "epochs",
    "no accuracy": [{"train_loss": 1.0}],
    "more than whole": [EPOCH | {"test_accuracy": 101.0}],
    "more epochs than there are": [EPOCH] * 3,
    "a tensor": [EPOCH | {"lr": torch.ones(1)}],
}


@pytest.mark.parametrize("kind", HISTORIES)
def test_a_checkpoint_with_figures_that_cannot_be_is_refused(kind, small, tmp_path):
    path = tmp_path / run_name(REFERENCE, small)
    run = fit_module.start(REFERENCE, small, torch.device("cpu"))
    run.history = HISTORIES[kind]
    fit_module.save_checkpoint(run, path)
    message = complains(lambda: fit(REFERENCE, small, tmp_path, "cpu", False))
    assert message.startswith(f"cannot go on from {path}.ckpt (")
    assert "delete it to start this run again" in message


@pytest.mark.parametrize("content", [b"", b"junk", {"x": torch.ones(2)}, Evil("written")])
def test_weights_that_are_something_else_are_refused(content, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = default_settings("reference", epochs=1)
    trained(chosen, small, runs=tmp_path)
    (weights,) = tmp_path.rglob("*.pt")
    weights.write_bytes(content) if isinstance(content, bytes) else torch.save(content, weights)
    message = complains(lambda: trained(chosen, small, runs=tmp_path))
    told = f"{weights} does not hold this network's weights"
    assert message.startswith(told) and f"delete it and {weights.stem}.json" in message
    assert not (tmp_path / "written").exists()


MARKS = ["<!-- end of results -->", "<script>alert(1)</script>", "![x](https://example.org/x.png)"]
MARKS += [
    "a\n\n# A heading",
    "[link](https://example.org)",
    "https://example.org",
    "| a | b |",
    "`x`",
]


@pytest.mark.parametrize("text", MARKS)
def test_what_a_record_says_is_text(text, tmp_path):
    """No Markdown or HTML of a record gets into a page."""
    record = copy.deepcopy(RECORD) | {"device": text, "system": text, "precision": text}
    record |= {"data": text, "copy": text, "versions": {text: text}, "classes": [text] * 10}
    file = tmp_path / "normnet-gn-seed0-01234567.json"
    file.write_text(json.dumps(record))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("normcourse.engine.report.draw_pictures", lambda *_: None)
        patch.setattr("normcourse.engine.report.find_images", lambda *_: None)
        page = report(tmp_path)
    heading, *rest = page.splitlines()
    own = [line for line in rest if not line.startswith(("|", "- Data", "- Hard", "- Versions"))]
    assert heading.startswith("## ") and own == ["", "", "", f"Pictures: {tmp_path}"]
    said = "".join([heading.removeprefix("## "), *(line for line in rest if line[:1] == "-")])
    assert not set("<>[]!|`#*:") & set(re.sub("- (Data|Hardware|Versions):", "", said))


def test_a_copied_record_counts_once():
    """Equal settings, data and seed are one run, wherever the record lies."""
    other = copy.deepcopy(RECORD)
    other["settings"]["seed"] = 7
    assert groups([RECORD, other, copy.deepcopy(RECORD), other]) == [[RECORD, other]]


def test_copies_below_one_folder_change_no_deviation(tmp_path):
    for seed, accuracy in ((0, 80.0), (1, 82.0)):
        record = copy.deepcopy(RECORD)
        record["settings"]["seed"] = seed
        record["history"][-1]["test_accuracy"] = accuracy
        for name in ("01234567", "89abcdef"):
            (tmp_path / f"normnet-gn-seed{seed}-{name}.json").write_text(json.dumps(record))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("normcourse.engine.report.draw_pictures", lambda *_: None)
        text = write_report(tmp_path)
    assert "| 2 |" in text and "81.00 ± 1.41" in text


def test_a_record_that_cannot_be_read_is_not_told_to_be_deleted(tmp_path):
    file = tmp_path / "normnet-gn-seed0-01234567.json"
    file.mkdir()
    assert complains(lambda: read_record(file)) == f"cannot read {file} (Is a directory)"
