"""The parts that are measured by repetition: what is compared is called in turn, round after round.

The plain loop has a process of its own, as a learner's would be: ours has the process keep the memory that a step frees.
"""

import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import plain
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm, trange

from normcourse import batches, default_settings, evaluate, fit
from normcourse.data import Data
from normcourse.model import build
from normcourse.train import _start, _train_epoch

Figures = dict[str, Any]
Lanes = dict[Any, Callable[[], Any]]
WORKERS = (0, 2)


@contextmanager
def own_process(make: Callable[..., Lanes], *words: Any) -> Iterator[Lanes]:
    """The lanes that make(*words) returns, made in a fresh process: each is called there when it is called here."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, torch.get_num_threads(), make, *words))
    process.start()
    there.close()
    try:
        yield {name: partial(_ask, here, name) for name in here.recv()}
    finally:
        here.close()  # which ends it
        process.join()


def _serve(connection: Connection, threads: int, make: Callable[..., Lanes], *words: Any) -> None:
    torch.set_num_threads(threads)
    with suppress(EOFError, KeyboardInterrupt):  # Ctrl-C reaches both processes; the other one says so
        lanes = make(*words)
        connection.send(list(lanes))
        while True:
            lanes[connection.recv()]()
            connection.send(None)


def _ask(connection: Connection, name: Any) -> None:
    connection.send(name)
    connection.recv()


def alternate(lanes: Lanes, rounds: int, device: torch.device, title: str) -> dict[Any, list]:
    """Seconds of each function, called in turn round after round; each round begins one place later than the last."""
    for lane in lanes.values():  # warm up
        lane()
    seconds: dict[Any, list[float]] = {name: [] for name in lanes}
    names = list(lanes)
    for shift in trange(rounds, desc=title):
        for name in names[shift % len(names) :] + names[: shift % len(names)]:
            synchronise(device)
            started = time.perf_counter()
            lanes[name]()
            synchronise(device)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(above: list[float], below: list[float]) -> Figures:
    """Of the medians, and of each round's pair: what slows the machine for a while slows both of a pair."""
    pairs = [a / b for a, b in zip(above, below, strict=True)]
    quartiles = statistics.quantiles(pairs, n=4, method="inclusive")
    medians = statistics.median(above) / statistics.median(below)
    return {"paired": statistics.median(pairs), "of_medians": medians, "quartiles": [quartiles[0], quartiles[2]]}


