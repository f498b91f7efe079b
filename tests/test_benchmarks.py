"""The benchmarks at toy size: every part runs and its result is whole; no time is judged. The page shows the results."""

import argparse
import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from normcourse.model import build

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
measure, parallel, plain, probe, race, report, run = map(
    importlib.import_module, ("measure", "parallel", "plain", "probe", "race", "report", "run")
)
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # the DataLoader's workers, Python 3.12


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
        assert run.main() == 0
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def records(tmp_path_factory, cache):
    """A result of each part. What has a process of its own is measured in this one: a dozen more would take a minute."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "probe", lambda kind, threads, **options: in_process(kind, options))
        measured("step", "evaluate", "machine", "grow", "--out", folder)
        measured("memory", "accuracy", "processes", "--norm", "gn", "--out", folder)
    return report.read_all(folder)


def in_process(kind, options):
    given = argparse.Namespace(**{"norm": "bn", "images": 16} | options)
    return probe.KINDS[kind](given) | {"peak_mb": probe.peak_memory()}


def test_every_part_leaves_a_whole_result(records):
    assert set(records) == {"step", "evaluate", "machine", "memory", "accuracy-gn", "grow-bn", "processes"}
    for name, record in records.items():
        assert {"part", "circumstances", "size", "result"} == set(record)
        found = record["circumstances"]
        assert found["device"] and found["threads"] >= 1 and found["toy"] and found["data"].startswith("digits")
        assert {"torch", "torchvision", "python", "normcourse"} == set(found["versions"])
        assert all(math.isfinite(n) and n >= 0 for n in numbers(record["result"])), name
    for part in ("step", "evaluate", "machine"):
        assert list(records[part]["result"]["norms"]) == ["bn", "ln", "gn"]
    for each in records["step"]["result"]["norms"].values():
        assert set(each["ms"]) == {"floor", "ours", "plain_0", "plain_2"} and each["plain"] in each["ms"]
        assert all(len(rounds) == run.TOY["rounds"] for rounds in each["ms"].values())
    assert set(records["processes"]["result"]["gn"]["ms"]) == set(parallel.KINDS)
    assert set(records["memory"]["result"]["peak_mb"]["gn"]) == {"ours", "plain"}
    for axis, key in (("images", "grow_images"), ("batch_size", "batch_sizes"), ("threads", "threads")):
        assert [point["value"] for point in records["grow-bn"]["result"][axis]] == list(run.TOY[key])


def test_a_part_is_measured_once_unless_it_is_named(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(run, "worker", lambda part, norms, *_: lambda: calls.append((part, norms)))
    monkeypatch.setattr(report, "section", lambda record: "")
    everything = [("step", run.MAIN), ("evaluate", run.MAIN), ("machine", run.MAIN), ("memory", run.MAIN)]
    everything.append(("processes", run.MAIN))
    measured("--out", tmp_path)
    assert calls == everything + [("grow", ["bn"]), ("accuracy", ["bn"])]
    measured("--out", tmp_path)
    assert len(calls) == 7
    measured("memory", "--out", tmp_path)
    assert calls[7:] == [("memory", run.MAIN)]
    measured("accuracy", "--norm", "ln", "gn", "--out", tmp_path)
    assert calls[8:] == [("accuracy", ["ln"]), ("accuracy", ["gn"])]


@pytest.mark.parametrize("words", [["nonsense"], ["whole"], ["--data", "nowhere"], ["--device", "tpu"]])
def test_bad_input_gets_one_line(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    assert run.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_the_race_goes_on_after_an_interruption_as_if_there_had_been_none(small, tmp_path, monkeypatch):
    monkeypatch.setattr(race, "better_workers", lambda *_: 0)

    def accuracies(checkpoint):
        size = {"cycles": {"ours": (2, 3), "plain": (3,)}, "batch_size": 32}
        result = race.race(small, "bn", run.TOY | size, CPU, checkpoint)
        lanes = [(lane["name"], lane["epochs"]) for lane in result["lanes"]]
        assert lanes == [("ours", 2), ("ours", 3), ("plain", 3)]
        return [[(e["train_accuracy"], e["test_accuracy"]) for e in lane["history"]] for lane in result["lanes"]]

    whole = accuracies(tmp_path / "whole.ckpt")
    calls, original = [], race.measure

    def interrupt(*words):
        calls.append(0)
        if len(calls) == 6:  # at the end of the plain loop's second epoch, before it is kept
            raise KeyboardInterrupt
        return original(*words)

    monkeypatch.setattr(race, "measure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        accuracies(tmp_path / "cut.ckpt")
    assert accuracies(tmp_path / "cut.ckpt") == whole


def test_seconds_count_until_the_first_epoch_at_the_level():
    history = [{"seconds": 10.0, "test_accuracy": a} for a in (60, 75, 69, 81)]
    assert [race.reach(history, level) for level in (70, 75, 80, 90)] == [20, 20, 40, None]
    for epochs, seen, ended in ((20, 4, True), (20, 3, False), (3, 3, True)):
        assert race.done({"epochs": epochs, "history": history[:seen]}) == ended


@pytest.mark.parametrize("norm", ["bn", "ln", "gn"])
def test_the_operations_are_those_that_pytorch_counts(norm):
    net = build("normnet", norm)
    with FlopCounterMode(display=False) as counter:  # right for the forward pass; backward it ignores groups
        net(torch.zeros(4, 3, 32, 32))
    first = 2 * 4 * net.C1.conv[-1].filters().numel() * 32 * 32
    assert measure.needed(net, 4)["gflop"] * 1e9 == pytest.approx(3 * counter.get_total_flops() - first)


def test_the_plain_loop_trains(small):
    model = plain.network("bn", small, CPU)
    loader = plain.train_loader(small, 32, augmentation=[])
    x, y = next(iter(loader))
    assert x.shape == (32, 3, 32, 32) and x.dtype == torch.float32 and x.is_contiguous() and y.shape == (32,)
    optimizer = plain.sgd(model)
    losses = [plain.train_epoch(model, optimizer, loader, CPU)[0] for _ in range(4)]
    assert losses[-1] < losses[0]
    accuracy = plain.evaluate(model, plain.test_loader(small, 16), CPU)
    assert accuracy == pytest.approx(race.measure(model, small, CPU))  # and so the loaders show the same images


def test_a_probe_measures_in_a_process_of_its_own():
    found = measure.probe("plain", 1, images=16, batch_size=8, steps=1)
    assert found["images"] == 8 and found["seconds"] > 0 and (found["peak_mb"] is None or found["peak_mb"] > 50)
    with pytest.raises(RuntimeError, match="invalid choice"):
        measure.probe("nothing", 1)


def test_the_whole_training_is_timed(small):
    found = measure.whole(small, ["bn"], {"epochs": 2}, CPU)["norms"]["bn"]
    assert found["total_s"] > found["training_s"] > found["first_epoch_s"] > 0


def test_the_report_shows_every_part(records, tmp_path):
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    empty = report.page(page, {})
    assert empty.count("Not measured.") == len(report.BLOCKS) - 1
    gpu = {"whole-cuda": {"part": "whole", "circumstances": records["step"]["circumstances"], "result": {
        "epochs": 2, "norms": {"bn": dict.fromkeys(
            ("total_s", "training_s", "first_epoch_s", "later_epoch_s", "test_accuracy"), 1.5)}}}}  # fmt: skip
    for name, record in (records | gpu).items():
        (tmp_path / "results").mkdir(exist_ok=True)
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(record))
    (tmp_path / "results" / "other").mkdir()
    (tmp_path / "results" / "other" / "step.json").write_text(json.dumps(records["step"]))
    (tmp_path / "README.md").write_text(empty, encoding="utf-8")
    report.write(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Not measured." not in text and "TOY SIZE" in text and text.split("<!--")[0] == empty.split("<!--")[0]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for row, following in zip(rows, rows[1:], strict=False):
        if following.startswith("| --- |"):
            assert row.count("|") == following.count("|")
    pictures = {file.name for file in (tmp_path / "images").iterdir()}
    assert pictures == {"step.png", "step-other.png", "accuracy-gn.png"} | {f"grow-bn-{axis}.png" for axis in report.AXES}
    assert all(f"(images/{name})" in text for name in pictures)


def lane(name, epochs, seconds, to_70, to_80):
    history = [{"seconds": seconds, "train_accuracy": 50.0, "test_accuracy": 60.0}]
    return {"name": name, "epochs": epochs, "history": history, "seconds_to": {"70": to_70, "80": to_80}}


def rows_of(*lanes):
    """The rows of the target table for a race, without what they have in common."""
    result = {"norm": "bn", "workers": 0, "lanes": lanes}
    text = report.targets({"accuracy-bn": {"part": "accuracy", "result": result}})
    rows = [line.removeprefix("| the plain loop's seconds to ") for line in text.splitlines() if "seconds to 7" in line]
    rows += [line.removeprefix("| the plain loop's seconds to ") for line in text.splitlines() if "seconds to 8" in line]
    return [row.replace(" over ours, Batch Norm", "").replace(" at least 3 |", "") for row in rows], result


def test_a_level_never_reached_is_said_to_be_so():
    rows, result = rows_of(lane("ours", 1, 40.0, 10.0, None), lane("plain", 1, 40.0, None, None))
    assert rows[0] == "70 %, the default cycle | over 4.00 | yes |" and rows[2] == "80 %, the default cycle | ours never | no |"
    assert report.accuracy({"result": result}).count("never") == 5  # three cells, and the two ratios that ours never had


def test_each_loop_is_compared_with_its_longest_and_with_its_faster_cycle():
    ours = [lane("ours", 4, 80.0, 20.0, 40.0), lane("ours", 20, 90.0, 25.0, 80.0)]
    rows, _ = rows_of(*ours, lane("plain", 10, 150.0, 70.0, None), lane("plain", 20, 300.0, 50.0, 100.0))
    assert rows == [
        "70 %, the default cycle | 2.00 | no |", "70 %, each with its faster cycle | 2.50 | no |",
        "80 %, the default cycle | 1.25 | no |", "80 %, each with its faster cycle | 2.50 | no |",
    ]  # fmt: skip


def test_the_page_shows_the_committed_results():
    committed = report.read_all(BENCHMARKS / "results")
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert report.page(text, committed) == text, "run python benchmarks/report.py"
    assert not any(record["circumstances"]["toy"] for record in committed.values())
