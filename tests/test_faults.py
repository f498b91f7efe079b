"""Killed, interrupted and refused trainings.

What was finished stays, and what goes on ends as if nothing had happened.
"""

import errno
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from conftest import Evil, checksums, make_folder, write_batches
from jupyter_client.manager import start_new_kernel
from test_train import equal, kept, same, settings

from normcourse import CourseError, default_settings, fit
from normcourse.engine import fit as fit_module
from normcourse.engine import record as record_module
from normcourse.engine import sources
from normcourse.engine.record import read_record, write_file
from normcourse.results import run_name, trained

posix = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="the trainings are forked, which Windows cannot do"
)


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    """What fault_worker.py did, where, and its error output."""
    folder = tmp_path_factory.mktemp("faults")
    images = make_folder(tmp_path_factory.mktemp("images") / "insects", count=4)
    words = [sys.executable, Path(__file__).with_name("fault_worker.py"), folder, images]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=one_thread)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), folder, done.stderr


@pytest.fixture(scope="module")
def whole(worker):
    """The records of the runs that nothing disturbed, and their folder."""
    folder = worker[1] / "at_random" / "whole"
    return {path.name: read_record(path) for path in folder.glob("*.json")}, folder


def check_equal(folder, whole):
    """Records equal in all but times, weights to the bit; returns the records' names."""
    records, there = whole
    names = {path.name for path in folder.glob("*.json")}
    for name in names:
        assert same(records[name], read_record(folder / name)), folder / name
        paths = [(each / name).with_suffix(".pt") for each in (folder, there)]
        one, two = (torch.load(path, weights_only=True) for path in paths)
        assert equal(one, two), folder / name
    return names


@posix
def test_killed_at_random_moments(worker, whole):
    told = worker[0]["at_random"]
    assert told["kills"] >= 20 and len(whole[0]) == 3
    folders = list((worker[1] / "at_random" / "cut").iterdir())
    assert len(folders) == told["folders"]
    assert all(check_equal(folder, whole) == set(whole[0]) for folder in folders)


@posix
def test_killed_before_in_and_after_each_write(worker, whole):
    folders = list((worker[1] / "in_each_write").iterdir())
    # 4 checkpoints, weights, record; 3 moments of each
    assert worker[0]["in_each_write"]["kills"] == len(folders) == 18
    assert all(len(check_equal(folder, whole)) == 1 for folder in folders)
    assert worker[0]["leftovers"] >= 10  # harmless; the next test is about them


def test_what_killed_processes_left_is_cleared_away_after_an_hour(tmp_path):
    names = ("run.ckpt.0123abcd", "run.pt.0123abcd", "mine.0123abcd")
    old, young, other = (tmp_path / f"{name}.tmp" for name in names)
    for path in (old, young, other):
        path.write_text("half")
    for path in (old, other):
        os.utime(path, (time.time() - 4000,) * 2)
    write_file(tmp_path / "run.ckpt", lambda file: file.write(b"whole"))
    assert sorted(tmp_path.iterdir()) == sorted([young, other, tmp_path / "run.ckpt"])


@posix
def test_processes_in_one_folder_at_once(worker, whole):
    assert worker[0]["at_once"] == {"statuses": [0, 0, 0], "records": 3}
    assert check_equal(worker[1] / "at_once" / "all", whole) == set(whole[0])


@posix
def test_commands_in_one_folder_at_once(worker):
    assert worker[0]["commands_at_once"]["statuses"] == [0, 0], worker[2]
    folder = worker[1] / "commands_at_once" / "insects"
    records = [read_record(path) for path in folder.glob("*.json")]
    assert len(records) == len(list(folder.glob("*.pt"))) == 2
    assert (folder / "report.md").read_text(encoding="utf-8").count("| Reference |") == 2
    assert not list(folder.glob("*.tmp")) and not list(folder.glob("*.ckpt"))


@posix
def test_the_system_refuses_a_large_file(worker):
    assert worker[0]["no_room"] == {"statuses": [2, 2, 0], "checkpoints": [0, 1, 0]}, worker[2]
    lines = [line for line in worker[2].splitlines() if line.startswith("error:")]
    assert len(lines) == 2, worker[2]
    for line in lines:
        assert ".ckpt: File too large; make room or name another folder" in line
    folder = worker[1] / "no_room"
    assert len(list(folder.rglob("*.json"))) == 1 and not list(folder.rglob("*.tmp"))


WRITES = ["first checkpoint", "after epoch 1", "after epoch 2", "weights", "record"]


