"""One measurement in a process of its own, printed as a line of JSON; run.py starts it.

start: seconds of `import torch`, of what `import normcourse` adds, and of loading the data set.
ours, plain: a short training, its seconds a step and the peak memory of the process.
"""

import argparse
import json
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any


def peak_memory() -> float | None:
    """The most memory (MB, 10^6 bytes) that this process has had at once; None where the system does not say."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count the process that started this one, too
        found = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(found.split()[1]) * 1024 / 1e6  # it is in units of 1,024 bytes
    try:
        import resource
    except ImportError:  # Windows
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 1e6 if sys.platform == "darwin" else used * 1024 / 1e6


def start(options: argparse.Namespace) -> dict[str, Any]:
    moments = [time.perf_counter()]
    import torch  # noqa: F401

    moments.append(time.perf_counter())
    memory = peak_memory()
    from normcourse import load_data

    moments.append(time.perf_counter())
    load_data(options.data)
    moments.append(time.perf_counter())
    torch_s, normcourse_s, load_s = (b - a for a, b in zip(moments, moments[1:], strict=False))
    return {"import_torch_s": torch_s, "import_normcourse_s": normcourse_s, "load_s": load_s, "import_torch_mb": memory}


def some_data(options: argparse.Namespace) -> Any:
    """The data set, or as many random images as asked for: the time of a step does not depend on what they show."""
    import torch

    from normcourse import Data, load_data

    if not options.images:
        return load_data(options.data)
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (options.images, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(options.images) % 10
    few = pixels[:16].clone(), labels[:16]  # for evaluation: too few to decide the peak memory
    return Data("random", "", tuple("0123456789"), (0.5,) * 3, (0.29,) * 3, pixels, labels, *few)


def shorter(data: Any, count: int) -> Any:
    """The same data set with ``count`` training images and at most 1,000 test images."""
    return data._replace(
        train_images=data.train_images[:count], train_labels=data.train_labels[:count],
        test_images=data.test_images[:1000], test_labels=data.test_labels[:1000],
    )  # fmt: skip


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """``fit`` as the course calls it, checkpoint and evaluation included; the seconds are those of the training."""
    from normcourse import default_settings, fit

    data = some_data(options)
    settings = default_settings(norm=options.norm, batch_size=options.batch_size, epochs=1)
    fit(settings, shorter(data, 2 * options.batch_size), device="cpu", progress=False)  # warm up
    count = options.steps * options.batch_size if options.steps else len(data.train_labels)
    part = shorter(data, count)
    with tempfile.TemporaryDirectory() as folder:
        record = fit(settings, part, folder, "cpu", progress=False)
    return {"seconds": record["seconds"], "images": len(part.train_labels)}


def plain_loop(options: argparse.Namespace) -> dict[str, Any]:
    """The plain loop without workers, and its evaluation."""
    import plain
    import torch

    device, data = torch.device("cpu"), some_data(options)
    train, test = plain.train_loader(data, options.batch_size), plain.test_loader(data, options.batch_size)
    model = plain.network(options.norm, data, device)
    del data  # like torchvision's data set, the loaders have the images in memory once
    optimizer, started = plain.sgd(model), time.perf_counter()
    plain.train_epoch(model, optimizer, islice(train, options.steps or None), device)
    seconds = time.perf_counter() - started
    plain.evaluate(model, islice(test, 8), device)
    return {"seconds": seconds, "images": options.steps * options.batch_size or len(train.dataset)}


KINDS = {"start": start, "ours": ours, "plain": plain_loop}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("--data")
    parser.add_argument("--norm", default="bn")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=0, help="0: all images")
    parser.add_argument("--images", type=int, default=0, help="so many random ones; 0: the data set")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.kind != "start":
        import torch

        torch.set_num_threads(options.threads or torch.get_num_threads())
    figures = KINDS[options.kind](options)
    print(json.dumps(figures | {"peak_mb": peak_memory()}))


if __name__ == "__main__":
    main()
