"""Training and evaluation: one loop for every network, resumable after each epoch, and the record it leaves."""

import ctypes
import hashlib
import json
import math
import platform
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from normcourse import __version__, parallel
from normcourse.data import CourseError, Data, batches, split_validation, write_file
from normcourse.model import build, count_parameters

MAX_EPOCHS = 20  # the assignment's limit
EXACT = {"enabled": True, "benchmark": False, "deterministic": True, "allow_tf32": False}  # of cuDNN, on a GPU
Record = dict[str, Any]
RECORD_KEYS: dict[str, Any] = {
    "command": str, "settings": dict, "parameters": int, "data": str, "copy": str, "classes": list, "images": list,
    "history": list, "confusion": list, "flip_accuracy": float, "mistakes": list, "seconds": (int, float),
    "device": str, "threads": int, "precision": str, "versions": dict, "system": str,
}  # fmt: skip


class DivergedError(CourseError):
    """The loss of a training is infinite or not a number."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a run. Two runs with equal settings, data and machine are equal."""

    net: str = "normnet"  # or "reference"
    norm: str = "bn"
    multiplier: int | None = None  # channels of the reference designs; None: as published
    num_groups: int = 8  # of NormNet's Group Norm
    dropout: float = 0.0
    epochs: int = MAX_EPOCHS
    batch_size: int = 128
    optimizer: str = "muon"  # or "adamw", "sgd"
    schedule: str = "onecycle"  # or "step": a tenth after every 8 epochs
    lr: float = 0.01  # the peak of the schedule
    momentum: float = 0.9  # of Muon and SGD; AdamW's beta1
    weight_decay: float = 0.05
    l1: float = 0.0  # times the sum of |w|, added to the loss
    shift: int = 3  # augmentation: pixels moved at most
    flip: bool = True  # augmentation: mirrored left-right half of the time
    seed: int = 0
    validate: bool = False  # hold a tenth of the training images out and evaluate on it, never on the test set
    processes: int = 1  # that share each batch; filled in by fit
    sync_bn: bool = False  # Batch Norm's statistics over all of them


# Chosen on the validation split by experiments/lr_search.py; a test compares them with its record.
LEARNING_RATES = {"bn": 0.03, "ln": 0.03, "gn": 0.03, "in": 0.06, "none": 0.03}

# As published (spec: SGD, L1 on all weights, a tenth of the lr every 8 epochs, no augmentation).
_REFERENCE = dict(batch_size=64, optimizer="sgd", schedule="step", momentum=0.9, l1=5e-4, shift=0, flip=False)
_REFERENCE_RATES = {"bn": dict(lr=0.1, weight_decay=1e-3)}


def default_settings(net: str = "normnet", norm: str = "bn", more_epochs: bool = False, **changed: Any) -> Settings:
    """The recipe of a network and norm, with what is given (and not None) changed; checks every value.

    Raises CourseError for a value that is not allowed. More than 20 epochs, the assignment's limit, need more_epochs.
    """
    if unknown := set(changed) - (known := set(asdict(Settings()))):
        raise CourseError(f"unknown settings {', '.join(sorted(unknown))}; allowed: {', '.join(sorted(known))}")
    recipe: dict[str, Any] = {"lr": LEARNING_RATES.get(str(norm), 0.01)}
    if net == "reference":
        recipe = _REFERENCE | _REFERENCE_RATES.get(str(norm), dict(lr=0.01, weight_decay=1e-5))
    settings = Settings(**{"net": net, "norm": norm} | recipe | {k: v for k, v in changed.items() if v is not None})
    _check_types(settings)
    for name, allowed, least, beyond in (
        ("epochs", f"1 to {MAX_EPOCHS} (more with --more-epochs)", 1, math.inf if more_epochs else MAX_EPOCHS + 1),
        ("batch_size", "1 or more", 1, math.inf), ("lr", "above 0, below 1e9", 5e-324, 1e9),
        ("momentum", "0 up to 1, without 1", 0, 1),
        ("weight_decay", "0 or more, below 1e9", 0, 1e9), ("l1", "0 or more, below 1e9", 0, 1e9),
        ("dropout", "0 up to 1, without 1", 0, 1), ("seed", "0 to 2**63 - 1", 0, 2**63),
        ("shift", "0 to 16", 0, 17),
    ):  # fmt: skip
        value = getattr(settings, name)
        if not least <= value < beyond:  # false for nan, too
            raise CourseError(f"{name} is {value}; allowed: {allowed}")
    with torch.device("meta"):  # without memory, and no random number is drawn
        build(net, norm, num_groups=settings.num_groups, multiplier=settings.multiplier)  # says what it cannot build
        build("normnet", "gn", num_groups=settings.num_groups)  # checked for every norm, so that it is never ignored
    if net == "normnet" and settings.multiplier is not None:
        raise CourseError(f"multiplier is {settings.multiplier}, but only the reference designs have one (--net reference)")
    for name, options in (("optimizer", ("muon", "adamw", "sgd")), ("schedule", ("onecycle", "step"))):
        if getattr(settings, name) not in options:
            raise CourseError(f"{name} is {getattr(settings, name)!r}; allowed: {', '.join(options)}")
    if net == "reference":  # one name for one network
        settings = replace(settings, num_groups=8, multiplier=None if norm == "bn" else settings.multiplier or 2)
    return settings if norm == "bn" else replace(settings, sync_bn=False)


