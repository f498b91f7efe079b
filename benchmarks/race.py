"""Time to accuracy: our default against the plain loop with the best public recipe, epoch by epoch in turn."""

import time
from pathlib import Path
from typing import Any

import plain
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from normcourse import default_settings, evaluate
from normcourse.data import Data, write_file
from normcourse.train import _start, _train_epoch

LEVELS = (70, 80)  # test accuracy in percent
Figures = dict[str, Any]


def race(data: Data, norm: str, size: Figures, device: torch.device, checkpoint: Path) -> Figures:
    """Train both, an epoch each in turn, until each is at the highest level or has had its epochs.

    Test accuracy is measured after each epoch, by the same code for both, and its time does not count. Goes on from
    the checkpoint, which is written after each epoch.
    """
    settings = default_settings(norm=norm, epochs=size["epochs"], batch_size=size["batch_size"])
    place = (data.train_images.to(device), data.train_labels.to(device))
    runs = {"ours": _start(settings, data, device), "plain": start_plain(data, norm, size, device)}
    if checkpoint.exists():
        load(runs, checkpoint)
    else:
        runs["plain"]["workers"] = better_workers(data, norm, size, device)
    loader = plain.train_loader(data, size["batch_size"], runs["plain"]["workers"], plain.RANDOM_AUGMENT)
    epochs = {
        "ours": lambda: _train_epoch(runs["ours"], settings, data, *place, False)["train_accuracy"],
        "plain": lambda: plain_epoch(runs["plain"], loader, device),
    }
    bar = tqdm(desc=f"accuracy {norm}", unit="epoch", initial=sum(len(run["history"]) for run in runs.values()))
    while waiting := [name for name, run in runs.items() if not done(run["history"], size["epochs"])]:
        name = min(waiting, key=lambda name: len(runs[name]["history"]))
        started = time.perf_counter()
        train_accuracy = epochs[name]()
        seconds = time.perf_counter() - started
        test_accuracy = measure(runs[name]["model"], data, device)
        figures = {"seconds": seconds, "train_accuracy": train_accuracy, "test_accuracy": test_accuracy}
        runs[name]["history"].append(figures)
        save(runs, checkpoint)
        bar.update()
        bar.set_postfix({name: f"{test_accuracy:.2f} %"})
    bar.close()
    return {"norm": norm, "epochs": size["epochs"], "workers": runs["plain"]["workers"]} | {
        name: {"history": run["history"], "seconds_to": {str(level): reach(run["history"], level) for level in LEVELS}}
        for name, run in runs.items()
    }


def done(history: list[Figures], epochs: int) -> bool:
    return len(history) == epochs or any(epoch["test_accuracy"] >= max(LEVELS) for epoch in history)


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


# --- the plain loop ----------------------------------------------------------------------------------------------


def start_plain(data: Data, norm: str, size: Figures, device: torch.device) -> Figures:
    model = plain.network(norm, data, device)
    optimizer, steps = plain.sgd(model), -(-len(data.train_labels) // size["batch_size"])
    scheduler = plain.one_cycle(optimizer, size["epochs"], steps)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "history": []}


def plain_epoch(run: Figures, loader: DataLoader, device: torch.device) -> float:
    return plain.train_epoch(run["model"], run["optimizer"], loader, device, run["scheduler"])[1]


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


def save(runs: dict[str, Figures], checkpoint: Path) -> None:
    state: Figures = {"random": torch.get_rng_state(), "generator": runs["ours"]["generator"].get_state()}
    schedule = runs["plain"]["scheduler"].state_dict()
    schedule = {key: value for key, value in schedule.items() if not callable(value)}  # PyTorch 2.3 adds its function
    state |= {"workers": runs["plain"]["workers"], "scheduler": schedule}
    for name, run in runs.items():
        state[name] = [run["model"].state_dict(), run["optimizer"].state_dict(), run["history"]]
    write_file(checkpoint, lambda file: torch.save(state, file))


def load(runs: dict[str, Figures], checkpoint: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    torch.set_rng_state(state["random"])
    runs["ours"]["generator"].set_state(state["generator"])
    runs["plain"]["workers"] = state["workers"]
    runs["plain"]["scheduler"].load_state_dict(state["scheduler"])
    for name, run in runs.items():
        run["model"].load_state_dict(state[name][0])
        run["optimizer"].load_state_dict(state[name][1])
        run["history"] = state[name][2]
