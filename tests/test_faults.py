"""Killed, interrupted and refused trainings: what was finished stays, and what goes on ends as if nothing had happened."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import make_folder
from jupyter_client.manager import start_new_kernel
from test_train import same, settings

from normcourse import CourseError, default_settings, fit
from normcourse import data as data_module
from normcourse import train as train_module
from normcourse.cli import main
from normcourse.train import read_record, run_name

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="the trainings are forked, which Windows cannot do")


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    """What fault_worker.py did, where, and its error output."""
    folder = tmp_path_factory.mktemp("faults")
    images = make_folder(tmp_path_factory.mktemp("images") / "insects", count=4)
    words = [sys.executable, Path(__file__).with_name("fault_worker.py"), folder, images]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), folder, done.stderr


@pytest.fixture(scope="module")
def whole(worker):
    """The records of the runs that nothing disturbed, and their folder."""
    folder = worker[1] / "at_random" / "whole"
    return {path.name: read_record(path) for path in folder.glob("*.json")}, folder


def equal(folder, whole):
    """Records equal in all but times, weights to the bit, and no checkpoint left."""
    records, there = whole
    names = {path.name for path in folder.glob("*.json")}
    for name in names:
        assert same(records[name], read_record(folder / name)), folder / name
        one, two = (torch.load((f / name).with_suffix(".pt"), weights_only=True) for f in (folder, there))
        assert all(torch.equal(one[key], two[key]) for key in two), folder / name
    return names


@posix
def test_killed_at_random_moments(worker, whole):
    told = worker[0]["at_random"]
    assert told["kills"] >= 20 and len(whole[0]) == 3
    folders = list((worker[1] / "at_random" / "cut").iterdir())
    assert len(folders) == told["folders"] and all(equal(folder, whole) == set(whole[0]) for folder in folders)


@posix
def test_killed_before_in_and_after_each_write(worker, whole):
    folders = list((worker[1] / "in_each_write").iterdir())
    assert (
        worker[0]["in_each_write"]["kills"] == len(folders) == 15
    )  # 3 checkpoints, weights, record; 3 moments of each
    assert all(len(equal(folder, whole)) == 1 for folder in folders)
    assert worker[0]["leftovers"] >= 10  # harmless; the next test is about them


def test_what_killed_processes_left_is_cleared_away_after_an_hour(tmp_path):
    old, young, other = (tmp_path / f"{name}.tmp" for name in ("run.ckpt.0123abcd", "run.pt.0123abcd", "mine.0123abcd"))
    for path in (old, young, other):
        path.write_text("half")
    for path in (old, other):
        os.utime(path, (time.time() - 4000,) * 2)
    data_module.write_file(tmp_path / "run.ckpt", lambda file: file.write(b"whole"))
    assert sorted(tmp_path.iterdir()) == sorted([young, other, tmp_path / "run.ckpt"])


@posix
def test_processes_in_one_folder_at_once(worker, whole):
    assert worker[0]["at_once"] == {"statuses": [0, 0, 0], "records": 3}
    assert equal(worker[1] / "at_once" / "all", whole) == set(whole[0])


@posix
def test_commands_in_one_folder_at_once(worker):
    assert worker[0]["commands_at_once"]["statuses"] == [0, 0], worker[2]
    folder = worker[1] / "commands_at_once" / "insects"
    assert len([read_record(path) for path in folder.glob("*.json")]) == len(list(folder.glob("*.pt"))) == 2
    assert (folder / "report.md").read_text(encoding="utf-8").count("| Reference |") == 2
    assert not list(folder.glob("*.tmp")) and not list(folder.glob("*.ckpt"))


@posix
def test_the_system_refuses_a_large_file(worker):
    assert worker[0]["no_room"]["statuses"] == [2, 0], worker[2]
    lines = [line for line in worker[2].splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and ".ckpt: File too large; make room there or name another folder" in lines[0], worker[2]
    assert len(list((worker[1] / "no_room").rglob("*.json"))) == 1 and not list((worker[1] / "no_room").rglob("*.tmp"))


@pytest.mark.parametrize("write", [1, 2, 3, 4], ids=["first checkpoint", "second checkpoint", "weights", "record"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
def test_a_write_that_fails_leaves_the_last_good_state(write, number, small, tmp_path, monkeypatch):
    chosen = default_settings("reference", epochs=2, batch_size=40)
    before = fit(default_settings("reference", epochs=1, batch_size=40), small, tmp_path, "cpu", False)
    (kept,), writes = tmp_path.glob("*.json"), []

    def refuse(path, mode):
        writes.append(path)
        if len(writes) >= write:
            raise OSError(number, os.strerror(number), str(path))
        return open(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(data_module, "open", refuse, raising=False)
        if number == errno.EROFS:  # a read-only disk refuses to remove even what is not there
            patch.setattr(Path, "unlink", lambda path, missing_ok=False: open(path / "x" / "y"))
        with pytest.raises(OSError, match=f"^cannot write .*{os.strerror(number)}; make room there or name another"):
            fit(chosen, small, tmp_path, "cpu", False)
    path = tmp_path / run_name(chosen, small)
    assert not path.with_suffix(".json").exists() and not list(tmp_path.glob("*.tmp"))
    if write > 1:
        assert len(torch.load(path.with_suffix(".ckpt"), weights_only=True)["history"]) == min(write - 1, 2)
    assert same(fit(chosen, small, tmp_path, "cpu", False), fit(chosen, small, None, "cpu", False))
    assert read_record(kept) == json.loads(json.dumps(before))


def test_another_process_ends_the_same_run_while_this_one_starts(small, tmp_path, monkeypatch):
    whole = fit(settings(epochs=1), small, None, "cpu", False)
    load = torch.load
    (tmp_path / f"{run_name(settings(epochs=1), small)}.ckpt").write_text("about to go")

    def too_late(path, **options):
        path.unlink()
        return load(path, **options)

    monkeypatch.setattr(torch, "load", too_late)
    assert same(fit(settings(epochs=1), small, tmp_path, "cpu", False), whole)


def test_two_unpack_the_archive_at_once(tmp_path, monkeypatch):
    """The other one is faster: its folder is taken, and ours is cleared away."""
    import hashlib
    import tarfile

    (tmp_path / "x").mkdir()
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "x", "cifar-10-batches-py")
    digest = hashlib.sha256((tmp_path / "cifar-10-python.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(data_module, "ARCHIVE_SHA256", digest)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    theirs = tmp_path / "cache" / "normcourse" / "cifar-10-batches-py"
    replace = os.replace

    def slower(source, target):
        (theirs / "data_batch_1").mkdir(parents=True)
        replace(source, target)

    monkeypatch.setattr(os, "replace", slower)
    assert data_module._extract(tmp_path / "cifar-10-python.tar.gz") == theirs
    assert list(theirs.parent.iterdir()) == [theirs] and (theirs / "data_batch_1").exists()


def test_weights_that_were_deleted_are_missed(folder, tmp_path, capsys, monkeypatch):
    words = [
        "train",
        "--data",
        folder,
        "--runs",
        tmp_path / "runs",
        "--epochs",
        "1",
        "--net",
        "reference",
        "--norm",
        "bn",
    ]
    monkeypatch.setattr("normcourse.cli.write_report", lambda *_: "")
    assert main(list(map(str, words))) == 0 and "missing" not in capsys.readouterr().out
    (weights,) = (tmp_path / "runs").rglob("*.pt")
    weights.unlink()
    assert main(list(map(str, words))) == 0
    assert f"note: {weights}, the weights, is missing; delete {weights.stem}.json" in capsys.readouterr().out


# --- Ctrl-C


def test_an_interrupt_while_a_checkpoint_is_written(small, tmp_path, monkeypatch):
    whole, save, saved = fit(settings(), small, None, "cpu", False), torch.save, []

    def interrupted(state, file):
        saved.append(state)
        if len(saved) == 2:
            file.write(b"half")
            raise KeyboardInterrupt
        save(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(settings(), small, tmp_path, "cpu", False)
    (checkpoint,) = tmp_path.iterdir()
    history = torch.load(checkpoint, weights_only=True)["history"]
    resumed = fit(settings(), small, tmp_path, "cpu", False)
    assert len(history) == 1 and resumed["history"][0] == history[0] and same(resumed, whole)


def test_the_stop_button_of_a_notebook(tmp_path):
    """A real kernel is interrupted in the middle of a training; the same cell, run again, goes on."""
    manager, client = start_new_kernel(startup_timeout=300)
    cell = f"record = fit(default_settings('reference', 'bn', epochs=20), small, {str(tmp_path)!r}, 'cpu', False)"

    def run(code):
        return client.execute_interactive(code, store_history=False, timeout=600, output_hook=lambda _: None)["content"]

    try:
        assert run("from normcourse import *; d = load_data('digits'); few, *_ = range(640, 641)\n"
                   "small = d._replace(train_images=d.train_images[:few], train_labels=d.train_labels[:few])\n"
                   )["status"] == "ok"  # fmt: skip
        client.execute(cell, store_history=False)
        deadline = time.monotonic() + 300
        while not list(tmp_path.glob("*.ckpt")) and time.monotonic() < deadline:
            time.sleep(0.01)
        manager.interrupt_kernel()
        assert client.get_shell_msg(timeout=300)["content"]["ename"] == "KeyboardInterrupt"
        (checkpoint,) = tmp_path.iterdir()
        kept = torch.load(checkpoint, weights_only=True)["history"]
        assert 1 <= len(kept) < 20
        assert run(cell)["status"] == "ok"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    (path,) = tmp_path.glob("*.json")
    history = read_record(path)["history"]
    assert len(history) == 20 and history[: len(kept)] == kept  # seconds and all: not one epoch was trained again


def test_a_run_that_goes_on_elsewhere_says_so(small, tmp_path, monkeypatch):
    chosen, epoch, elsewhere = default_settings("reference", epochs=2), train_module._train_epoch, "another machine"

    def interrupted(run, *rest):
        if run["history"]:
            raise KeyboardInterrupt
        return epoch(run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "_train_epoch", interrupted)
        patch.setattr(train_module, "_device_name", lambda _: elsewhere)
        with pytest.raises(KeyboardInterrupt):
            fit(chosen, small, tmp_path, "cpu", False)
    record = fit(chosen, small, tmp_path, "cpu", False)
    assert [origin["device"] for origin in record["resumed_from"]] == [elsewhere] and record["device"] != elsewhere
    assert fit(chosen, small, None, "cpu", False)["resumed_from"] == []


def test_a_checkpoint_that_would_run_code_is_refused(small, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"model": Evil()}, tmp_path / f"{run_name(settings(), small)}.ckpt")
    with pytest.raises(CourseError, match="cannot go on from"):
        fit(settings(), small, tmp_path, "cpu", False)
    assert not (tmp_path / "written").exists()
