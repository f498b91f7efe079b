"""The parts of run.py, the time to accuracy apart: each returns what was measured.

`step` and `evaluate` call what they compare in turn, round after round. `memory`, `grow` and
`processes` start probe.py, a fresh process for each figure. report.py computes the rest.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import plain
import torch
from probe import cut
from torch import Tensor
from torch.amp import GradScaler
from torch.nn import functional as F
from tqdm import tqdm, trange

from normcourse import Data, batches, default_settings, evaluate
from normcourse.engine.fit import Run, run_epoch, start

CPU = torch.device("cpu")
UNSCALED = GradScaler("cpu", enabled=False)
MAIN = ("bn", "ln", "gn")
PROCESSES = {  # how many, and threads of each
    "1 process, 1 thread": (1, 1),
    "1 process, 2 threads": (1, 2),
    "2 processes, 1 thread each": (2, 1),
}
Figures = dict[str, Any]
Lanes = dict[tuple[str, str], Callable[[], Any]]  # by norm and kind
PLAIN: Lanes = {}  # what the plain loop's own process can be asked to call


# --- in turn -----------------------------------------------------------------


def alternate(lanes: Lanes, rounds: int, unit: str, factor: float = 1) -> Figures:
    """Seconds (times ``factor``) of each lane, called in turn: {norm: {unit: {kind: rounds}}}."""
    norms: Figures = {norm: {unit: {}} for norm, _ in lanes}
    for (norm, kind), lane in lanes.items():
        norms[norm][unit][kind] = []
        lane()  # warm up
    order = list(lanes)
    for _ in trange(rounds):
        for norm, kind in order:
            started = time.perf_counter()
            lanes[norm, kind]()
            norms[norm][unit][kind].append(factor * (time.perf_counter() - started))
        order.append(order.pop(0))  # the next round begins with another one
    return norms


def plain_process(data: Data, batch_size: int) -> ProcessPoolExecutor:
    """A process for the plain loop alone: ours has its own keep the memory that a step frees."""
    return ProcessPoolExecutor(1, get_context("spawn"), prepare_plain, (data, batch_size))


def prepare_plain(data: Data, batch_size: int) -> None:
    """Each reads its loader to the end, so that no worker runs on beside others."""
    # Ctrl-C reaches all processes; the first one says so.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    test_loader = plain.test_loader(data, batch_size)
    for workers in (0, 2):
        loader = plain.train_loader(data, batch_size, workers)
        for norm in MAIN:
            model = plain.network(norm, data)
            train = partial(plain.train_epoch, model, plain.sgd(model), loader)
            PLAIN[norm, f"plain_{workers}"] = train
            PLAIN[norm, "plain"] = partial(plain.evaluate, model, test_loader)


def call_plain(norm: str, kind: str) -> None:
    PLAIN[norm, kind]()


def ask(process: ProcessPoolExecutor, norm: str, kind: str) -> None:
    """Call a lane of the plain loop in its process."""
    process.submit(call_plain, norm, kind).result()


def step(data: Data, size: Figures) -> Figures:
    """Milliseconds a step: the floor, our epoch, and the plain loop with and without workers."""
    steps, batch_size = size["steps"], size["batch_size"]
    data = cut(data, steps * batch_size)
    x, y = next(batches(data.train_images, data.train_labels, data, batch_size))
    lanes: Lanes = {}
    path = {}
    with plain_process(data, batch_size) as process:
        for norm in MAIN:
            run = start(default_settings(norm=norm, batch_size=batch_size), data, CPU)
            path[norm] = run.origin["precision"]
            lanes[norm, "floor"] = partial(floor, run, x, y, steps)
            lanes[norm, "ours"] = partial(run_epoch, run, data)
            for kind in ("plain_0", "plain_2"):
                lanes[norm, kind] = partial(ask, process, norm, kind)
        return {"path": path, "norms": alternate(lanes, size["rounds"], "ms", 1000 / steps)}


def floor(run: Run, x: Tensor, y: Tensor, steps: int, scaler: GradScaler = UNSCALED) -> float:
    """Forward, backward and optimizer on a batch that stays in memory, and nothing else."""
    run.model.train()
    for _ in range(steps):
        loss = F.cross_entropy(run.forward(x).float(), y)
        run.model.zero_grad()
        scaler.scale(loss).backward()
        for optimizer in run.optimizers:
            scaler.step(optimizer)
        scaler.update()
    return loss.item()  # of the last step; waits for a GPU


def evaluation(data: Data, size: Figures) -> Figures:
    """Seconds to evaluate the test images: ours, and the plain loop without workers."""
    images, labels = data.test_images, data.test_labels
    lanes: Lanes = {}
    with plain_process(cut(data, size["batch_size"]), size["batch_size"]) as process:
        for norm in MAIN:
            model = start(default_settings(norm=norm), data, CPU).model
            lanes[norm, "ours"] = partial(evaluate, model, images, labels, data)
            lanes[norm, "plain"] = partial(ask, process, norm, "plain")
        return {"images": len(labels), "norms": alternate(lanes, size["rounds"], "seconds")}


# --- each in a process of its own --------------------------------------------


def probe(kind: str, processes: int = 1, threads: int | None = None, **options: Any) -> Figures:
    """Run probe.py, under torchrun if in several processes, and read the line that it prints."""
    words = [str(Path(__file__).with_name("probe.py")), kind, json.dumps(options)]
    if processes > 1:
        torchrun = "-m torch.distributed.run --standalone --nproc-per-node"
        words = [*torchrun.split(), str(processes), *words]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads or torch.get_num_threads())}
    command = [sys.executable, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def usual(size: Figures) -> Figures:
    """The options of a training in a process of its own."""
    return {"batch_size": size["batch_size"], "steps": size["steps"], "images": size["images"][-1]}


def memory(source: str | None, size: Figures) -> Figures:
    """Seconds of the imports and of loading the cached data set; peak memory of some steps."""
    figures: Figures = {"peak_mb": {}}
    for _ in trange(size["rounds"], desc="start"):
        for name, value in probe("start", source=source).items():
            figures.setdefault(name, []).append(value)
    for norm in tqdm(MAIN, desc="memory"):
        found = {kind: probe(kind, norm=norm, **usual(size)) for kind in ("ours", "plain")}
        figures["peak_mb"][norm] = {kind: found[kind]["peak_mb"] for kind in found}
    return figures


def grow(size: Figures) -> Figures:
    """Our seconds and peak memory against the number of images, the batch size and the threads."""
    trials = [("images", n, {"images": n, "steps": n}) for n in size["images"]]  # all of them
    trials += [("batch_size", n, {"batch_size": n}) for n in size["batch_sizes"]]
    trials += [("threads", n, {"threads": n}) for n in size["threads"]]
    result: Figures = {"norm": "bn", "images": [], "batch_size": [], "threads": []}
    for axis, value, changed in tqdm(trials, desc="grow"):
        found = [
            probe("ours", norm="bn", **usual(size) | changed) for _ in range(size["few_rounds"])
        ]
        seconds = [each["seconds"] for each in found]
        result[axis].append(found[0] | {"value": value, "all_seconds": seconds})
    return result


def processes(size: Figures) -> Figures:
    """Milliseconds a step in one process and in two that share each batch, in turn."""
    result: Figures = {norm: {"ms": {kind: [] for kind in PROCESSES}} for norm in MAIN}
    for norm in tqdm(MAIN, desc="processes"):
        for _ in range(size["few_rounds"]):
            for kind, (count, threads) in PROCESSES.items():
                found = probe("ours", count, threads, norm=norm, **usual(size))
                ms = 1000 * found["seconds"] * size["batch_size"] / found["images"]
                result[norm]["ms"][kind].append(ms)
    return result