def _check_types(settings: Settings) -> None:
    for field in fields(settings):
        kind: Any = field.type
        value = getattr(settings, field.name)
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (kind is bool):
            raise CourseError(f"{field.name} is {value!r}; allowed: {getattr(kind, '__name__', kind)}")


def pick_device(name: str = "auto") -> torch.device:
    """CUDA if it is there, else the CPU; MPS only when asked for (its norm gradients have been wrong)."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device("cuda" if there["cuda"] else "cpu")
    if not there.get(name, False):
        usable = ", ".join(["auto"] + [device for device, usable in there.items() if usable])
        raise CourseError(f"device {name!r} is unknown or not on this machine; allowed here: {usable}")
    return torch.device(name)


def run_name(settings: Settings, data: Data) -> str:
    """The name of a run's files: readable, and different whenever a setting or the data differ."""
    named = data.name if data.name == "CIFAR-10" else [data.name, data.classes]
    alone = {"processes": 1, "sync_bn": False}  # left out, so that the names of earlier runs stay
    chosen = {k: v for k, v in asdict(settings).items() if k not in alone or v != alone[k]}
    text = json.dumps([chosen, named, data.copy], sort_keys=True)
    size = f"-m{settings.multiplier}" if settings.multiplier else ""
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{settings.net}-{settings.norm}{size}-seed{settings.seed}-{digest}"


def fit(settings: Settings, data: Data, folder: str | Path | None = None, device: str = "auto", progress: bool = True) -> Record:
    """Train the network that ``settings`` name, evaluate it after each epoch, and return the record.

    With a folder, the record (.json) and the weights (.pt) are kept there, and a checkpoint (.ckpt) after each epoch:
    a run that was stopped goes on from it and ends with the numbers it would have had; a finished one is only read.
    The processes of a torch.distributed group, if there is one, share the work. Raises CourseError for settings or a
    device that cannot be used.
    """
    rank, processes = parallel.place()
    settings = replace(settings, processes=processes)
    path = Path(folder) / run_name(settings, data) if folder is not None else None
    if path and parallel.from_first(path.with_suffix(".json").exists):
        return parallel.from_first(lambda: read_record(path.with_suffix(".json")))
    place = pick_device(device)
    parallel.check_sync_bn(settings.sync_bn, place)
    run = _start(settings, data, place)
    if settings.validate:
        data = split_validation(data)
    if path:
        _resume(run, path)
    train, test = ((i.to(place), t.to(place)) for i, t in (data[5:7], data[7:9]))
    while len(run["history"]) < settings.epochs:
        started = time.perf_counter()
        figures = _train_epoch(run, settings, data, *train, progress and rank == 0)
        seconds = time.perf_counter() - started
        name = "val" if settings.validate else "test"
        loss, predicted = evaluate(run["model"], *test, data)
        if not math.isfinite(loss + figures["train_loss"]):
            wrong = "lr, weight_decay or l1 is too large; try a tenth"
            raise DivergedError(f"the loss is no longer finite in epoch {len(run['history']) + 1}: {wrong}")
        figures |= {f"{name}_loss": loss, f"{name}_accuracy": _percent(predicted, test[1]), "seconds": seconds}
        run["history"].append(figures)
        if path:
            parallel.from_first(lambda: write_file(path.with_suffix(".ckpt"), lambda file: torch.save(_state(run), file)))
    return parallel.from_first(lambda: _finish(run, settings, data, place, path))