@pytest.mark.parametrize("write", range(5), ids=WRITES)
@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EROFS, errno.EACCES], ids=errno.errorcode.get
)
def test_a_write_that_fails_leaves_the_last_good_state(write, number, small, tmp_path, monkeypatch):
    chosen = default_settings("reference", epochs=2, batch_size=40)
    earlier = default_settings("reference", epochs=1, batch_size=40)
    before = fit(earlier, small, tmp_path, "cpu", False)
    (path_before,), writes = tmp_path.glob("*.json"), []

    def refuse(path, mode):
        writes.append(path)
        if len(writes) > write:
            raise OSError(number, os.strerror(number), str(path))
        return open(path, mode)

    told = f"^cannot write .*{os.strerror(number)}; make room or name another"
    with monkeypatch.context() as patch:
        patch.setattr(record_module, "open", refuse, raising=False)
        if number == errno.EROFS:  # a read-only disk refuses to remove even what is not there
            patch.setattr(Path, "unlink", lambda path, missing_ok=False: open(path / "x" / "y"))
        with pytest.raises(OSError, match=told):
            fit(chosen, small, tmp_path, "cpu", False)
    path = tmp_path / run_name(chosen, small)
    assert not path.with_suffix(".json").exists() and not list(tmp_path.glob("*.tmp"))
    assert path.with_suffix(".ckpt").exists() == (write > 0)
    assert len(kept(tmp_path)) == (0, 0, 1, 2, 2)[write]
    undisturbed = fit(chosen, small, None, "cpu", False)
    assert same(fit(chosen, small, tmp_path, "cpu", False), undisturbed)
    assert read_record(path_before) == json.loads(json.dumps(before))


def test_another_process_ends_the_same_run_while_this_one_starts(small, tmp_path, monkeypatch):
    whole = fit(settings(epochs=1), small, None, "cpu", False)
    load = torch.load
    (tmp_path / f"{run_name(settings(epochs=1), small)}.ckpt").write_text("about to go")

    def too_late(path, **options):
        path.unlink()
        return load(path, **options)

    monkeypatch.setattr(torch, "load", too_late)
    assert same(fit(settings(epochs=1), small, tmp_path, "cpu", False), whole)


def test_two_read_the_archive_at_once(tmp_path, monkeypatch):
    """The other one is faster: both have the images, and the cache holds them once."""
    images, labels = write_batches(tmp_path / sources.BATCHES)
    archive, cache = tmp_path / "one" / sources.ARCHIVE, tmp_path / "cache"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / sources.BATCHES, sources.BATCHES)
    monkeypatch.setattr(sources, "OFFICIAL_MD5", checksums(tmp_path / sources.BATCHES))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    theirs = []

    def slower(path, write):
        monkeypatch.setattr(sources, "write_file", write_file)
        theirs.append(sources.load_path(archive))
        write_file(path, write)

    monkeypatch.setattr(sources, "write_file", slower)
    for data in (sources.load_path(archive), *theirs, sources.load_path(archive)):
        assert torch.equal(torch.cat([data.train_images, data.test_images]), images)
        assert torch.equal(torch.cat([data.train_labels, data.test_labels]), labels)
    (kept_once,) = (cache / "normcourse").iterdir()
    assert theirs and kept_once.suffix == ".pt" and list(archive.parent.iterdir()) == [archive]


def test_weights_that_were_deleted_are_missed(small, tmp_path):
    chosen = default_settings("reference", epochs=1)
    trained(chosen, small, runs=tmp_path)
    (weights,) = tmp_path.rglob("*.pt")
    weights.unlink()
    with pytest.raises(CourseError) as error:
        trained(chosen, small, runs=tmp_path)
    told = f"{weights}, the weights, is missing; delete {weights.stem}.json to train this run again"
    assert str(error.value) == told
    weights.with_suffix(".json").unlink()
    trained(chosen, small, runs=tmp_path)
    assert weights.exists()


# --- Ctrl-C


def test_an_interrupt_while_a_checkpoint_is_written(small, tmp_path, monkeypatch):
    whole, save, saved = fit(settings(), small, None, "cpu", False), torch.save, []

    def interrupted(state, file):
        saved.append(state)
        if len(saved) == 3:  # the one before the first epoch, the one after it, this one
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


@pytest.mark.parametrize("stop", [1, 3])
def test_the_last_line_of_an_interrupted_cell_says_how_to_go_on(
    stop, small, tmp_path, monkeypatch, capsys
):
    epochs, run_epoch = [], fit_module.run_epoch

    def interrupted(run, *rest):
        epochs.append(run)
        if len(epochs) == stop:
            raise KeyboardInterrupt
        return run_epoch(run, *rest)

    chosen = default_settings("reference", epochs=stop)
    monkeypatch.setattr(fit_module, "run_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt) as error:
        fit(chosen, small, tmp_path, "cpu")
    done = stop - 1
    told = f"interrupted: run the cell again to go on after epoch {done}"
    assert str(error.value) == told and len(kept(tmp_path)) == done
    fit(chosen, small, tmp_path, "cpu")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"epoch {epoch} of {stop}" for epoch in range(1, stop + 1)
    ]
    assert fit(chosen, small, tmp_path, "cpu") and not capsys.readouterr().out  # it was finished


def test_a_run_that_keeps_nothing_promises_nothing(small, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_module, "run_epoch", interrupt)
    with pytest.raises(KeyboardInterrupt) as error:
        fit(default_settings("reference", epochs=1), small, None, "cpu")
    assert str(error.value) == ""


