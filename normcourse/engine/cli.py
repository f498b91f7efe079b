"""The command line: ``python -m normcourse train`` and ``python -m normcourse report``."""

import argparse
import inspect
import os
import re
import runpy
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from normcourse.data import home, load_data
from normcourse.engine import parallel
from normcourse.engine.fit import fit, pick_device
from normcourse.engine.record import find_records
from normcourse.engine.report import report, write_report
from normcourse.errors import CourseError
from normcourse.norm import NORMS
from normcourse.results import NETS, data_folder
from normcourse.train import Settings, default_settings

GO_ON = "the same command goes on after the last finished epoch"
ABOUT = """\
Train one network for each norm and seed; a finished run is only read. What is not given comes from
the recipe, in brackets: NormNet's and that of the published design with Batch Norm. Two processes
share each batch by torchrun --nproc-per-node 2 -m normcourse train."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and exits with 2."""

    def error(self, message: str) -> NoReturn:
        sys.exit(fail(f"{message} (see {self.prog} --help)"))


def fail(message: str, status: int = 2) -> int:
    """Say what is wrong in one line, in the first process alone."""
    parallel.leave_it_to_the_first()
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status


def make_parser() -> Parser:
    """The commands and their options; what is left out comes from the recipe."""
    parser = Parser(prog="python -m normcourse", description="Train and compare normalizations.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,report}")
    train = commands.add_parser("train", help="train, report", description=ABOUT)
    train.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add_train_options(train.add_argument)
    about = "turn the records into the results table and the pictures, beside the runs"
    add = commands.add_parser("report", help=about, description=about).add_argument
    add("--runs", default=home() / "runs", help="folder that holds the runs (default: %(default)s)")
    add("--data", help="where the images are (default: $NORMCOURSE_DATA, or where they are found)")
    add("--publish", action="store_true", help="write README's results, images/, results/")
    return parser


def add_train_options(add: Any) -> None:
    """Add the options of ``train``: one for each setting, and where to run.

    The comment of a setting in Settings is the help of its option.
    """
    unset, usual, published = argparse.SUPPRESS, default_settings(), default_settings("reference")
    norms = "; ".join(f"{key}: {name}" for key, name in NORMS.items())
    sources = "cifar10; digits; auto: CIFAR-10, else digits; a folder (NormNet: at most 12 classes)"
    add("--net", choices=NETS, default="normnet", help="the course's or the published designs")
    add("--norm", nargs="+", choices=NORMS, default=["bn", "ln", "gn"], metavar="NORM", help=norms)
    add("--seed", nargs="+", type=int, default=[0], help="draws weights and batches; a run each")
    add("--data", help=f"{sources} (default: $NORMCOURSE_DATA, else auto)", default=unset)
    add("--runs", default=home() / "runs", help="folder for records, weights and pictures")
    add("--device", default="auto", help="auto (CUDA if there, else CPU), cpu, cuda or mps")
    add("--more-epochs", action="store_true", help="allow more than the assignment's 20 epochs")
    comments = re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Settings), re.MULTILINE)
    for name, comment in comments:
        value = getattr(usual, name)
        about = f"{comment} ({value}; {getattr(published, name)})"
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            add(option, action=argparse.BooleanOptionalAction, default=unset, help=about)
        elif name not in ("net", "norm", "seed", "processes"):
            add(option, type=int if value is None else type(value), default=unset, help=about)


def train(options: dict[str, Any]) -> None:
    """Check every setting before anything is loaded, train each run, and report."""
    runs, device, source = options.pop("runs"), options.pop("device"), options.pop("data", None)
    norms, seeds = dict.fromkeys(options.pop("norm")), dict.fromkeys(options.pop("seed"))
    settings = [default_settings(norm=n, seed=s, **options) for s in seeds for n in norms]
    parallel.check_sync_bn(any(s.sync_bn for s in settings), pick_device(device))
    parallel.start(pick_device(device))
    data = parallel.from_first(lambda: load_data(source))
    folder = data_folder(runs, data.name)
    parallel.from_first(lambda: find_records(folder))  # a broken one stops us now, not at the end
    parallel.tell(f"{data.name} ({data.copy}): {len(data.train_labels):,} training images")
    for each in settings:
        if data.copy.startswith("scikit-learn") and "flip" not in options:
            each = replace(each, flip=False)  # a mirrored digit is no digit
        parallel.tell(f"\n{each.net} {each.norm}, seed {each.seed}")
        fit(each, data, folder, device)
    table = parallel.from_first(lambda: write_report(folder, data))
    parallel.tell(f"\n## {data.name}\n\n{table}\nTable and pictures: {folder}")
    parallel.end()


def publish(runs: str) -> str:
    """Publish the runs in the checkout that this package lies in, by its experiments/publish.py."""
    script = Path(__file__).parents[2] / "experiments" / "publish.py"
    if not script.exists():
        raise CourseError(f"{script} is not there; publish from a checkout of the course")
    return str(runpy.run_path(str(script))["publish"](runs))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status is 2 for input that cannot be used, 130 for Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # before: normcourse/__init__.py
    for stream in (sys.stdout, sys.stderr):  # a Windows pipe cannot encode every class name
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    sys.stderr = sys.stderr or open(os.devnull, "w")  # closed: tqdm would fail
    os.environ["MPLBACKEND"] = "agg"  # pictures go into files; a notebook's backend may not be here
    try:
        options = vars(make_parser().parse_args(arguments))
        if options.pop("command") == "train":
            train(options)
        else:
            print(publish(options["runs"]) if options.pop("publish") else report(**options))
    except (CourseError, OSError, torch.cuda.OutOfMemoryError) as error:
        return fail(str(error))
    except KeyboardInterrupt as error:
        reason = str(error).partition(":")[0] or "interrupted"
        print(f"\n{reason}; {GO_ON}", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if not parallel.is_lost(error):
            raise
        return fail(f"another process of this run ended ({str(error).splitlines()[0]}); {GO_ON}", 1)
    return 0
