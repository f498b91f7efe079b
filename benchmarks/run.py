"""Measure how fast the course trains, and how fast it could: python benchmarks/run.py --data PATH

Without a part's name, all parts that have no result yet are measured; a part that is named is
measured again. Run nothing else meanwhile. Ctrl-C is safe: finished parts are kept, and `accuracy`
goes on after its last epoch.

  step       ms a training step: the floor, our epoch, the plain loop with 0 and 2 workers
  evaluate   seconds to evaluate the test images, ours and plain
  memory     peak memory of a training, ours and plain; imports; loading the data
  processes  what two processes gain on two cores
  grow       seconds and memory against images, batch size and threads
  accuracy   seconds to 70 % and to 80 %, ours and the best public recipe (about 40 minutes)
  gpu        steps and whole trainings on a GPU (at most 8 minutes); only where it is named
"""

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import measure
import report
import torchvision
from gpu import gpu
from probe import cut
from race import race

from normcourse import CourseError, Data, load_data
from normcourse.engine.cli import Parser
from normcourse.engine.record import origin, write_record

RESULTS, TOYS = Path(__file__).with_name("results"), Path("runs/benchmark-toys")
PARTS = ("step", "evaluate", "memory", "processes", "grow", "accuracy")
SIZES: dict[str, tuple[Any, Any]] = {  # full, toy
    "batch_size": (128, 8),
    "steps": (20, 2),
    "rounds": (7, 2),
    "few_rounds": (3, 2),  # of what takes long
    "images": ((5_000, 10_000, 20_000, 50_000), (8, 16)),
    "batch_sizes": ((2, 8, 32, 128, 512, 1024), (2, 4)),
    "threads": ((1, 2), (1,)),
    "gpu_epochs": (20, 1),
    # Epochs of the cycles; the short ones should just reach the highest level.
    "cycles": ({"ours": (4, 20), "plain": (10, 20)}, {"ours": (1, 2), "plain": (1, 2)}),
}


def circumstances(data: Data, toy: bool) -> dict[str, Any]:
    """Hardware, versions, and how busy the machine was before the part began."""
    found = origin(measure.CPU, "as the part says")
    found["versions"]["torchvision"] = torchvision.__version__
    return found | {
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # Windows
        "data": f"{data.name} ({data.copy})",
        "toy": toy,
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def run(options: argparse.Namespace) -> None:
    if wrong := set(options.parts) - {*PARTS, "gpu"}:
        raise CourseError(f"no part {', '.join(sorted(wrong))}; allowed: {', '.join(PARTS)}, gpu")
    folder = options.out or (TOYS if options.toy else RESULTS)
    data = load_data(options.data)
    data = cut(data, 32, 16) if options.toy else data
    for part in options.parts or PARTS:
        name = f"{part}-bn" if part in ("grow", "accuracy") else part
        file = folder / f"{name}.json"
        if options.parts or not file.exists():
            run_part(part, file, data, options)


def run_part(part: str, file: Path, data: Data, options: argparse.Namespace) -> None:
    """Measure a part, write its file and print its table."""
    size = {name: toy if options.toy else full for name, (full, toy) in SIZES.items()}
    found = circumstances(data, options.toy)
    print(f"{file.stem}: {report.circumstances(found)}", flush=True)
    checkpoint = file.with_suffix(".ckpt")
    functions: dict[str, Any] = {
        "step": partial(measure.step, data),
        "evaluate": partial(measure.evaluation, data),
        "memory": partial(measure.memory, options.data),
        "processes": measure.processes,
        "grow": measure.grow,
        "accuracy": partial(race, data, checkpoint),
        "gpu": partial(gpu, data),
    }
    record = {"part": part, "circumstances": found, "size": size, "result": functions[part](size)}
    write_record(file, record)
    checkpoint.unlink(missing_ok=True)
    print(f"\n{report.section(record)}\n", flush=True)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="parts to measure (again)", metavar="PART")
    parser.add_argument("--data", help="source of the images (default: $NORMCOURSE_DATA, or auto)")
    parser.add_argument(
        "--out", type=Path, help=f"folder of the JSON files (default: results, or {TOYS})"
    )
    parser.add_argument("--toy", action="store_true", help="everything tiny, to see that it works")
    try:
        run(parser.parse_args())
    except (CourseError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on with what is not finished")


if __name__ == "__main__":
    main()