def some_images(data: Data, count: int, device: torch.device) -> Data:
    """The data set with ``count`` training images, drawn at random; a smaller set gives each of them several times."""
    length = len(data.train_labels)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(0)).repeat(-(-count // length))[:count]
    return data._replace(train_images=data.train_images[order].to(device), train_labels=data.train_labels[order].to(device))


# --- step --------------------------------------------------------------------------------------------------------


def step(data: Data, norms: list[str], size: Figures, device: torch.device) -> Figures:
    """Milliseconds a step: the floor, our epoch, and the plain loop with and without workers."""
    data = some_images(data, size["steps"] * size["batch_size"], torch.device("cpu"))
    wait = {str(workers): first_batch(plain.train_loader(data, size["batch_size"], workers)) for workers in WORKERS}
    lanes, paths = {}, {}
    with own_process(plain_steps, data, norms, size, device) as theirs:
        for norm in norms:
            settings = default_settings(norm=norm, batch_size=size["batch_size"])
            run = _start(settings, data, device)
            paths[norm] = f"{'bf16' if run['bf16'] else 'fp32'}, {str(run['memory_format']).split('.')[1]}"
            lanes[norm, "floor"] = partial(floor, run, *resident(run, data, size, device), size["steps"])
            images, labels = data.train_images.to(device), data.train_labels.to(device)
            lanes[norm, "ours"] = partial(_train_epoch, run, settings, data, images, labels, False)
            lanes |= {name: lane for name, lane in theirs.items() if name[0] == norm}
        seconds = alternate(lanes, size["rounds"], device, "step")
    ms = {norm: {k: [1000 * s / size["steps"] for s in v] for (n, k), v in seconds.items() if n == norm} for norm in norms}
    return {"first_batch_s": wait, "path": paths, "norms": {norm: compare(ms[norm]) for norm in norms}}


def plain_steps(data: Data, norms: list[str], size: Figures, device: torch.device) -> Lanes:
    """The plain loop with and without workers; a block reads its loader to the end, so no worker runs on beside others."""
    loaders = {workers: plain.train_loader(data, size["batch_size"], workers) for workers in WORKERS}
    lanes = {}
    for norm in norms:
        model = plain.network(norm, data, device)
        for workers, loader in loaders.items():
            lanes[norm, f"plain_{workers}"] = partial(plain.train_epoch, model, plain.sgd(model), loader, device)
    return lanes


def compare(ms: dict[str, list[float]]) -> Figures:
    """Medians and ratios of a norm; ``plain`` is the number of workers with the lower median."""
    medians = {kind: statistics.median(values) for kind, values in ms.items()}
    best = min((kind for kind in ms if kind.startswith("plain")), key=medians.__getitem__)
    return {
        "ms": ms, "medians": medians, "plain": best, "ours_over_floor": ratio(ms["ours"], ms["floor"]),
        "plain_over_ours": ratio(ms[best], ms["ours"]), "plain_over_floor": ratio(ms[best], ms["floor"]),
    }  # fmt: skip


def first_batch(loader: Iterable[Any]) -> float:
    """Seconds until the first batch is there: what starting the workers costs, once."""
    started = time.perf_counter()
    seconds = 0.0
    for _ in loader:  # to the end, so that nothing is left running
        seconds = seconds or time.perf_counter() - started
    return seconds


def resident(run: Figures, data: Data, size: Figures, device: torch.device) -> Any:
    """A batch that stays in memory, in the memory format of the run."""
    x, y = next(batches(data.train_images.to(device), data.train_labels.to(device), data, size["batch_size"]))
    return x.contiguous(memory_format=run["memory_format"]), y


def floor(run: Figures, x: torch.Tensor, y: torch.Tensor, steps: int) -> None:
    """Forward, backward and optimizer, in our precision, and nothing else."""
    run["model"].train()
    for _ in range(steps):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=run["bf16"]):
            logits = run["model"](x)
        run["optimizer"].zero_grad()
        F.cross_entropy(logits.float(), y).backward()
        run["optimizer"].step()


# --- evaluate ----------------------------------------------------------------------------------------------------


def evaluation(data: Data, norms: list[str], size: Figures, device: torch.device) -> Figures:
    """Seconds to evaluate the test images: ours, and the plain loop without workers."""
    count = min(size["test_images"], len(data.test_labels))
    data = data._replace(test_images=data.test_images[:count], test_labels=data.test_labels[:count])
    few = data._replace(train_images=data.train_images[:0], train_labels=data.train_labels[:0])  # less to hand over
    images, labels, lanes = data.test_images.to(device), data.test_labels.to(device), {}
    with own_process(plain_evaluations, few, norms, size, device) as theirs:
        for norm in norms:
            run = _start(default_settings(norm=norm), data, device)
            lanes[norm, "ours"] = partial(evaluate, run["model"], images, labels, data)
            lanes[norm, "plain"] = theirs[norm, "plain"]
        seconds = alternate(lanes, size["test_rounds"], device, "evaluate")
    return {"images": count, "norms": {norm: pair(seconds, norm) for norm in norms}}


def plain_evaluations(data: Data, norms: list[str], size: Figures, device: torch.device) -> Lanes:
    loader = plain.test_loader(data, size["batch_size"])
    return {(norm, "plain"): partial(plain.evaluate, plain.network(norm, data, device), loader, device) for norm in norms}


def pair(seconds: dict[Any, list[float]], norm: str) -> Figures:
    ours, theirs = seconds[norm, "ours"], seconds[norm, "plain"]
    medians = {"ours": statistics.median(ours), "plain": statistics.median(theirs)}
    return {"seconds": {"ours": ours, "plain": theirs}, "medians": medians, "plain_over_ours": ratio(theirs, ours)}


# --- machine -----------------------------------------------------------------------------------------------------


def machine(data: Data, norms: list[str], size: Figures, device: torch.device) -> Figures:
    """GFLOP/s of a large matrix product, GB/s of a large copy, and what a training step asks of them."""
    n = size["matrix"]
    lanes: dict[Any, Callable[[], Any]] = {}
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b, product = (torch.randn(n, n, device=device).to(kind) for _ in range(3))
        lanes[name] = partial(torch.mm, a, b, out=product)
    source = torch.ones(16 * n * n, device=device)  # 268 MB for n = 2048: no cache holds it
    lanes["copy"] = partial(torch.empty_like(source).copy_, source)
    seconds = {k: statistics.median(v) for k, v in alternate(lanes, size["products"], device, "machine").items()}
    gflops = {kind: 2 * n**3 / seconds[kind] / 1e9 for kind in ("fp32", "bf16")}
    rate = 2 * source.numel() * source.element_size() / seconds["copy"] / 1e9  # read and written
    needs = {norm: needed(build("normnet", norm, len(data.classes)), size["batch_size"]) for norm in norms}
    for need in needs.values():
        need |= {f"least_ms_{kind}": 1000 * need["gflop"] / gflops[kind] for kind in gflops}
        need["copy_ms"] = 1000 * need["traffic_gb"] / rate
    return {"matrix": n, "gflops": gflops, "copy_gb_s": rate, "batch_size": size["batch_size"], "norms": needs}


def needed(model: nn.Module, batch_size: int) -> Figures:
    """What the convolutions of a training step have to do: 10^9 operations, and GB read and written in bf16.

    A convolution computes three things of equal cost: its output, and the gradients of its input and its weights. Each
    reads and writes tensors of the sizes of input and output. The first one's input, the image, needs no gradient.
    """
    flop: list[int] = []
    values: list[int] = []

    def count(layer: Any, x: Any, y: torch.Tensor) -> None:
        times = 3 if flop else 2
        flop.append(times * 2 * y.numel() * layer.weight[0].numel())
        values.append(times * (x[0].numel() + y.numel()))

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        model(torch.zeros(2, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return {"gflop": sum(flop) / 1e9 * batch_size / 2, "traffic_gb": 2 * sum(values) / 1e9 * batch_size / 2}


# --- memory and growth: each in a process of its own -------------------------------------------------------------


def probe(kind: str, threads: int, **options: Any) -> Figures:
    """Run probe.py and read the line that it prints."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
    command = [sys.executable, str(Path(__file__).with_name("probe.py")), kind, f"--threads={threads}", *words]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{found.stderr}")
    return json.loads(found.stdout.splitlines()[-1])


def memory(source: str | None, norms: list[str], size: Figures, threads: int) -> Figures:
    """Peak memory of a short training, ours and plain; seconds of the imports and of loading the cached data set."""
    starts = [probe("start", threads, data=source) for _ in trange(size["processes"], desc="start")]
    keys = ("import_torch_s", "import_normcourse_s", "load_s", "import_torch_mb")
    figures: Figures = {key: [found[key] for found in starts] for key in keys} | {"peak_mb": {}}
    common = {"data": source, "steps": size["probe_steps"], "batch_size": size["batch_size"]}
    for norm in tqdm(norms, desc="memory"):
        peaks = {kind: probe(kind, threads, norm=norm, **common)["peak_mb"] for kind in ("ours", "plain")}
        figures["peak_mb"][norm] = peaks
    return figures


def grow(norm: str, size: Figures, threads: int) -> Figures:
    """Our seconds and peak memory against the number of images, the batch size and the threads (random images)."""
    common = {"images": size["grow_images"][0], "batch_size": size["batch_size"], "steps": size["probe_steps"]}
    trials = {
        "images": [(n, common | {"images": n, "steps": 0}) for n in size["grow_images"]],
        "batch_size": [(n, common | {"batch_size": n}) for n in size["batch_sizes"]],
        "threads": [(n, common | {"steps": 2 * size["probe_steps"]}) for n in size["threads"]],
    }
    work = [(axis, n, options) for axis, each in trials.items() for n, options in each]
    found: dict[tuple[str, int], list[Figures]] = {(axis, n): [] for axis, n, _ in work}
    for axis, n, options in tqdm(work * size["grow_rounds"], desc="grow"):
        used = n if axis == "threads" else threads
        found[axis, n].append(probe("ours", used, norm=norm, **options))
    return {"norm": norm} | {axis: [point(n, found[axis, n]) for n, _ in each] for axis, each in trials.items()}


def point(value: int, found: list[Figures]) -> Figures:
    seconds = statistics.median(each["seconds"] for each in found)
    peaks = [each["peak_mb"] for each in found if each["peak_mb"]]
    return {
        "value": value, "images": found[0]["images"], "seconds": seconds, "all_seconds": [each["seconds"] for each in found],
        "peak_mb": statistics.median(peaks) if peaks else None,
    }  # fmt: skip


# --- the whole training, for a GPU -------------------------------------------------------------------------------


def whole(data: Data, norms: list[str], size: Figures, device: torch.device) -> Figures:
    """Seconds of ``fit`` from start to record, of all epochs' training, and of the first epoch with its warm-up."""
    figures = {}
    for norm in tqdm(norms, desc="whole"):
        started = time.perf_counter()
        record = fit(default_settings(norm=norm, epochs=size["epochs"]), data, device=device.type, progress=False)
        total, seconds = time.perf_counter() - started, [epoch["seconds"] for epoch in record["history"]]
        figures[norm] = {
            "total_s": total, "training_s": sum(seconds), "first_epoch_s": seconds[0],
            "later_epoch_s": statistics.median(seconds[1:] or seconds),
            "test_accuracy": record["history"][-1]["test_accuracy"],
        }  # fmt: skip
    return {"epochs": size["epochs"], "norms": figures}