FIRST_CELL = """
from normcourse import *
digits = load_data("digits")
images, labels = digits.train_images[:640], digits.train_labels[:640]
small = digits._replace(train_images=images, train_labels=labels)
settings = default_settings("reference", "bn", epochs=20)
"""


def test_the_stop_button_of_a_notebook(tmp_path):
    """A real kernel is interrupted in the middle of a training; the same cell goes on."""
    manager, client = start_new_kernel(startup_timeout=300)
    cell = f"record = fit(settings, small, {str(tmp_path)!r}, 'cpu', False)"
    options = {"store_history": False, "timeout": 600, "output_hook": lambda _: None}
    try:
        assert client.execute_interactive(FIRST_CELL, **options)["content"]["status"] == "ok"
        client.execute(cell, store_history=False)
        deadline = time.monotonic() + 300
        while not kept(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.01)
        manager.interrupt_kernel()
        assert client.get_shell_msg(timeout=300)["content"]["ename"] == "KeyboardInterrupt"
        assert [path.suffix for path in tmp_path.iterdir()] == [".ckpt"]
        before = kept(tmp_path)
        assert 1 <= len(before) < 20
        assert client.execute_interactive(cell, **options)["content"]["status"] == "ok"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    (path,) = tmp_path.glob("*.json")
    history = read_record(path)["history"]
    # seconds and all: not one epoch was trained again
    assert len(history) == 20 and history[: len(before)] == before


def test_a_run_that_goes_on_elsewhere_says_so(small, tmp_path, monkeypatch):
    chosen, elsewhere = default_settings("reference", epochs=2), "another machine"
    run_epoch = fit_module.run_epoch

    def interrupted(run, *rest):
        if run.history:
            raise KeyboardInterrupt
        return run_epoch(run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "run_epoch", interrupted)
        patch.setattr(record_module, "device_name", lambda _: elsewhere)
        with pytest.raises(KeyboardInterrupt):
            fit(chosen, small, tmp_path, "cpu", False)
    record = fit(chosen, small, tmp_path, "cpu", False)
    assert [origin["device"] for origin in record["resumed_from"]] == [elsewhere]
    assert record["device"] != elsewhere
    assert fit(chosen, small, None, "cpu", False)["resumed_from"] == []


def test_a_checkpoint_that_would_run_code_is_refused(small, tmp_path):
    state = {"model": Evil(tmp_path / "written")}
    torch.save(state, tmp_path / f"{run_name(settings(), small)}.ckpt")
    with pytest.raises(CourseError, match="cannot go on from"):
        fit(settings(), small, tmp_path, "cpu", False)
    assert not (tmp_path / "written").exists()


OTHERS = {
    "seed": default_settings("reference", epochs=2, seed=3),
    "lr": default_settings("reference", epochs=2, lr=0.05),
    "epochs": default_settings("reference", epochs=3),
    "norm": default_settings("reference", "ln", epochs=2),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_checkpoint_under_another_runs_name_is_refused(kind, small, tmp_path):
    wanted = default_settings("reference", epochs=2)
    path = tmp_path / run_name(wanted, small)
    fit_module.save_checkpoint(fit_module.start(OTHERS[kind], small, torch.device("cpu")), path)
    refused(wanted, small, tmp_path, f"{path}.ckpt is of another run: its {kind} is ")


def refused(wanted, data, folder, told):
    """The run is not trained; one line says why, and what to do."""
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CourseError) as error:
        fit(wanted, data, folder, "cpu", False)
    message = str(error.value)
    assert message.startswith(told) and message.endswith("; delete it to start this run again")
    assert len(message.splitlines()) == 1
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_checkpoint_of_other_images_is_refused(small, tmp_path):
    wanted = default_settings("reference", epochs=2)
    for other in ({"copy": "scikit-learn 0123456789ab"}, {"name": "d"}, {"classes": ("a",) * 10}):
        run = fit_module.start(wanted, small._replace(**other), torch.device("cpu"))
        path = tmp_path / run_name(wanted, small)
        fit_module.save_checkpoint(run, path)
        name = next(iter(other)).replace("name", "data")
        refused(wanted, small, tmp_path, f"{path}.ckpt is of another run: its {name} is ")


def test_a_checkpoint_that_names_no_settings_is_refused(small, tmp_path):
    """As those of earlier versions."""
    wanted = default_settings("reference", epochs=2)
    path = tmp_path / f"{run_name(wanted, small)}.ckpt"
    fit_module.save_checkpoint(fit_module.start(wanted, small, torch.device("cpu")), path)
    state = torch.load(path, weights_only=True)
    del state["identity"]
    torch.save(state, path)
    refused(wanted, small, tmp_path, f"{path} is of another run: its net is not named, not ref")


@pytest.mark.parametrize("kind", OTHERS)
def test_a_record_under_another_runs_name_is_refused(kind, small, tmp_path):
    wanted = default_settings("reference", epochs=2)
    fit(OTHERS[kind], small, tmp_path, "cpu", False)
    path = tmp_path / f"{run_name(wanted, small)}.json"
    next(tmp_path.glob("*.json")).rename(path)
    refused(wanted, small, tmp_path, f"{path} is of another run: its {kind} is ")
