"""Two processes that share each batch, against one process at the same batch size."""

import json
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
from test_train import same
from torch.nn import functional as F

from normcourse import CourseError, batches, default_settings, evaluate, parallel
from normcourse.cli import main
from normcourse.train import _start, command, learning_rate, run_name, set_lr

HERE = Path(__file__).parent
CPU = torch.device("cpu")
KEYS = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")


def figures(record, keys=KEYS):
    return [epoch[key] for epoch in record["history"] for key in keys]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes found, and the folder they wrote to."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    network = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(HERE / "parallel_runs.py"), str(folder)]
    processes = [
        subprocess.Popen(words, env=os.environ | network | {"RANK": str(r), "LOCAL_RANK": str(r)}, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for r in range(2)
    ]  # fmt: skip
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
    monkeypatch.setattr("normcourse.train.has_fast_bf16", lambda _: False)


@pytest.mark.parametrize("case", [case for case in parallel_runs.CASES if "bn" not in case])
def test_without_batch_statistics_two_processes_equal_one(case, two, data):
    one = parallel_runs.run(case, data)
    assert figures(two[case]) == pytest.approx(figures(one), rel=2e-4), (figures(two[case]), figures(one))
    assert two[case]["settings"] == one["settings"] | {"processes": 2}


def by_hand(settings, data):
    """Batch Norm per replica, in one process: each half of a batch has its own statistics, the first half's are kept."""
    run = _start(settings, data, CPU)
    model, optimizer, history = run["model"], run["optimizer"], []
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for epoch in range(settings.epochs):
        total, steps = 0.0, -(-len(data.train_labels) // settings.batch_size)
        chosen = (settings.batch_size, run["generator"], settings.shift, settings.flip)
        stream = batches(data.train_images, data.train_labels, data, *chosen)
        for step, (x, y) in enumerate(stream):
            set_lr(optimizer, learning_rate(settings, epoch + step / steps))
            optimizer.zero_grad()
            for half in (slice(1, None, 2), slice(0, None, 2))[len(y) == 1 :]:  # one image: the second half is empty
                model.load_state_dict(kept, strict=False)
                loss = F.cross_entropy(model(x[half]), y[half], reduction="sum")
                (loss / len(y)).backward()  # gradients add up
                total += loss.item()
            kept = {name: buffer.clone() for name, buffer in model.named_buffers()}  # those of the first half
            optimizer.step()
        history += [total / len(data.train_labels), evaluate(model, data.test_images, data.test_labels, data)[0]]
    return history


@pytest.mark.parametrize("case", ["bn", "bn one left"])
def test_batch_norm_has_the_statistics_of_each_process(case, two, data):
    settings = default_settings(**{"epochs": 2} | parallel_runs.CASES[case])
    losses = figures(two[case], ("train_loss", "test_loss"))
    assert losses == pytest.approx(by_hand(settings, data), rel=2e-4)


def test_batch_norm_is_not_what_it_is_in_one_process(two, data):
    settings = default_settings(**{"epochs": 2} | parallel_runs.CASES["bn"])
    losses, one = (figures(r, ("train_loss", "test_loss")) for r in (two["bn"], parallel_runs.run("bn", data)))
    far, near = (max(abs(a - b) for a, b in zip(losses, o, strict=True)) for o in (one, by_hand(settings, data)))
    assert far > 100 * near  # much farther from one process than from the statistics of each


def test_every_process_returns_the_record_that_the_first_writes(both):
    (first, second), folder = both
    assert first == second
    for case in parallel_runs.CASES:
        names = sorted(path.suffix for path in (folder / case).iterdir())
        assert names == [".json", ".pt"], case
    assert first["read again"] == json.loads(next((folder / "gn").glob("*.json")).read_text())


def test_an_interrupted_run_of_two_goes_on_to_the_same_numbers(two):
    assert same(two["whole"], two["interrupted"])


def test_what_the_first_cannot_write_ends_all(both):
    assert [found["cannot write"] for found in both[0]] == [both[0][0]["cannot write"]] * 2
    assert "taken" in both[0][0]["cannot write"][1]


def test_one_and_two_processes_have_records_of_their_own(data):
    one, two = default_settings(), default_settings(processes=2)
    assert run_name(one, data) != run_name(two, data)
    assert command(vars(two)).startswith("torchrun --nproc-per-node 2 -m normcourse train --net normnet --norm bn")
    assert "--processes" not in command(vars(two)) and command(vars(one)).startswith("python -m normcourse train")
    assert command(vars(default_settings(sync_bn=True))).endswith(" --sync-bn")
    assert not default_settings(norm="gn", sync_bn=True).sync_bn  # it has no batch statistics: one name for one run


def test_sync_bn_needs_a_gpu(capsys, tmp_path):
    assert main(["train", "--sync-bn", "--device", "cpu", "--runs", str(tmp_path / "runs")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and re.fullmatch(r"error: sync_bn needs GPUs .*leave --sync-bn out\n", captured.err)
    with pytest.raises(CourseError, match="sync_bn needs GPUs"):
        parallel.check_sync_bn(True, CPU)


def test_devices_that_several_processes_cannot_have(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(CourseError, match="give --nproc-per-node 1 or less, or --device cpu"):
        parallel.start(torch.device("cuda"))
    with pytest.raises(CourseError, match="'mps' takes one process"):
        parallel.start(torch.device("mps"))


@pytest.mark.parametrize("count", [1, 2])
def test_a_lost_process_is_one_line_and_any_other_error_is_shown_whole(count, tmp_path, monkeypatch, capsys):
    def lost(*_):
        monkeypatch.setattr(parallel, "place", lambda: (0, count))
        raise RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:2100\nmore")

    monkeypatch.setattr("normcourse.cli.fit", lost)
    words = ["train", "--data", "digits", "--runs", str(tmp_path), "--device", "cpu"]
    if count == 1:
        with pytest.raises(RuntimeError):
            main(words)
        return
    assert main(words) == 1
    expected = (
        r"error: another process of this run ended \(.*by peer \[127.0.0.1\]:2100\); the same command goes on .*\n"
    )
    assert re.fullmatch(expected, capsys.readouterr().err)


# --- the command, by torchrun


def torchrun(folder, runs):
    """Start the command with two processes."""
    words = ["train", "--data", folder, "--runs", runs, "--norm", "ln", "--epochs", "20", "--batch-size", "8",
             "--device", "cpu"]  # fmt: skip
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "normcourse"]
    return subprocess.Popen([*start, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip


def workers(process):
    """The ids of the two processes that torchrun started."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
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
    while not list(runs.glob("*/*.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(workers(process)[1], signal.SIGKILL)
    _, err, status = ended(process)
    assert status == 1 and "SIGKILL" in err, err
    assert "another process of this run ended" in err and "goes on after the last finished epoch" in err
    assert list(runs.glob("*/*.ckpt")) and not list(runs.glob("*/*.json"))
    out, err, status = ended(torchrun(folder, runs))
    assert status == 0, err
    assert out.count("| NormNet | Layer Norm (processes 2, batch_size 8) |") == out.count("normnet ln: train") == 1
    record = json.loads(next(runs.glob("*/*.json")).read_text())
    assert len(record["history"]) == 20 and record["settings"]["processes"] == 2
    assert not list(runs.glob("*/*.ckpt"))