def _finish(run: dict[str, Any], settings: Settings, data: Data, device: torch.device, path: Path | None) -> Record:
    """Make the record; write it and the weights, then let the checkpoint go."""
    record = make_record(run, settings, data, device)
    if path:
        state = {k: v.detach().cpu().contiguous() for k, v in run["model"].state_dict().items()}
        write_file(path.with_suffix(".pt"), lambda file: torch.save(state, file))
        write_record(path.with_suffix(".json"), record)
        path.with_suffix(".ckpt").unlink(missing_ok=True)
    return record


# --- one epoch ---------------------------------------------------------------------------------------------------


def _train_epoch(
    run: dict[str, Any], settings: Settings, data: Data, images: Tensor, labels: Tensor, progress: bool
) -> dict[str, float]:
    """One pass over the training images in random order; returns the mean loss and accuracy as they were on the way."""
    model, optimizer, epoch, device = run["model"].train(), run["optimizer"], len(run["history"]), images.device
    steps = math.ceil(len(images) / settings.batch_size)
    total_loss, correct = torch.zeros((), device=device), torch.zeros((), dtype=torch.long, device=device)
    place = parallel.place()
    if settings.processes > 1:  # dropout differs between processes, and after a restart is what it would have been
        torch.manual_seed(settings.seed + epoch * settings.processes + place[0])
    stream = batches(images, labels, data, settings.batch_size, run["generator"], settings.shift, settings.flip, *place)
    title = f"{settings.net} {settings.norm} epoch {epoch + 1}/{settings.epochs}"
    bar = tqdm(total=len(images), desc=title, unit="image", leave=False, disable=None if progress else True)
    with bar, torch.backends.cudnn.flags(**EXACT):
        for step, (x, y) in enumerate(stream):
            set_lr(optimizer, lr := learning_rate(settings, epoch + step / steps))
            with torch.autocast(device.type, torch.bfloat16) if run["bf16"] else nullcontext():  # old MPS has no autocast
                logits = run["forward"](x.contiguous(memory_format=run["memory_format"]))
            seen = min(settings.batch_size, len(images) - step * settings.batch_size)  # by all processes
            # Averaged over the processes, these are the gradients of the whole batch's mean loss, however it is split.
            loss = F.cross_entropy(logits.float(), y, reduction="sum") * settings.processes / seen
            weights = torch.cat([p.flatten() for p in model.parameters()]) if settings.l1 else torch.zeros(1)
            optimizer.zero_grad()
            (loss + settings.l1 * weights.abs().sum()).backward()
            optimizer.step()
            total_loss += loss.detach() * seen / settings.processes
            correct += (logits.detach().argmax(1) == y).sum()
            bar.update(seen)
            if step % 25 == 24 and not bar.disable:  # reading a figure waits for a GPU: seldom
                loss_so_far, percent = total_loss.item() / bar.n, 100 * correct.item() / bar.n
                bar.set_postfix(loss=f"{loss_so_far:.3f}", accuracy=f"{percent:.1f}%", lr=f"{lr:.2g}")
    parallel.total(total_loss, correct)
    mean_loss, accuracy = total_loss.item() / len(images), 100 * correct.item() / len(images)
    return {"train_loss": mean_loss, "train_accuracy": accuracy, "lr": lr}


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, data: Data, batch_size: int = 100) -> Tensor:
    """Logits (N, num_classes) in eval mode and fp32, the images (N, 3, 32, 32) uint8 as they are."""
    was_training, labels = model.training, torch.zeros(len(images))
    model.eval()
    with torch.backends.cudnn.flags(**EXACT):
        logits = [model(x) for x, _ in batches(images, labels, data, batch_size)]
    model.train(was_training)
    return torch.cat(logits)


def evaluate(model: nn.Module, images: Tensor, labels: Tensor, data: Data) -> tuple[float, Tensor]:
    """Mean cross-entropy, and the predicted classes (N,), in eval mode. All processes must call it; the first evaluates."""
    logits = parallel.from_first(lambda: predict(model, images, data).cpu()).to(labels.device)
    return F.cross_entropy(logits, labels).item(), logits.argmax(1)


def _percent(predicted: Tensor, labels: Tensor) -> float:
    """Correct over seen (the mean of batch accuracies would weigh a short last batch too much)."""
    return 100 * (predicted == labels).sum().item() / len(labels)


