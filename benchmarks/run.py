"""Measure how fast the course trains, and how fast it could: python benchmarks/run.py --data PATH

Without a part's name, all parts that have no result yet are measured; a part that is named is measured again.
Run nothing else meanwhile. Ctrl-C is safe: finished parts are kept, and `accuracy` goes on after its last epoch.

  step       ms a training step: the floor, our epoch, the plain loop with 0 and 2 workers
  evaluate   seconds to evaluate the test images, ours and plain
  machine    what the processor and its memory can do, and what a step asks of them
  memory     peak memory of a training, ours and plain; imports; loading the data
  processes  what two processes gain on two cores
  grow       seconds and memory against images, batch size and threads
  accuracy   seconds to 70 % and to 80 %, ours and the best public recipe (about 40 minutes a norm)
  whole      20 epochs as a whole; only with --device cuda
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import measure
import parallel
import report
import torch
import torchvision
from race import race

from normcourse import __version__, load_data
from normcourse.cli import Parser
from normcourse.data import CourseError, Data
from normcourse.norm import NORMS
from normcourse.train import _device_name, pick_device, write_record

RESULTS, TOYS = Path(__file__).with_name("results"), Path("runs/benchmark-toys")
MAIN = ["bn", "ln", "gn"]
QUICK, LONG = ("step", "evaluate", "machine", "memory", "processes"), ("grow", "accuracy")  # on a CPU
ON_GPU = ("step", "evaluate", "machine", "accuracy", "whole")
FULL: dict[str, Any] = dict(
    batch_size=128, rounds=9, steps=15, test_images=10_000, test_rounds=5, matrix=2048, products=15, processes=7, probe_steps=10,
    grow_images=(5_000, 10_000, 20_000, 50_000), batch_sizes=(2, 8, 32, 128, 512, 1024), threads=(1, 2), grow_rounds=3,
    process_rounds=5, process_steps=40, epochs=20,
    cycles={"ours": (4, 20), "plain": (10, 20)},  # epochs; the short ones should just reach the highest level
)  # fmt: skip
TOY: dict[str, Any] = dict(
    batch_size=8, rounds=2, steps=2, test_images=16, test_rounds=2, matrix=64, products=2, processes=2, probe_steps=1,
    grow_images=(8, 16), batch_sizes=(2, 4), threads=(1,), grow_rounds=1, epochs=2,
    process_rounds=1, process_steps=1, cycles={"ours": (1, 2), "plain": (1, 2)},
)  # fmt: skip


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="parts to measure (again)", metavar="PART")
    parser.add_argument("--data", help="source of the images (default: $NORMCOURSE_DATA, else auto)")
    only = "norms (default: bn ln gn; accuracy and grow: bn)"
    parser.add_argument("--norm", nargs="+", choices=list(NORMS), metavar="NORM", help=only)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own choice, one a core)")
    parser.add_argument("--out", type=Path, help=f"folder of the JSON files (default: results; {TOYS} with --toy)")
    parser.add_argument("--toy", action="store_true", help="everything tiny, to see that it works; figures mean nothing")
    return parser


def jobs(options: argparse.Namespace, device: torch.device) -> list[tuple[str, str, list[str]]]:
    """What is to be measured: part, name of its file, norms. Accuracy has a file for each norm."""
    there = ON_GPU if device.type == "cuda" else QUICK + LONG
    if wrong := set(options.parts) - set(there):
        raise CourseError(f"no part {', '.join(sorted(wrong))} on {device.type}; allowed there: {', '.join(there)}")
    suffix, found = "-cuda" if device.type == "cuda" else "", []
    for part in options.parts or there:
        norms = options.norm or (["bn"] if part in LONG else MAIN)
        for some in [[norm] for norm in norms] if part in LONG else [norms]:
            found.append((part, part + suffix + (f"-{some[0]}" if part in LONG else ""), some))
    return [job for job in found if options.parts or not (options.out / f"{job[1]}.json").exists()]


def worker(part: str, norms: list[str], data: Data, size: dict[str, Any], device: torch.device, source: str | None,
           checkpoint: Path) -> Callable[[], dict[str, Any]]:  # fmt: skip
    """The function that measures a part."""
    threads = torch.get_num_threads()
    return {
        "step": partial(measure.step, data, norms, size, device),
        "evaluate": partial(measure.evaluation, data, norms, size, device),
        "machine": partial(measure.machine, data, norms, size, device),
        "memory": partial(measure.memory, source, norms, size, threads),
        "processes": partial(parallel.processes, source, norms, size),
        "grow": partial(measure.grow, norms[0], size, threads),
        "accuracy": partial(race, data, norms[0], size, device, checkpoint),
        "whole": partial(measure.whole, data, norms, size, device),
    }[part]


def circumstances(data: Data, device: torch.device, toy: bool) -> dict[str, Any]:
    """Hardware, versions, and how busy the machine was before the part began."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    versions = {"normcourse": __version__, "torch": torch.__version__, "torchvision": torchvision.__version__}
    return {
        "device": _device_name(device), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load_before": load,
        "versions": versions | {"python": platform.python_version()}, "system": platform.system(),
        "data": f"{data.name} ({data.copy})", "toy": toy, "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def run(options: argparse.Namespace) -> None:
    device = pick_device(options.device)
    options.out = options.out or (TOYS if options.toy else RESULTS)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    work, size = jobs(options, device), TOY if options.toy else FULL
    data = load_data(options.data)
    if options.toy:
        data = data._replace(train_images=data.train_images[:32], train_labels=data.train_labels[:32])
        data = data._replace(test_images=data.test_images[:16], test_labels=data.test_labels[:16])
    for part, name, norms in work:
        found = circumstances(data, device, options.toy)
        print(f"{name}: {', '.join(norms)}; {report.circumstances(found)}", flush=True)
        if (found["load_before"] or 0) > 0.5:
            print("note: the machine is busy, the times will be too long and uneven", file=sys.stderr)
        started, file = time.perf_counter(), options.out / f"{name}.json"
        checkpoint = file.with_suffix(".ckpt")
        result = worker(part, norms, data, size, device, options.data, checkpoint)()
        took = {"took_s": time.perf_counter() - started}
        write_record(file, {"part": part, "circumstances": found | took, "size": size, "result": result})
        checkpoint.unlink(missing_ok=True)
        print(f"\n{report.section(report.read(file))}\n", flush=True)


def main() -> int:
    try:
        run(make_parser().parse_args())
    except (CourseError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on with what is not finished", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
