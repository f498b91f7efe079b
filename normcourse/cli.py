"""The command line: ``python -m normcourse train`` and ``python -m normcourse report``."""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from normcourse import parallel
from normcourse.data import CourseError, load_data
from normcourse.norm import NORMS
from normcourse.report import data_folder, find_records, publish, report, write_report
from normcourse.train import Settings, default_settings, fit, pick_device, run_name


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and exits with 2."""

    def error(self, message: str) -> NoReturn:
        parallel.leave_it_to_the_first()
        print(f"error: {' '.join(message.split())} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def make_parser() -> Parser:
    """The commands and their options; what is left out comes from the recipe of the network and norm."""
    parser = Parser(prog="python -m normcourse", description="Train and compare normalizations on CIFAR-10.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,report}")
    _add_train(commands)
    told = "Write the results table (report.md) and the pictures beside the runs."
    tell = commands.add_parser("report", help="turn the records into the results table and the pictures", description=told)
    tell.add_argument("--runs", default="runs", help="folder that holds the runs (default: runs)")
    tell.add_argument("--data", help="where the images are (default: $NORMCOURSE_DATA, or where they are found)")
    published = "write images/, the README's results section and normcourse/results; CIFAR-10 only"
    tell.add_argument("--publish", action="store_true", help=published)
    return parser


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train", help="train networks, print their accuracies and draw the pictures",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Train one network for each norm and seed. A run that was interrupted goes on from its last epoch; a finished"
        " one is only read. What is not given comes from the recipe of the network and norm: in brackets, for normnet;"
        " and for the reference designs, where it differs.",
        epilog="Examples: train --norm bn --epochs 2; train --data path/to/images; train --net reference --norm ln gn"
        " --multiplier 1; train --seed 0 1 2, for the mean and standard deviation."
        " Two processes that share each batch: torchrun --nproc-per-node 2 -m normcourse train.",
    )  # fmt: skip
    usual, add, unset = default_settings(), train.add_argument, argparse.SUPPRESS
    norms = "; ".join(f"{key}: {name}" for key, name in NORMS.items())
    sources = "cifar10, digits, auto (CIFAR-10 if it can be had, else digits) or the path of a folder of images"
    nets = "the course's network, or the published designs with their published recipe"
    held_out = "hold a tenth of the training images out and evaluate on it; the test set is not touched"
    add("--net", choices=("normnet", "reference"), default="normnet", help=nets)
    add("--norm", nargs="+", choices=list(NORMS), default=["bn", "ln", "gn"], metavar="NORM", help=norms)
    add("--data", help=f"{sources} (default: $NORMCOURSE_DATA, else auto)", default=unset)
    add("--runs", default="runs", help="folder for records, weights, checkpoints and pictures")
    add("--device", default="auto", help="auto (CUDA if there, else CPU), cpu, cuda or mps")
    add("--seed", nargs="+", type=int, default=[usual.seed], help="draws weights and batches; a run for each")
    add("--validate", action="store_true", help=held_out)
    add("--more-epochs", action="store_true", help="allow more than the assignment's 20 epochs")
    add("--sync-bn", action="store_true", help="under torchrun, Batch Norm takes its statistics from the whole batch (GPUs only)")
    for name, kind, text in (
        ("epochs", int, f"1 to 20 ({usual.epochs})"),
        ("lr", float, "peak learning rate (tuned for each norm)"),
        ("momentum", float, "of Muon and SGD; AdamW's beta1 (0.9)"),
        ("weight_decay", float, f"of convolutions; of all weights in the references ({usual.weight_decay:g}; 1e-3 or 1e-5)"),
        ("batch_size", int, f"images a step ({usual.batch_size}; 64)"), ("dropout", float, "after each block (0)"),
        ("num_groups", int, f"groups of NormNet's Group Norm ({usual.num_groups})"),
        ("multiplier", int, "channels of the reference designs: 1, or 2 (published for ln and gn; over 50,000 parameters)"),
        ("optimizer", str, "muon, adamw or sgd (muon; sgd)"),
        ("schedule", str, "onecycle, or step: a tenth after every 8 epochs"),
        ("l1", float, "times the sum of all |weights|, added to the loss (0; 5e-4)"),
        ("shift", int, f"pixels an image is moved at most ({usual.shift}; 0)"),
    ):  # fmt: skip
        add(f"--{name.replace('_', '-')}", type=kind, default=unset, help=text)
    add("--flip", action=argparse.BooleanOptionalAction, default=unset, help="mirror half of the images (yes; no)")


def _check_folder(runs: str) -> None:
    try:
        Path(runs).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=runs).close()  # found out now, not after an epoch
    except (OSError, ValueError) as error:
        raise CourseError(f"--runs {runs} cannot be used ({error}); give a folder that can be written") from error


def train(options: dict[str, Any]) -> None:
    """Check every setting before anything is loaded, train one run for each norm, and report."""
    norms, seeds, runs, device = (options.pop(name) for name in ("norm", "seed", "runs", "device"))
    source = options.pop("data", None)
    norms, seeds = dict.fromkeys(norms), dict.fromkeys(seeds)  # what is given twice counts once
    settings = [default_settings(norm=norm, seed=seed, **options) for seed in seeds for norm in norms]
    parallel.check_sync_bn(options["sync_bn"], pick_device(device))
    parallel.start(pick_device(device))
    data = parallel.from_first(lambda: load_data(source))
    parallel.from_first(lambda: _check_folder(runs))
    if data.copy.startswith("scikit-learn") and "flip" not in options:  # a mirrored digit is no digit
        settings = [replace(each, flip=False) for each in settings]
    folder = data_folder(runs, data.name)
    parallel.from_first(lambda: find_records(folder))  # a broken one stops us now, not after the training
    tell = print if parallel.place()[0] == 0 else lambda _: None
    tell(f"{data.name} ({data.copy}): {len(data.train_labels):,} training and {len(data.test_labels):,} test images")
    for each in settings:
        record = fit(each, data, folder, device)
        run = folder / run_name(Settings(**record["settings"]), data)
        if not run.with_suffix(".pt").exists():
            tell(f"note: {run}.pt, the weights, is missing; delete {run.name}.json to train this run again")
        last, held_out = record["history"][-1], "val" if each.validate else "test"
        accuracies = f"train {last['train_accuracy']:.2f} %, {held_out} {last[f'{held_out}_accuracy']:.2f} %"
        tell(f"{each.net} {each.norm}: {accuracies}, {record['parameters']:,} parameters, {record['seconds']:,.0f} s")
    tell(f"\n## {data.name}\n\n{parallel.from_first(lambda: write_report(folder, data))}\nTable and pictures: {folder}")
    parallel.end()


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 for input that cannot be used, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):  # a Windows pipe cannot encode every class name
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    options = vars(make_parser().parse_args(arguments))
    try:
        if options.pop("command") == "train":
            train(options)
        else:
            print((publish if options["publish"] else report)(options["runs"], options["data"]))
    except (CourseError, OSError) as error:
        parallel.leave_it_to_the_first()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"\n{error or 'interrupted'}; the same command goes on after the last finished epoch", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if not parallel.is_lost(error):
            raise
        reason = f"another process of this run ended ({str(error).splitlines()[0]})"
        print(f"error: {reason}; the same command goes on after the last finished epoch", file=sys.stderr)
        return 1
    return 0
