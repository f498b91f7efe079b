"""How much of an epoch is not the network: python benchmarks/epoch.py --data PATH

For each norm, in turn and again: the floor (forward, backward and optimizer on a batch that stays in memory) and our
epoch (batches, augmentation, metrics, schedule) over as many steps. Medians of the rounds, written to epoch.json.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import trange

from normcourse import batches, default_settings, load_data
from normcourse.train import _device_name, _start, _train_epoch, pick_device


def floor(run, x, y, steps):
    """Seconds for ``steps`` updates on one resident batch."""
    started = time.perf_counter()
    for _ in range(steps):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=run["bf16"]):
            logits = run["model"](x)
        run["optimizer"].zero_grad()
        F.cross_entropy(logits.float(), y).backward()
        run["optimizer"].step()
    return time.perf_counter() - started


def epoch(run, settings, data, steps):
    """Seconds for ``steps`` updates of the loop that the course trains with."""
    count = steps * settings.batch_size
    started = time.perf_counter()
    _train_epoch(run, settings, data, data.train_images[:count], data.train_labels[:count], progress=True)
    return time.perf_counter() - started


def measure(norm, data, rounds, steps):
    """Milliseconds a step, medians over the rounds, and the ratio of each round's pair."""
    settings = default_settings(norm=norm)
    run = _start(settings, data, pick_device("cpu"))
    x, y = next(batches(data.train_images, data.train_labels, data, settings.batch_size))
    x = x.contiguous(memory_format=run["memory_format"])
    floor(run, x, y, 5)
    pairs = [
        (floor(run, x, y, steps), epoch(run, settings, data, steps)) for _ in trange(rounds, desc=norm, leave=False)
    ]
    ours, least = statistics.median(e for _, e in pairs), statistics.median(f for f, _ in pairs)
    figures = {"floor_ms": 1000 * least / steps, "epoch_ms": 1000 * ours / steps, "ratio": ours / least}
    return figures | {"ratios": [e / f for f, e in pairs]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="source of the images (default: $NORMCOURSE_DATA, else auto)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40)
    chosen = parser.parse_args()
    images = load_data(chosen.data)
    result = {n: measure(n, images, chosen.rounds, chosen.steps) for n in ("bn", "ln", "gn")}
    machine = {
        "device": _device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    machine |= {"python": platform.python_version(), "rounds": chosen.rounds, "steps": chosen.steps}
    Path(__file__).with_name("epoch.json").write_text(
        json.dumps({"machine": machine, "norms": result}, indent=1) + "\n"
    )
    print(machine)
    for norm, figures in result.items():
        print("{}: floor {floor_ms:.1f} ms, epoch {epoch_ms:.1f} ms a step, ratio {ratio:.3f}".format(norm, **figures))
