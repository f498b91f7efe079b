"""Time to accuracy: our recipe against the plain loop with the best public one, each with a long and a short cycle."""

import time
from pathlib import Path
from typing import Any

import plain
import torch
from tqdm import tqdm

from normcourse import default_settings, evaluate
from normcourse.data import Data, write_file
from normcourse.train import _start, _train_epoch

LEVELS = (70, 80)  # test accuracy in percent
Figures = dict[str, Any]


def race(data: Data, norm: str, size: Figures, device: torch.device, checkpoint: Path) -> Figures:
    """Train each contestant once for each length of its cycle, all in turn, an epoch each.

    A lane ends at the highest level, or with its cycle. Test accuracy is measured after each epoch, by the same code for
    all, and its time does not count. Goes on from the checkpoint, which is written after each epoch.
    """
    lanes = [start(name, epochs, data, norm, size, device) for name, cycles in size["cycles"].items() for epochs in cycles]
    workers = load(lanes, checkpoint) if checkpoint.exists() else better_workers(data, norm, size, device)
    loader = plain.train_loader(data, size["batch_size"], workers, plain.RANDOM_AUGMENT)
    place = (data.train_images.to(device), data.train_labels.to(device))
    bar = tqdm(desc=f"accuracy {norm}", unit="epoch", initial=sum(len(lane["history"]) for lane in lanes))
    while waiting := [lane for lane in lanes if not done(lane)]:
        lane = min(waiting, key=lambda lane: len(lane["history"]))
        started = time.perf_counter()
        if lane["name"] == "ours":
            train_accuracy = _train_epoch(lane, lane["settings"], data, *place, False)["train_accuracy"]
        else:
            train_accuracy = plain.train_epoch(lane["model"], lane["optimizer"], loader, device, lane["scheduler"])[1]
        seconds = time.perf_counter() - started
        test_accuracy = measure(lane["model"], data, device)
        lane["history"].append({"seconds": seconds, "train_accuracy": train_accuracy, "test_accuracy": test_accuracy})
        save(lanes, workers, checkpoint)
        bar.update()
        bar.set_postfix({f"{lane['name']} of {lane['epochs']}": f"{test_accuracy:.2f} %"})
    bar.close()
    seconds_to = [{str(level): reach(lane["history"], level) for level in LEVELS} for lane in lanes]
    told = [{key: lane[key] for key in ("name", "epochs", "history")} for lane in lanes]
    return {"norm": norm, "workers": workers, "lanes": [a | {"seconds_to": b} for a, b in zip(told, seconds_to, strict=True)]}


def start(name: str, epochs: int, data: Data, norm: str, size: Figures, device: torch.device) -> Figures:
    """A lane: a contestant before the first epoch of its cycle."""
    if name == "ours":
        settings = default_settings(norm=norm, epochs=epochs, batch_size=size["batch_size"])
        return {"name": name, "epochs": epochs, "settings": settings, **_start(settings, data, device)}
    model = plain.network(norm, data, device)
    optimizer, steps = plain.sgd(model), -(-len(data.train_labels) // size["batch_size"])
    scheduler = plain.one_cycle(optimizer, epochs, steps)
    return {"name": name, "epochs": epochs, "model": model, "optimizer": optimizer, "scheduler": scheduler, "history": []}


def done(lane: Figures) -> bool:
    return len(lane["history"]) == lane["epochs"] or any(e["test_accuracy"] >= max(LEVELS) for e in lane["history"])


def reach(history: list[Figures], level: float) -> float | None:
    """Seconds of training until the end of the first epoch at or above the level; None if it never was."""
    seconds = 0.0
    for epoch in history:
        seconds += epoch["seconds"]
        if epoch["test_accuracy"] >= level:
            return seconds
    return None


def measure(model: torch.nn.Module, data: Data, device: torch.device) -> float:
    """Test accuracy in percent."""
    _, predicted = evaluate(model, data.test_images.to(device), data.test_labels.to(device), data)
    return 100 * (predicted.cpu() == data.test_labels).float().mean().item()


def better_workers(data: Data, norm: str, size: Figures, device: torch.device) -> int:
    """0 or 2 workers, whichever is faster with this augmentation here; three short blocks each, the best counts."""
    from measure import WORKERS, some_images

    part = some_images(data, size["steps"] * size["batch_size"], torch.device("cpu"))
    loaders = {n: plain.train_loader(part, size["batch_size"], n, plain.RANDOM_AUGMENT) for n in WORKERS}
    model = plain.network(norm, data, device)
    best = dict.fromkeys(WORKERS, float("inf"))
    for _ in range(3):
        for workers, loader in loaders.items():
            started = time.perf_counter()
            plain.train_epoch(model, plain.sgd(model), loader, device)
            best[workers] = min(best[workers], time.perf_counter() - started)
    return min(best, key=best.__getitem__)


# --- checkpoints -------------------------------------------------------------------------------------------------


def save(lanes: list[Figures], workers: int, checkpoint: Path) -> None:
    kept = []
    for lane in lanes:
        state = {"model": lane["model"].state_dict(), "optimizer": lane["optimizer"].state_dict(), "history": lane["history"]}
        if lane["name"] == "ours":
            state["generator"] = lane["generator"].get_state()
        else:  # PyTorch 2.3 adds its function
            state["scheduler"] = {k: v for k, v in lane["scheduler"].state_dict().items() if not callable(v)}
        kept.append(state)
    everything = {"random": torch.get_rng_state(), "workers": workers, "lanes": kept}
    write_file(checkpoint, lambda file: torch.save(everything, file))


def load(lanes: list[Figures], checkpoint: Path) -> int:
    """Put all lanes where they were; returns the number of workers."""
    everything = torch.load(checkpoint, weights_only=True)
    torch.set_rng_state(everything["random"])
    for lane, state in zip(lanes, everything["lanes"], strict=True):
        lane["history"] = state["history"]
        for key in ("model", "optimizer", "scheduler"):
            if key in state:
                lane[key].load_state_dict(state[key])
        if "generator" in state:
            lane["generator"].set_state(state["generator"])
    workers: int = everything["workers"]
    return workers
