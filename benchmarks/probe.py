"""One measurement in a process of its own, printed as a line of JSON: python probe.py KIND OPTIONS

measure.py starts it. OPTIONS are the arguments of the KIND, as JSON. torch is imported inside of
the functions, as `start` measures how long that takes.
"""

import json
import os
import re
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any


def peak_memory() -> float:
    """The most memory (MB, 10^6 bytes) that this process has had at once, on Linux or macOS."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count the process that started this one, too
        in_kib = re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0]
        return int(in_kib) * 1024 / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def start(source: str | None) -> dict[str, Any]:
    """Seconds of `import torch`, of what `import normcourse` adds, and of loading the data set."""
    moments = [time.perf_counter()]
    import torch  # noqa: F401

    moments.append(time.perf_counter())
    torch_mb = peak_memory()
    from normcourse import load_data

    moments.append(time.perf_counter())
    load_data(source)
    moments.append(time.perf_counter())
    names = ("import_torch_s", "import_normcourse_s", "load_s")
    seconds = [after - before for before, after in zip(moments, moments[1:], strict=False)]
    return dict(zip(names, seconds, strict=True)) | {"import_torch_mb": torch_mb}


def random_data(count: int) -> Any:
    """So many random images: the time of a step does not depend on what they show."""
    import torch

    from normcourse import Data

    torch.manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(count) % 10
    parts = images, labels, images[:16].clone(), labels[:16]  # the last two for evaluation
    return Data("random", "", tuple("0123456789"), (0.5,) * 3, (0.29,) * 3, *parts)


def cut(data: Any, train: int, test: int | None = None) -> Any:
    """The first images of a data set."""
    images, labels = data.train_images[:train], data.train_labels[:train]
    data = data._replace(train_images=images, train_labels=labels)
    images, labels = data.test_images[:test], data.test_labels[:test]
    return data._replace(test_images=images, test_labels=labels)


def ours(norm: str, batch_size: int, images: int, steps: int) -> dict[str, Any]:
    """``fit`` as the course calls it; the seconds are those of training.

    Under torchrun, its processes share each batch.
    """
    import torch

    from normcourse import default_settings, fit
    from normcourse.engine import parallel

    parallel.start(torch.device("cpu"))
    settings = default_settings(norm=norm, batch_size=batch_size, epochs=1)
    data = random_data(images)
    fit(settings, cut(data, 2 * batch_size), device="cpu", progress=False)  # warm up
    part = cut(data, steps * batch_size)
    with tempfile.TemporaryDirectory() as folder:
        seconds = fit(settings, part, folder, "cpu", progress=False)["seconds"]
    parallel.end()
    return {"seconds": seconds, "images": len(part.train_labels), "peak_mb": peak_memory()}


def plain(norm: str, batch_size: int, images: int, steps: int) -> dict[str, Any]:
    """As many steps of the plain loop without workers, and its evaluation."""
    import plain

    data = random_data(images)
    loader, test_loader = plain.train_loader(data, batch_size), plain.test_loader(data, batch_size)
    model = plain.network(norm, data)
    del data  # like torchvision's data set, the loaders have the images in memory once
    plain.train_epoch(model, plain.sgd(model), islice(loader, steps))
    plain.evaluate(model, test_loader)
    return {"peak_mb": peak_memory()}


KINDS: dict[str, Any] = {"start": start, "ours": ours, "plain": plain}

if __name__ == "__main__":
    figures = KINDS[sys.argv[1]](**json.loads(sys.argv[2]))
    if os.environ.get("RANK", "0") == "0":  # torchrun numbers its processes from 0
        print(json.dumps(figures))
