"""What two processes gain on two cores, at the same batch size: processes.json, a part of run.py.

It runs as a program of its own (``parallel.py NORM STEPS SOURCE``, under torchrun) where it measures.
"""

import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from normcourse import default_settings, load_data, parallel
from normcourse.train import _start, _train_epoch

KINDS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1)}


def processes(source: str | None, norms: list[str], size: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds a step of each kind; they take turns, so that a busy machine does not favour one."""
    work = [(norm, kind) for norm in norms for _ in range(size["process_rounds"]) for kind in KINDS]
    ms: dict[str, dict[str, list[float]]] = {norm: {kind: [] for kind in KINDS} for norm in norms}
    for norm, kind in tqdm(work, desc="processes"):
        ms[norm][kind].append(launch(kind, norm, size["process_steps"], source))
    return {norm: {"ms": each, "medians": {k: statistics.median(v) for k, v in each.items()}} for norm, each in ms.items()}


def launch(kind: str, norm: str, steps: int, source: str | None) -> float:
    """Measure in processes of their own."""
    count, threads = KINDS[kind]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    words = [sys.executable, *torchrun, __file__, norm, str(steps), source or ""]
    done = subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr}")
    return float(done.stdout)


def measure(norm: str, steps: int, source: str) -> float:
    """Milliseconds a step, in this process or in all that torchrun started."""
    parallel.start(torch.device("cpu"))
    settings = replace(default_settings(norm=norm), processes=parallel.place()[1])
    data = parallel.from_first(lambda: load_data(source))
    run = _start(settings, data, torch.device("cpu"))

    def epoch(steps: int) -> None:
        count = steps * settings.batch_size
        _train_epoch(run, settings, data, data.train_images[:count], data.train_labels[:count], progress=False)

    epoch(5)  # the first steps allocate memory
    started = time.perf_counter()
    epoch(steps)
    return 1000 * (time.perf_counter() - started) / steps


if __name__ == "__main__":
    milliseconds = measure(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    if parallel.place()[0] == 0:
        print(milliseconds)
    parallel.end()