def learning_rate(settings: Settings, epoch: float) -> float:
    """The rate at a moment of the training: one cycle (a fifth up, then down to 0) or a tenth after every 8 epochs."""
    if settings.schedule == "step":
        return settings.lr * 0.1 ** (int(epoch) // 8)
    part = epoch / settings.epochs
    return settings.lr * (0.05 + 0.95 * part / 0.2 if part < 0.2 else (1 - part) / 0.8)


def set_lr(optimizer: Any, lr: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


# --- start, checkpoint, resume -----------------------------------------------------------------------------------


def _start(settings: Settings, data: Data, device: torch.device) -> dict[str, Any]:
    """A fresh run: the model drawn from the seed, its optimizer, the random numbers, the fast path of this machine."""
    keep_freed_memory()
    torch.manual_seed(settings.seed)
    chosen = (settings.num_groups, settings.multiplier, settings.dropout)
    model = build(settings.net, settings.norm, len(data.classes), *chosen)
    memory_format = torch.channels_last  # convolutions and pooling are faster in it, on a CPU and a GPU
    if settings.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(device).to(memory_format=memory_format)  # type: ignore[call-overload]  # old stubs lack it
    small = (settings.net, settings.norm) == ("reference", "bn")  # for its 5,882 parameters bf16 does not pay on a CPU
    bf16 = parallel.from_first(lambda: has_fast_bf16(device)) and not (small and device.type == "cpu")
    return {
        "model": model, "forward": parallel.wrap(model), "optimizer": make_optimizer(model, settings), "history": [],
        "memory_format": memory_format, "bf16": bf16, "generator": torch.Generator().manual_seed(settings.seed),
        "origin": _origin(device, bf16, memory_format), "earlier": [],
    }  # fmt: skip


def make_optimizer(model: nn.Module, settings: Settings) -> Any:
    """Muon, AdamW or SGD. Norms and biases are not decayed, but for the reference designs with their published SGD."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    vectors = {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}
    groups: list[dict[str, Any]] = [{"params": weights}, vectors]
    if settings.optimizer == "sgd":
        groups = [{"params": list(model.parameters())}] if settings.net == "reference" else groups
        return torch.optim.SGD(groups, settings.lr, settings.momentum, weight_decay=settings.weight_decay)
    if settings.optimizer == "muon":
        matrices = [p for p in weights[:-1] if p.ndim == 4 and p.shape[1] > 1]  # neither depthwise filters nor the head
        rest = [p for p in weights if all(p is not m for m in matrices)]
        groups = [{"params": matrices, "orthogonal": True}, {"params": rest}, vectors]
    return Muon(groups, settings.lr, (settings.momentum, 0.99), settings.weight_decay)


class Muon:
    """AdamW in which groups marked ``orthogonal`` step along the nearest orthogonal matrix (Muon, Jordan et al. 2024).

    A convolution's gradient (C_out, C_in, K, K), averaged over the last steps, is taken as a matrix
    (C_out, C_in * K * K) with all its singular values set to about 1: rare directions move as far as common ones. The
    step is 0.2 times the lr in root mean square, about that of AdamW, so that both share one lr (Liu et al. 2025).
    Not a torch.optim.Optimizer: to make one imports torch's compiler, which takes 150 MB and two seconds.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], weight_decay: float):
        usual: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "orthogonal": False}
        self.param_groups = [usual | group for group in groups]
        self.steps = 0
        self.moments = [[[torch.zeros_like(p) for p in group["params"]] for _ in range(2 - group["orthogonal"])]
                        for group in self.param_groups]  # fmt: skip

    def zero_grad(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "moments": self.moments}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for ours, theirs in zip(self.moments, state["moments"], strict=True):
            for moments, saved in zip(ours, theirs, strict=True):
                torch._foreach_copy_(moments, saved)

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        for group, moments in zip(self.param_groups, self.moments, strict=True):
            params, grads = group["params"], [p.grad for p in group["params"]]
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_lerp_(moments[0], grads, 1 - group["betas"][0])
            if group["orthogonal"]:
                self._orthogonal(group, grads, *moments)
            else:
                self._adamw(group, grads, *moments)

    def _orthogonal(self, group: dict[str, Any], grads: list[Tensor], means: list[Tensor]) -> None:
        for p, grad, mean in zip(group["params"], grads, means, strict=True):
            step = orthogonalize(grad.lerp(mean, group["betas"][0]).flatten(1))  # Nesterov's
            p.sub_(step.view_as(p), alpha=0.2 * max(step.shape) ** 0.5 * group["lr"])

    def _adamw(self, group: dict[str, Any], grads: list[Tensor], means: list[Tensor], squares: list[Tensor]) -> None:
        """Loshchilov & Hutter 2019, algorithm 2, as torch.optim.AdamW rounds it."""
        beta1, beta2 = group["betas"]
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, (1 - beta2**self.steps) ** 0.5)
        torch._foreach_add_(roots, 1e-8)
        torch._foreach_addcdiv_(group["params"], means, roots, -group["lr"] / (1 - beta1**self.steps))


