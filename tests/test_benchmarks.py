"""The benchmarks at toy size: each part runs, no time is judged. The page shows the results."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from normcourse import evaluate
from normcourse.train import percent_correct

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
names = ("gpu", "measure", "plain", "probe", "race", "report", "run")
gpu, measure, plain, probe, race, report, run = map(importlib.import_module, names)
# The DataLoader's workers, Python 3.12.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
EVERY_PART = {"step", "evaluate", "memory", "processes", "grow-bn", "accuracy-bn"}


def numbers(value):
    """All numbers in a result."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [n for each in value for n in numbers(each)]
    return [value] if isinstance(value, (int, float)) else []


def measured(*words):
    """Run the command at toy size."""
    before, sys.argv = sys.argv, ["run.py", "--data", "digits", "--toy", *map(str, words)]
    try:
        run.main()
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def records(tmp_path_factory, cache):
    """A result of each part.

    What has a process of its own is measured in this one: a dozen more would take a minute.
    """
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "probe", in_process)
        measured("--out", folder)
        measured("gpu", "--out", folder)
    return report.read_all(folder)


def in_process(kind, processes=1, threads=None, **options):
    return probe.KINDS[kind](**options)


def test_every_part_leaves_a_whole_result(records):
    assert set(records) == EVERY_PART | {"gpu"}
    for name, record in records.items():
        assert {"part", "circumstances", "size", "result"} == set(record)
        found = record["circumstances"]
        assert found["device"] and found["threads"] >= 1 and found["toy"]
        assert found["data"].startswith("digits")
        assert {"torch", "torchvision", "python", "normcourse"} == set(found["versions"])
        assert all(math.isfinite(n) and n >= 0 for n in numbers(record["result"])), name
    for part in ("step", "evaluate"):
        assert list(records[part]["result"]["norms"]) == ["bn", "ln", "gn"]
    for each in records["step"]["result"]["norms"].values():
        assert set(each["ms"]) == {"floor", "ours", "plain_0", "plain_2"}
        assert all(len(rounds) == run.SIZES["rounds"][1] for rounds in each["ms"].values())
    for each in records["evaluate"]["result"]["norms"].values():
        assert set(each["seconds"]) == {"ours", "plain"}
    assert set(records["processes"]["result"]["gn"]["ms"]) == set(measure.PROCESSES)
    assert set(records["memory"]["result"]["peak_mb"]["gn"]) == {"ours", "plain"}
    found = records["gpu"]["result"]
    ways = ["ours", "fp32", "bf16"]  # the others on a GPU alone
    assert list(found["norms"]) == list(found["whole"]) == ["bn", "ln", "gn"]
    if not torch.cuda.is_available():
        assert all(list(each["ms"]) == ways for each in found["norms"].values())
    for axis, key in (("images", "images"), ("batch_size", "batch_sizes"), ("threads", "threads")):
        points = records["grow-bn"]["result"][axis]
        assert [point["value"] for point in points] == list(run.SIZES[key][1])
    lanes = records["accuracy-bn"]["result"]["lanes"]
    assert [(lane["name"], len(lane["history"])) for lane in lanes] == [
        ("ours", 1), ("ours", 2), ("plain", 1), ("plain", 2),
    ]  # fmt: skip


def test_a_part_is_measured_once_unless_it_is_named(tmp_path, monkeypatch):
    calls = []
    parts = ["step", "evaluation", "memory", "processes", "grow", "race"]
    for name in parts:
        module = run if name == "race" else measure
        monkeypatch.setattr(module, name, lambda *_, name=name: calls.append(name))
    monkeypatch.setattr(report, "section", lambda record: "")
    measured("--out", tmp_path)
    assert calls == parts
    assert {file.stem for file in tmp_path.iterdir()} == EVERY_PART
    measured("--out", tmp_path)
    assert len(calls) == 6
    (tmp_path / "evaluate.json").unlink()
    measured("--out", tmp_path)
    assert calls[6:] == ["evaluation"]
    measured("memory", "accuracy", "--out", tmp_path)
    assert calls[7:] == ["memory", "race"]


@pytest.mark.parametrize("words", [["nonsense"], ["whole"], ["--data", "nowhere"], ["--device"]])
def test_bad_input_gets_one_line(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    with pytest.raises(SystemExit, match="2"):
        run.main()
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "evaluation", stop)
    with pytest.raises(SystemExit, match="the same command goes on"):
        measured("evaluate", "--out", tmp_path)


