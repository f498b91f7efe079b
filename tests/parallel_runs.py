"""What test_parallel.py runs in each of its processes: python parallel_runs.py FOLDER.

RANK and the like are set as torchrun sets them.
"""

import contextlib
import json
import sys
from pathlib import Path

import torch

from normcourse import CourseError, default_settings, fit, load_data
from normcourse import train as train_module
from normcourse.engine import fit as fit_module
from normcourse.engine import parallel

# Of 80 images the last batch is odd (26), short (16) or one image (79 + 1): one process gets none.
# With SGD: Muon and AdamW make a difference in the last digits of a gradient larger, and BN's other
# order of sums has one.
CASES = {
    "gn": {"norm": "gn", "batch_size": 27, "num_groups": 4},
    "ln one left": {"norm": "ln", "batch_size": 79},
    "bn": {"norm": "bn", "batch_size": 32, "optimizer": "sgd", "lr": 0.005},
    "bn one left": {"norm": "bn", "batch_size": 79, "epochs": 1, "optimizer": "sgd", "lr": 0.005},
    "reference with l1": {
        "net": "reference",
        "norm": "ln",
        "multiplier": 1,
        "batch_size": 33,
        "lr": 0.01,
    },
}


def small_data():
    """80 training and 41 test images."""
    digits = load_data("digits")
    return digits._replace(
        train_images=digits.train_images[:80],
        train_labels=digits.train_labels[:80],
        test_images=digits.test_images[:41],
        test_labels=digits.test_labels[:41],
    )


def chosen(case, **changed):
    """The settings of a case."""
    return default_settings(**{"epochs": 2} | CASES[case] | changed)


def run(case, data, folder=None, **changed):
    """One small training; in fp32, as bf16 rounds a half batch otherwise than a whole one."""
    fit_module.has_fast_bf16 = lambda _: False
    return fit(chosen(case, **changed), data, folder, "cpu", progress=False)


@contextlib.contextmanager
def noted_seeds():
    """What each epoch of a training meanwhile is seeded with, dropout above all."""
    seeds, train_epoch = [], train_module.train_epoch

    def noted(*arguments):
        seeds.append(torch.initial_seed())
        return train_epoch(*arguments)

    train_module.train_epoch = noted
    yield seeds
    train_module.train_epoch = train_epoch


def interrupted(data, folder):
    """Stop in the second epoch, then go on."""
    set_lr, steps = train_module.set_lr, []

    def interrupt(*arguments):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        set_lr(*arguments)

    train_module.set_lr = interrupt
    with contextlib.suppress(KeyboardInterrupt):
        run("bn", data, folder, dropout=0.1)
    train_module.set_lr = set_lr
    (checkpoint,) = folder.glob("*.ckpt")
    assert len(torch.load(checkpoint, weights_only=True)["history"]) == 1
    return run("bn", data, folder, dropout=0.1)


def main(folder: Path) -> None:
    parallel.start(torch.device("cpu"))
    data = small_data()
    found = {case: run(case, data, folder / case) for case in CASES}
    with noted_seeds() as found["seeds"]:
        found["whole"] = run("bn", data, dropout=0.1)
    found["interrupted"] = interrupted(data, folder / "interrupted")
    found["read again"] = run("gn", data, folder / "gn")
    rank = parallel.rank_and_size()[0]
    if rank == 0:
        (folder / "taken").write_text("a file, where a folder should be")
    try:
        run("gn", data, folder / "taken")
    except (CourseError, OSError) as error:
        found["cannot write"] = [type(error).__name__, str(error)]
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    parallel.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
