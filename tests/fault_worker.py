"""Trainings in forked processes, which are killed: ``python fault_worker.py FOLDER IMAGES``; prints what it did as JSON.

Forking saves the import of PyTorch, seconds at each start. The parent never trains: autograd does not survive a fork.
"""

import json
import os
import random
import resource
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch

from normcourse import cli, default_settings, evaluate, fit, load_data
from normcourse import data as data_module
from normcourse import train as train_module

DIGITS = load_data("digits")
DATA = DIGITS._replace(
    train_images=DIGITS.train_images[:40], train_labels=DIGITS.train_labels[:40],
    test_images=DIGITS.test_images[:20], test_labels=DIGITS.test_labels[:20],
)  # fmt: skip
RUNS = [
    default_settings(net, norm, epochs=epochs, batch_size=16, dropout=0.1, seed=epochs)
    for net, norm, epochs in (("reference", "bn", 3), ("normnet", "gn", 4), ("reference", "ln", 5))
]


def train(folder, runs=RUNS):
    for settings in runs:
        fit(settings, DATA, folder, "cpu", progress=False)


def start(function):
    """Run the function in a forked process; returns its process id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    try:
        os._exit(function() or 0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(99)


def wait(pid):
    """The exit status; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def whole_files(folder):
    """Every record and every file of tensors can be read: nothing is half-written. Returns the records' names."""
    for path in [*folder.glob("*.pt"), *folder.glob("*.ckpt")]:
        torch.load(path, weights_only=True)
    for path in folder.glob("*.json"):
        train_module.read_record(path)
    return {path.name for path in folder.glob("*.json")}


def at_random(folder, kills=24):
    """Kill trainings at random moments, resume them, and let them end; a record once there must stay."""
    chance, done, folders, seen = random.Random(0), 0, 1, set()
    started = time.monotonic()
    assert wait(start(partial(train, folder / "whole"))) == 0
    seconds = time.monotonic() - started
    while done < kills:
        cut = folder / "cut" / f"{folders}"
        pid = start(partial(train, cut))
        time.sleep(chance.uniform(0, 0.5 * seconds))
        os.kill(pid, signal.SIGKILL)
        killed = wait(pid) == -signal.SIGKILL
        done += killed
        assert seen <= (seen := whole_files(cut))
        if not killed:  # it had ended before
            folders, seen = folders + 1, set()
    assert wait(start(partial(train, folder / "cut" / f"{folders}"))) == 0
    return {"kills": done, "folders": folders}


def in_each_write(folder):
    """Kill the training before, in and after each write of a file; resume it after each kill."""
    write_file, replace = data_module.write_file, os.replace

    def deadly(moment, path, write):
        deadly.count -= 1
        if deadly.count:
            return write_file(path, write)

        def half(file):
            write(file)
            file.flush()
            if moment == "half":
                file.truncate(file.tell() // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        if moment != "half":
            os.replace = lambda *paths: (
                (moment == "renamed" and replace(*paths)),
                os.kill(os.getpid(), signal.SIGKILL),
            )
        write_file(path, half)

    def die(moment, count):
        deadly.count, train_module.write_file = count, partial(deadly, moment)
        train(folder / f"{moment}{count}", RUNS[:1])

    kills = 0
    for moment in ("half", "written", "renamed"):
        for count in range(1, RUNS[0].epochs + 3):  # a checkpoint after each epoch, the weights, the record
            kills += wait(start(partial(die, moment, count))) == -signal.SIGKILL
            whole_files(folder / f"{moment}{count}")
            assert wait(start(partial(train, folder / f"{moment}{count}", RUNS[:1]))) == 0
    return {"kills": kills}


def at_once(folder):
    """Several processes in one folder: the same runs in two orders, and in the same order."""
    pids = [start(partial(train, folder / "all", runs)) for runs in (RUNS, RUNS[::-1], RUNS)]
    return {"statuses": [wait(pid) for pid in pids], "records": len(whole_files(folder / "all"))}


def commands_at_once(folder, images):
    """Two commands in one runs folder, one training in common; their reports are made at the same time."""
    words = ["train", "--data", images, "--runs", str(folder), "--net", "reference", "--epochs", "1", "--norm"]
    return {
        "statuses": [wait(pid) for pid in [start(partial(cli.main, words + n)) for n in (["bn", "ln"], ["ln", "bn"])]]
    }


def no_room(folder, images):
    """The system itself refuses files above a size: an error, and status 2; afterwards the training goes on."""

    def limited(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        cli.write_report = lambda *_: ""  # only the training is of interest here
        return cli.main(["train", "--data", images, "--runs", str(folder), "--epochs", "2", "--norm", "bn"])

    return {"statuses": [wait(start(partial(limited, size))) for size in (30_000, resource.RLIM_INFINITY)]}


if __name__ == "__main__":
    for settings in RUNS:  # what can be done before the fork: imports, and kernels that are compiled at first use
        model = train_module._start(settings, DATA, torch.device("cpu"))["model"]
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        train_module.make_optimizer(model, settings).step()
        evaluate(model, DATA.test_images, DATA.test_labels, DATA)
    folder, images = Path(sys.argv[1]), sys.argv[2]
    told = {run.__name__: run(folder / run.__name__) for run in (at_random, in_each_write, at_once)}
    told |= {run.__name__: run(folder / run.__name__, images) for run in (commands_at_once, no_room)}
    print(json.dumps(told | {"leftovers": len(list(folder.rglob("*.tmp")))}))