def test_the_race_goes_on_after_an_interruption_as_if_there_had_been_none(
    small, tmp_path, monkeypatch
):
    monkeypatch.setattr(race.os, "cpu_count", lambda: 1)
    trained, original = [], plain.train_epoch

    def accuracies(checkpoint):
        size = {"cycles": {"ours": (2, 3), "plain": (3,)}, "batch_size": 32}
        result = race.race(small, checkpoint, size)
        lanes = [(lane["name"], lane["epochs"]) for lane in result["lanes"]]
        assert lanes == [("ours", 2), ("ours", 3), ("plain", 3)]
        return [[e["test_accuracy"] for e in lane["history"]] for lane in result["lanes"]]

    def recorded(*words):
        trained.append(original(*words))
        return trained[-1]

    monkeypatch.setattr(plain, "train_epoch", recorded)
    whole = accuracies(tmp_path / "whole.ckpt")
    losses = trained.copy()
    calls, whole_epoch = [], race.epoch

    def interrupt(*words):
        figures = whole_epoch(*words)
        calls.append(0)
        if len(calls) == 6:  # at the end of the plain loop's second epoch, before it is kept
            raise KeyboardInterrupt
        return figures

    trained.clear()
    monkeypatch.setattr(race, "epoch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        accuracies(tmp_path / "cut.ckpt")
    assert accuracies(tmp_path / "cut.ckpt") == whole
    assert trained == [losses[0], losses[1], losses[1], losses[2]]  # of the plain loop


def test_seconds_count_until_the_first_epoch_at_the_level():
    history = [{"seconds": 10.0, "test_accuracy": a} for a in (60, 75, 69, 81)]
    seconds = [report.seconds_to(level, history) for level in (70, 75, 80, 90)]
    assert seconds == [20, 20, 40, math.inf]
    for epochs, seen, ended in ((20, 4, True), (20, 3, False), (3, 3, True)):
        lane = race.Lane("ours", epochs, print, [], torch.Generator(), history[:seen])
        assert lane.done() == ended


def test_the_plain_loop_trains(small):
    model = plain.network("bn", small)
    loader = plain.train_loader(small, 32, augmentation=[])
    x, y = next(iter(loader))
    assert x.shape == (32, 3, 32, 32) and x.dtype == torch.float32 and y.shape == (32,)
    assert x.is_contiguous()
    optimizer = plain.sgd(model)
    losses = [plain.train_epoch(model, optimizer, loader)[0] for _ in range(4)]
    assert losses[-1] < losses[0]
    accuracy = plain.evaluate(model, plain.test_loader(small, 16))
    _, predicted = evaluate(model, small.test_images, small.test_labels, small)
    ours = percent_correct(predicted, small.test_labels)
    assert accuracy == pytest.approx(ours)  # and so the loaders show the same images


def test_the_floor_trains_too(small):
    started = measure.start(measure.default_settings(norm="gn"), small, measure.CPU)
    images, labels = small.train_images, small.train_labels
    x, y = next(measure.batches(images, labels, small, 32))
    assert x.is_contiguous(memory_format=torch.channels_last)

    def loss():
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(started.forward(x).float(), y).item()

    before = loss()
    measure.floor(started, x, y, 10)
    assert loss() < before


def test_the_floor_of_a_gpu_trains_too(small):
    x, y = next(measure.batches(small.train_images, small.train_labels, small, 32))
    for way in gpu.ON_CPU:
        torch.manual_seed(0)
        train = gpu.lane("bn", way, small, x, y)
        first = train(steps=1)
        assert train(steps=8) < first / 2, way


def test_a_probe_measures_in_a_process_of_its_own():
    options = {"norm": "bn", "images": 16, "batch_size": 8, "steps": 1}
    assert measure.probe("plain", **options)["peak_mb"] > 50
    with pytest.raises(RuntimeError, match="KeyError: 'nothing'"):
        measure.probe("nothing")


def test_two_processes_share_each_batch():
    options = {"norm": "bn", "images": 16, "batch_size": 8, "steps": 2}
    found = measure.probe("ours", processes=2, threads=1, **options)
    assert found["images"] == 16 and found["seconds"] > 0


def test_the_report_shows_every_part(records, tmp_path):
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    empty = report.page(page, {})
    assert empty.count("Not measured.") == 8
    (tmp_path / "results" / "other").mkdir(parents=True)
    for name, record in records.items():
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(record))
    (tmp_path / "results" / "other" / "step.json").write_text(json.dumps(records["step"]))
    (tmp_path / "README.md").write_text(empty, encoding="utf-8")
    report.write(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Not measured." not in text and "TOY SIZE" in text
    assert text.split("<!--")[0] == empty.split("<!--")[0]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for row, following in zip(rows, rows[1:], strict=False):
        if following.startswith("| --- |"):
            assert row.count("|") == following.count("|")
    pictures = {file.name for file in (tmp_path / "images").iterdir()}
    assert pictures == {"step.png", "step-other.png", "accuracy-bn.png"}
    assert all(f"(images/{name})" in text for name in pictures)


def test_a_page_without_a_block_is_refused():
    with pytest.raises(ValueError):
        report.page("<!-- step -->", {})


def lane(name, epochs, *seconds):
    """A lane that takes so many seconds to each level, or never gets to the last ones."""
    history, before = [], 0.0
    for level, until in zip((70, 80), seconds, strict=False):
        history.append({"seconds": until - before, "test_accuracy": float(level)})
        before = until
    return {"name": name, "epochs": epochs, "history": history}


def test_a_level_never_reached_is_said_to_be_so():
    lanes = [lane("ours", 20, 10.0), lane("plain", 20, 40.0, 50.0)]
    text = report.accuracy({"norm": "bn", "workers": 0, "lanes": lanes}, {})
    assert "| ours, cycle of 20 | 10 | never | 1 | 70.00 |" in text
    assert "| plain, cycle of 20 | 40 | 50 | 2 | 80.00 |" in text


def test_a_ratio_is_of_each_rounds_own_pair_and_of_the_better_number_of_workers():
    rounds = {"ours": [1.0, 2, 4], "plain_0": [9.0, 9, 9], "plain_2": [2.0, 4, 9]}
    assert report.quartiles(rounds, "plain", "ours") == [2, 2, 2.125]


def test_the_page_shows_the_committed_results():
    committed = report.read_all(BENCHMARKS / "results")
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert report.page(text, committed) == text, "run python benchmarks/report.py"
    assert not any(record["circumstances"]["toy"] for record in committed.values())
    assert all((BENCHMARKS / path.split(")")[0]).exists() for path in text.split("](")[1:]
               if path.startswith("images/"))  # fmt: skip