def orthogonalize(matrix: Tensor) -> Tensor:
    """Set the singular values of (M, N) to about 1 (0.7 to 1.2) by five Newton-Schulz steps (Jordan et al. 2024)."""
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def keep_freed_memory() -> None:
    """Have glibc keep what one step frees for the next one: to have it back costs a page fault for every 4 KiB."""
    with suppress(AttributeError, OSError, TypeError):  # only glibc has it
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD (mallopt(3)), in bytes
            ctypes.CDLL(None).mallopt(option, 1 << 30)


@cache
def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 pays here. Some CPUs have its instructions without their speed, so a matrix product is timed."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        return False
    return _product_seconds(torch.bfloat16) < _product_seconds(torch.float32)


def _product_seconds(dtype: torch.dtype, size: int = 512, rounds: int = 10) -> float:
    """The shortest time of a matrix product; the first ones, and those that other work disturbs, take longer."""
    matrix, seconds = torch.ones(size, size, dtype=dtype), []
    for _ in range(rounds):
        started = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _state(run: dict[str, Any]) -> dict[str, Any]:
    """All that an uninterrupted run would have had in memory at this moment."""
    state = {
        "model": run["model"].state_dict(), "optimizer": run["optimizer"].state_dict(), "history": run["history"],
        "origins": [*run["earlier"], run["origin"]], "generator": run["generator"].get_state(), "cpu": torch.get_rng_state(),
    }  # fmt: skip
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _resume(run: dict[str, Any], path: Path) -> None:
    """Go on from the checkpoint if there is one; raises CourseError if it cannot be read."""
    file = path.with_suffix(".ckpt")
    if not parallel.from_first(file.exists):
        return
    try:
        state = parallel.from_first(lambda: torch.load(file, map_location="cpu", weights_only=True))
        run["model"].load_state_dict(state["model"])
        run["optimizer"].load_state_dict(state["optimizer"])
        run["history"] = state["history"]
        run["earlier"] = [origin for origin in state.get("origins", []) if origin != run["origin"]]
        run["generator"].set_state(state["generator"])
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    except FileNotFoundError:
        return  # another process has just finished the same run
    except Exception as error:
        reason = " ".join(str(error).partition(". ")[0].split())  # not torch's advice to load it with code and all
        raise CourseError(f"cannot go on from {file} ({reason}); delete it to start this run again") from error


# --- records -----------------------------------------------------------------------------------------------------


