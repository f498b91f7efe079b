"""What two processes gain on two cores: python benchmarks/parallel.py --data PATH

The same steps at the same batch size: one process with a thread, one with two threads, two processes with a thread each.
The three take turns, so that a busy machine does not favour one. Medians of the rounds, written to results/processes.json.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from normcourse import default_settings, load_data, parallel
from normcourse.train import _device_name, _start, _train_epoch, write_record

KINDS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1)}


def measure(norm: str, source: str | None, steps: int) -> float:
    """Milliseconds a step, in this process or in all that torchrun started."""
    parallel.start(torch.device("cpu"))
    rank, processes = parallel.place()
    settings = replace(default_settings(norm=norm), processes=processes)
    data = parallel.from_first(lambda: load_data(source))
    run = _start(settings, data, torch.device("cpu"))

    def epoch(steps: int) -> None:
        count = steps * settings.batch_size
        _train_epoch(run, settings, data, data.train_images[:count], data.train_labels[:count], progress=False)

    epoch(5)  # the first steps allocate memory
    started = time.perf_counter()
    epoch(steps)
    return 1000 * (time.perf_counter() - started) / steps


def launch(kind: str, norm: str, chosen: argparse.Namespace) -> float:
    """Measure in processes of their own."""
    processes, threads = KINDS[kind]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words = [sys.executable, *torchrun, __file__, "--norm", norm, "--steps", str(chosen.steps)]
    words += ["--data", chosen.data] if chosen.data else []
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="source of the images (default: $NORMCOURSE_DATA, else auto)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--norm", help=argparse.SUPPRESS)  # set where it measures, in the processes it launches
    chosen = parser.parse_args()
    if chosen.norm:
        milliseconds = measure(chosen.norm, chosen.data, chosen.steps)
        if parallel.place()[0] == 0:
            print(milliseconds)
        parallel.end()
        sys.exit()
    result = {}
    for norm in ("bn", "ln", "gn"):
        rounds = [{kind: launch(kind, norm, chosen) for kind in KINDS} for _ in range(chosen.rounds)]
        result[norm] = {kind: statistics.median(each[kind] for each in rounds) for kind in KINDS} | {"rounds": rounds}
        one, _, two = (result[norm][kind] for kind in KINDS)
        result[norm]["speed-up"] = one / two
        print(f"{norm}: {one:.1f} ms a step, two processes {two:.1f} ms: {one / two:.2f} times as fast")
    machine = {
        "device": _device_name(torch.device("cpu")), "cores": os.cpu_count(), "torch": torch.__version__,
        "python": platform.python_version(), "steps": chosen.steps,
    }  # fmt: skip
    record = {"part": "processes", "machine": machine, "milliseconds a step": result}
    write_record(Path(__file__).with_name("results") / "processes.json", record)
