"""Trainings in forked processes, which are killed: ``python fault_worker.py FOLDER IMAGES``.

Prints what it did as JSON. Forking saves the import of PyTorch, seconds at each start. The parent
never trains: autograd does not survive a fork.
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

from normcourse import default_settings, evaluate, fit, load_data
from normcourse.engine import cli, record
from normcourse.engine import fit as fit_module
from normcourse.train import make_optimizers

DIGITS = load_data("digits")
DATA = DIGITS._replace(
    train_images=DIGITS.train_images[:40],
    train_labels=DIGITS.train_labels[:40],
    test_images=DIGITS.test_images[:20],
    test_labels=DIGITS.test_labels[:20],
)
RUNS = []
for net, norm, epochs in (("reference", "bn", 3), ("normnet", "gn", 4), ("reference", "ln", 5)):
    changed = {"epochs": epochs, "batch_size": 16, "dropout": 0.1, "seed": epochs}
    RUNS.append(default_settings(net, norm, **changed))


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
    """Every record and every file of tensors can be read: nothing is half-written.

    Returns the records' names.
    """
    for path in [*folder.glob("*.pt"), *folder.glob("*.ckpt")]:
        torch.load(path, weights_only=True)
    for path in folder.glob("*.json"):
        record.read_record(path)
    return {path.name for path in folder.glob("*.json")}


def at_random(folder, kills=24):
    """Kill trainings at random moments, resume them, let them end; a record once there stays."""
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
        now = whole_files(cut)
        assert seen <= now
        seen = now
        if not killed:  # it had ended before
            folders, seen = folders + 1, set()
    assert wait(start(partial(train, folder / "cut" / f"{folders}"))) == 0
    return {"kills": done, "folders": folders}


def kill_in_write(moment, count):
    """From now on, this process is killed in its write of that number, before, in or after it."""
    write_file, replace, left = record.write_file, os.replace, [count]

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def rename_and_die(*paths):
        replace(*paths)
        die()

    def deadly(path, write):
        left[0] -= 1
        if left[0]:
            return write_file(path, write)

        def half(file):
            write(file)
            file.flush()
            if moment == "half":
                file.truncate(file.tell() // 2)
                die()

        os.replace = rename_and_die if moment == "renamed" else die
        write_file(path, half)

    fit_module.write_file = record.write_file = deadly  # the second one writes the record


def in_each_write(folder):
    """Kill the training before, in and after each write of a file; resume it after each kill."""

    def die(moment, count):
        kill_in_write(moment, count)
        train(folder / f"{moment}{count}", RUNS[:1])

    kills = 0
    for moment in ("half", "written", "renamed"):
        # a checkpoint before the first and after each epoch, the weights, the record
        for count in range(1, RUNS[0].epochs + 4):
            kills += wait(start(partial(die, moment, count))) == -signal.SIGKILL
            whole_files(folder / f"{moment}{count}")
            assert wait(start(partial(train, folder / f"{moment}{count}", RUNS[:1]))) == 0
    return {"kills": kills}


def at_once(folder):
    """Several processes in one folder: the same runs in two orders, and in the same order."""
    pids = [start(partial(train, folder / "all", runs)) for runs in (RUNS, RUNS[::-1], RUNS)]
    return {"statuses": [wait(pid) for pid in pids], "records": len(whole_files(folder / "all"))}


def commands_at_once(folder, images):
    """Two commands in one runs folder, one training in common; their reports come at one time."""
    words = [
        "train",
        "--data",
        images,
        "--runs",
        str(folder),
        "--net",
        "reference",
        "--epochs",
        "1",
    ]
    pids = []
    for norms in (["bn", "ln"], ["ln", "bn"]):
        pids.append(start(partial(cli.main, [*words, "--norm", *norms])))
    return {"statuses": [wait(pid) for pid in pids]}


def no_room(folder, images):
    """The system itself refuses files above a size: an error, and status 2.

    First the checkpoint before the training, then the one after an epoch, which holds the
    optimizers' state, too. Without a limit the training goes on.
    """
    words = ["train", "--data", images, "--runs", str(folder), "--epochs", "2", "--norm", "bn"]

    def limited(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        cli.write_report = lambda *_: ""  # only the training is of interest here
        return cli.main(words)

    statuses, checkpoints = [], []
    for size in (30_000, 300_000, resource.RLIM_INFINITY):
        statuses.append(wait(start(partial(limited, size))))
        checkpoints.append(len(list(folder.rglob("*.ckpt"))))
    return {"statuses": statuses, "checkpoints": checkpoints}


def prepare():
    """What can be done before the fork: imports, and kernels that are compiled at first use."""
    for settings in RUNS:
        model = fit_module.start(settings, DATA, torch.device("cpu")).model
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in make_optimizers(model, settings):
            optimizer.step()
        evaluate(model, DATA.test_images, DATA.test_labels, DATA)


if __name__ == "__main__":
    prepare()
    folder, images = Path(sys.argv[1]), sys.argv[2]
    told = {}
    for run in (at_random, in_each_write, at_once):
        told[run.__name__] = run(folder / run.__name__)
    for run in (commands_at_once, no_room):
        told[run.__name__] = run(folder / run.__name__, images)
    print(json.dumps(told | {"leftovers": len(list(folder.rglob("*.tmp")))}))
