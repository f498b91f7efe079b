"""Two processes that share each batch, against one process at the same batch size."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import parallel_runs
import pytest
import torch
from conftest import make_folder
from test_train import kept, same
from torch.nn import functional as F

from normcourse import CourseError, batches, default_settings, evaluate
from normcourse.engine import fit, parallel
from normcourse.engine.cli import main
from normcourse.results import command, run_name
from normcourse.train import learning_rate, set_lr

HERE = Path(__file__).parent
CPU = torch.device("cpu")
KEYS = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
LOSSES = ("train_loss", "test_loss")


def figures(record, keys=KEYS):
    found = []
    for epoch in record["history"]:
        found += [epoch[key] for key in keys]
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes found, and the folder they wrote to."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    network = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared = os.environ | network | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(HERE / "parallel_runs.py"), str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank}
        processes.append(subprocess.Popen(words, env=shared | place, **pipes))
    try:
        said = [process.communicate(timeout=900)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0, 0] and said == ["", ""], said
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in range(2)], folder


@pytest.fixture(scope="module")
def data():
    return parallel_runs.small_data()


@pytest.fixture
def two(both):
    return both[0][0]


@pytest.fixture(autouse=True)
def fp32(monkeypatch):
    monkeypatch.setattr(fit, "has_fast_bf16", lambda _: False)


@pytest.mark.parametrize("case", [case for case in parallel_runs.CASES if "bn" not in case])
def test_without_batch_statistics_two_processes_equal_one(case, two, data):
    one = parallel_runs.run(case, data)
    found, expected = figures(two[case]), figures(one)
    assert found == pytest.approx(expected, rel=2e-4), (found, expected)
    assert two[case]["settings"] == one["settings"] | {"processes": 2}


def by_hand(case, data):
    """Batch Norm per replica, in one process: the losses of each epoch.

    Each half of a batch has its own statistics; those of the first half are kept.
    """
    settings = parallel_runs.chosen(case)
    run = fit.start(settings, data, CPU)
    model, (optimizer,), losses = run.model, run.optimizers, []
    images, labels, size = data.train_images, data.train_labels, settings.batch_size
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for epoch in range(settings.epochs):
        total, steps = 0.0, math.ceil(len(labels) / size)
        augmentation = (run.generator, settings.shift, settings.flip)
        for step, (x, y) in enumerate(batches(images, labels, data, size, *augmentation)):
            set_lr(optimizer, learning_rate(settings, epoch + step / steps))
            optimizer.zero_grad()
            for rank in (1, 0):
                half = slice(rank, None, 2)
                if len(y[half]) == 0:  # of one image
                    continue
                model.load_state_dict(kept, strict=False)
                loss = F.cross_entropy(model(x[half]), y[half], reduction="sum")
                (loss / len(y)).backward()  # gradients add up
                total += loss.item()
            kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
            optimizer.step()
        tested = evaluate(model, data.test_images, data.test_labels, data)[0]
        losses += [total / len(labels), tested]
    return losses


@pytest.mark.parametrize("case", ["bn", "bn one left"])
def test_batch_norm_has_the_statistics_of_each_process(case, two, data):
    assert figures(two[case], LOSSES) == pytest.approx(by_hand(case, data), rel=2e-4)


def distance(one, other):
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def test_batch_norm_is_not_what_it_is_in_one_process(two, data):
    losses, one = figures(two["bn"], LOSSES), figures(parallel_runs.run("bn", data), LOSSES)
    # much farther from one process than from the statistics of each
    assert distance(losses, one) > 100 * distance(losses, by_hand("bn", data))


def test_every_process_returns_the_record_that_the_first_writes(both):
    (first, second), folder = both
    for name in [*parallel_runs.CASES, "whole", "interrupted", "read again", "cannot write"]:
        assert first[name] == second[name], name
    for case in parallel_runs.CASES:
        names = sorted(path.suffix for path in (folder / case).iterdir())
        assert names == [".json", ".pt"], case
    assert first["read again"] == json.loads(next((folder / "gn").glob("*.json")).read_text())


def test_an_interrupted_run_of_two_goes_on_to_the_same_numbers(two):
    assert same(two["whole"], two["interrupted"])


def test_dropout_differs_in_each_epoch_and_process(both):
    first, second = (found["seeds"] for found in both[0])
    assert len(first) == len(second) == 2 and len({*first, *second}) == 4


def test_what_the_first_cannot_write_ends_all(both):
    kind, text = both[0][1]["cannot write"]
    assert kind == "OSError" and text.startswith("cannot write ") and "taken" in text


def test_one_and_two_processes_have_records_of_their_own(data):
    one, two = default_settings(), default_settings(processes=2)
    assert run_name(one, data) != run_name(two, data)
    start = "torchrun --nproc-per-node 2 -m normcourse train --net normnet --norm bn"
    assert command(vars(two)).startswith(start) and "--processes" not in command(vars(two))
    assert command(vars(one)).startswith("python -m normcourse train")
    assert command(vars(default_settings(sync_bn=True))).endswith(" --sync-bn")
    # It has no batch statistics: one name for one run.
    assert not default_settings(norm="gn", sync_bn=True).sync_bn


def test_sync_bn_needs_a_gpu(capsys, tmp_path):
    words = ["train", "--sync-bn", "--device", "cpu", "--runs", str(tmp_path / "runs")]
    assert main(words) == 2
    captured = capsys.readouterr()
    expected = r"error: sync_bn needs GPUs .*leave --sync-bn out\n"
    assert captured.out == "" and re.fullmatch(expected, captured.err)
    with pytest.raises(CourseError, match="sync_bn needs GPUs"):
        parallel.check_sync_bn(True, CPU)
    with pytest.raises(CourseError, match="sync_bn needs GPUs"):
        fit.fit(default_settings(sync_bn=True), parallel_runs.small_data(), device="cpu")


def test_devices_that_several_processes_cannot_have(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(CourseError, match="more processes than GPUs; allowed: 1"):
        parallel.start(torch.device("cuda"))
    with pytest.raises(CourseError, match="'mps' takes one process; allowed for more: cpu, cuda"):
        parallel.start(torch.device("mps"))


@pytest.mark.parametrize("count", [1, 2])
def test_a_lost_process_is_one_line_and_any_other_error_is_shown_whole(
    count, tmp_path, monkeypatch, capsys
):
    reason = "[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:2100"

    def lost(*_):
        monkeypatch.setattr(parallel, "rank_and_size", lambda: (0, count))
        raise RuntimeError(f"{reason}\nmore")

    monkeypatch.setattr("normcourse.engine.cli.fit", lost)
    words = ["train", "--data", "digits", "--runs", str(tmp_path), "--device", "cpu"]
    if count == 1:
        with pytest.raises(RuntimeError):
            main(words)
        return
    assert main(words) == 1
    told = f"error: another process of this run ended ({reason}); the same command goes on "
    err = capsys.readouterr().err
    assert err.startswith(told) and err.count("\n") == 1


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"WORLD_SIZE": "2"}, "variable RANK expected, but not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "variable MASTER_ADDR expected, but not set"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "'two'"),
        ({"WORLD_SIZE": "2", "RANK": "", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "RANK"),
        ({"WORLD_SIZE": "2", "RANK": "x", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "'x'"),
    ],
)
def test_processes_that_torchrun_did_not_start(said, reason, monkeypatch, capsys):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(parallel.time, "sleep", lambda _: None)
    assert main(["train", "--data", "digits", "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: WORLD_SIZE is {said['WORLD_SIZE']!r}, but") and reason in line
    assert line.endswith("start them by torchrun, or unset it")


@pytest.mark.parametrize("said", ["", "1", None])
def test_one_process_needs_no_torchrun(said, monkeypatch):
    monkeypatch.setenv("RANK", "")
    monkeypatch.setenv("LOCAL_RANK", "")
    if said is None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("WORLD_SIZE", said)
    parallel.start(CPU)
    parallel.leave_it_to_the_first()
    assert parallel.rank_and_size() == (0, 1)


# --- the command, by torchrun


def torchrun(folder, runs):
    """Start the command with two processes."""
    start = "-m torch.distributed.run --standalone --nproc-per-node 2 -m normcourse train"
    options = "--norm ln --epochs 20 --batch-size 8 --device cpu"
    places = ["--data", str(folder), "--runs", str(runs)]
    words = [sys.executable, *start.split(), *options.split(), *places]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


def workers(process):
    """The ids of the two processes that torchrun started."""
    words = ["ps", "-o", "pid=", "--ppid", str(process.pid)]
    listed = subprocess.run(words, capture_output=True, text=True).stdout
    return sorted(map(int, listed.split()))


def ended(process):
    """What a run printed, and its exit status; a run that hangs is killed and fails the test."""
    try:
        return *process.communicate(timeout=600), process.returncode
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun then ends the others
            process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="ps and signals as on Linux")
def test_a_killed_worker_ends_the_run_and_the_next_start_goes_on(tmp_path):
    folder, runs = make_folder(tmp_path / "insects", count=24), tmp_path / "runs"
    process = torchrun(folder, runs)
    deadline = time.monotonic() + 600
    while not kept(runs) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(workers(process)[1], signal.SIGKILL)
    _, err, status = ended(process)
    assert status == 1 and "SIGKILL" in err, err
    assert "another process of this run ended" in err
    assert "goes on after the last finished epoch" in err
    before = kept(runs)
    assert 1 <= len(before) < 20 and not list(runs.glob("*/*.json"))
    out, err, status = ended(torchrun(folder, runs))
    assert status == 0, err
    assert out.count("| NormNet | Layer Norm (batch_size 8, processes 2) |") == 1
    assert (
        out.count("normnet ln, seed 0\n") == 1 and out.count("epoch 20 of 20: test accuracy") == 1
    )
    record = json.loads(next(runs.glob("*/*.json")).read_text())
    assert len(record["history"]) == 20 and record["settings"]["processes"] == 2
    assert record["history"][: len(before)] == before  # seconds and all: it did go on
    assert not list(runs.glob("*/*.ckpt"))