def make_record(run: dict[str, Any], settings: Settings, data: Data, device: torch.device) -> Record:
    """Everything a reader needs to trust a run's figures, or to run it again."""
    logits = predict(run["model"], data.test_images.to(device), data).cpu()
    mirrored = predict(run["model"], data.test_images.flip(3).to(device), data).cpu()
    averaged = (logits.softmax(1) + mirrored.softmax(1)).argmax(1)
    pairs = data.test_labels * len(data.classes) + logits.argmax(1)
    confusion = torch.bincount(pairs, minlength=len(data.classes) ** 2).view(len(data.classes), -1)
    return {
        "command": command(asdict(settings)), "settings": asdict(settings), "parameters": count_parameters(run["model"]),
        "data": data.name, "copy": data.copy, "classes": list(data.classes),
        "images": [len(data.train_labels), len(data.test_labels)],
        "history": run["history"], "confusion": confusion.tolist(),  # rows: true class, columns: predicted
        "flip_accuracy": _percent(averaged, data.test_labels),  # of image and mirror image averaged; not the result
        "mistakes": mistakes(logits, data.test_labels),
        "seconds": sum(epoch["seconds"] for epoch in run["history"]),  # of training, evaluation apart
        **run["origin"], "resumed_from": run["earlier"],  # the other machines or versions that trained its first epochs
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def _origin(device: torch.device, bf16: bool, memory_format: torch.memory_format) -> dict[str, Any]:
    """What the figures of a run depend on beside its settings and data."""
    return {
        "device": _device_name(device), "threads": torch.get_num_threads(),
        "precision": "bf16 autocast" if bf16 else "fp32", "memory_format": str(memory_format).split(".")[1],
        "versions": {"normcourse": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
        "system": platform.system(),
    }  # fmt: skip


def mistakes(logits: Tensor, labels: Tensor, count: int = 10) -> list[tuple[int, int, float]]:
    """Some wrongly classified images, drawn at random with a fixed seed: index, predicted class, confidence (0 to 1).

    At random, because the first ones may all be of one class, and the most confident ones would not be typical.
    """
    confidence, predicted = logits.softmax(1).max(1)  # (N,), (N,)
    wrong = (predicted != labels).nonzero().flatten()
    wrong = wrong[torch.randperm(len(wrong), generator=torch.Generator().manual_seed(0))[:count]]
    return [(int(i), int(predicted[i]), round(float(confidence[i]), 4)) for i in wrong]


def changed_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What differs from the recipe of the network and norm."""
    recipe = asdict(default_settings(settings["net"], settings["norm"]))
    return {k: v for k, v in settings.items() if v != recipe[k]}


def command(settings: dict[str, Any]) -> str:
    """The command that makes a run again, also after a recipe has changed: what differs from it or from Settings()."""
    usual, changed = asdict(Settings()), changed_settings(settings)
    start = "python" if settings["processes"] == 1 else f"torchrun --nproc-per-node {settings['processes']}"
    words = [f"--net {settings['net']} --norm {settings['norm']}"]
    for name, value in settings.items():
        option = name.replace("_", "-")
        if name not in ("net", "norm", "processes") and (name in changed or value != usual[name]):
            words.append(f"--{option} {value}" if not isinstance(value, bool) else f"--{option}" if value else f"--no-{option}")
    return f"{start} -m normcourse train {' '.join(words)}{' --more-epochs' if settings['epochs'] > MAX_EPOCHS else ''}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_record(path: Path, record: Record) -> None:
    """Write a record whole or not at all."""
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    write_file(path, lambda file: file.write(text.encode()))


def _check_record(record: Record) -> None:
    """Raise an error if a record lacks anything that the report needs."""
    settings, classes, (train, test) = record["settings"], record["classes"], record["images"]
    _check_types(Settings(**settings))
    default_settings(more_epochs=True, **settings)
    wrong = [key for key, kind in RECORD_KEYS.items() if not isinstance(record[key], kind)]
    wrong += set(asdict(Settings())) - set(settings)
    if wrong or [len(row) for row in record["confusion"]] != [len(classes)] * len(classes):
        raise KeyError(", ".join(sorted(wrong)) or "confusion")
    name = "val" if settings["validate"] else "test"
    for epoch in record["history"]:
        percents = [record["flip_accuracy"], epoch["train_accuracy"], epoch[f"{name}_accuracy"]]
        others = [epoch["train_loss"], epoch[f"{name}_loss"], epoch["seconds"]]
        if max(percents) > 100 or not 0 <= min(percents + others) <= max(others) < 1e300:
            raise ValueError("figures that cannot be")
    for index, predicted, confidence in record["mistakes"]:
        range(test)[index], classes[predicted], f"{confidence:f}"
    record["history"][-1], record["copy"].split()[-1], "".join(classes)  # there, and of the right kind
    f"{train:d}{settings['lr']:g}{record['seconds']:f}{sum(map(sum, record['confusion'])):f}"  # none beyond a float


def read_record(path: Path) -> Record:
    """Read a record; raises CourseError if it is cut short or not a record."""
    try:
        record: Record = json.loads(path.read_text(), parse_constant=int)  # int("NaN") is an error, as it should be
        record["settings"] = {"processes": 1, "sync_bn": False} | record["settings"]  # which old records do not have
        _check_record(record)
        json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair could not be printed
    except Exception as error:  # what is no record fails in many ways
        what = f"{path} is not a whole record ({type(error).__name__}: {error})"
        raise CourseError(f"{what}; delete it and train again") from error
    return record
