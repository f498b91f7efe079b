"""Training: settings and recipes, one epoch, evaluation, the optimizer Muon."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from normcourse.data import Data, batches
from normcourse.errors import CourseError
from normcourse.model import NormNet, reference_net

MAX_EPOCHS = 20  # the assignment's limit


# --- settings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a run; the comments are the command's help, too.

    Two runs with equal settings, data and machine are equal.
    """

    net: str = "normnet"  # the course's network, or "reference": the published designs
    norm: str = "bn"  # a key of norm.NORMS
    multiplier: int | None = None  # channels of the reference designs: 1 or 2; None: as published
    num_groups: int = 8  # groups of NormNet's Group Norm
    dropout: float = 0.0  # after each block
    epochs: int = MAX_EPOCHS  # 1 to 20
    batch_size: int = 128  # images a step
    optimizer: str = "muon"  # muon, adamw or sgd
    schedule: str = "onecycle"  # onecycle, or step: a tenth after every 8 epochs
    lr: float = 0.01  # the peak of the schedule; tuned for each norm
    momentum: float = 0.9  # of Muon and SGD; AdamW's beta1
    weight_decay: float = 0.05  # of convolutions; of all weights in the reference designs
    l1: float = 0.0  # times the sum of all |w|, added to the loss
    shift: int = 3  # augmentation: pixels an image is moved at most
    flip: bool = True  # augmentation: half of the images mirrored left-right
    seed: int = 0  # draws weights and batches
    validate: bool = False  # judge on a tenth of the training images, held out
    processes: int = 1  # that share each batch; filled in by the run
    sync_bn: bool = False  # under torchrun: Batch Norm's statistics of all GPUs


# Chosen on the validation split by experiments/lr_search.py; a test compares them with its record.
LEARNING_RATES = {"bn": 0.03, "ln": 0.03, "gn": 0.03, "in": 0.06, "none": 0.03}

# As published: SGD, a tenth of the lr every 8 epochs, no augmentation, L1 on all weights, which is
# divided by the batch size.
REFERENCE: dict[str, Any] = dict(
    batch_size=64, optimizer="sgd", schedule="step", momentum=0.9, l1=5e-4 / 64, shift=0, flip=False
)

# The least value, the first that is too large, and what the error says.
LIMITS = {
    "epochs": (1, MAX_EPOCHS + 1, f"1 to {MAX_EPOCHS} (more with --more-epochs)"),
    "batch_size": (1, math.inf, "1 or more"),
    "lr": (5e-324, 1e9, "above 0, below 1e9"),
    "momentum": (0, 1, "at least 0, below 1"),
    "weight_decay": (0, 1e9, "0 or more, below 1e9"),
    "l1": (0, 1e9, "0 or more, below 1e9"),
    "dropout": (0, 1, "at least 0, below 1"),
    "seed": (0, 2**63, "0 to 2**63 - 1"),
    "shift": (0, 17, "0 to 16"),
}
OPTIONS = {"optimizer": ("muon", "adamw", "sgd"), "schedule": ("onecycle", "step")}


def default_settings(
    net: str = "normnet", norm: str = "bn", more_epochs: bool = False, **changed: Any
) -> Settings:
    """The recipe of a network and norm, with what is given (and not None) changed.

    Every value is checked. Raises CourseError for a value that is not allowed. More than 20 epochs,
    the assignment's limit, need more_epochs.
    """
    known = asdict(Settings())
    if unknown := set(changed) - set(known):
        message = f"unknown settings {', '.join(sorted(unknown))}"
        raise CourseError(f"{message}; allowed: {', '.join(sorted(known))}")
    values = {"net": net, "norm": norm} | recipe(net, norm)
    for name, value in changed.items():
        if value is not None:
            is_number = getattr(value, "shape", None) == ()  # NumPy's or torch's
            values[name] = value.item() if is_number else value
    settings = Settings(**values)
    check_settings(settings, more_epochs)
    if net == "reference":  # one name for one network
        multiplier = None if norm == "bn" else settings.multiplier or 2
        settings = replace(settings, num_groups=8, multiplier=multiplier)
    return settings if norm == "bn" else replace(settings, sync_bn=False)


def recipe(net: str, norm: str) -> dict[str, Any]:
    """What a network and norm are trained with where it differs from ``Settings()``."""
    if net != "reference":
        return {"lr": LEARNING_RATES.get(str(norm), 0.01)}
    if norm == "bn":
        return REFERENCE | {"lr": 0.1, "weight_decay": 1e-3}
    return REFERENCE | {"lr": 0.01, "weight_decay": 1e-5}


def check_settings(settings: Settings, more_epochs: bool = False) -> None:
    """Raise CourseError for a value of a wrong type or size, or no such network."""
    for field in fields(settings):
        check_type(field.name, getattr(settings, field.name), field.type)
    for name, (least, beyond, allowed) in LIMITS.items():
        value = getattr(settings, name)
        if name == "epochs" and more_epochs:
            beyond = math.inf
        if not least <= value < beyond:  # false for nan, too
            raise CourseError(f"{name} is {value}; allowed: {allowed}")
    for name, options in OPTIONS.items():
        if (value := getattr(settings, name)) not in options:
            raise CourseError(f"{name} is {value!r}; allowed: {', '.join(options)}")
    with torch.device("meta"):  # without memory, and no random number is drawn
        build(settings)
        NormNet("gn", num_groups=settings.num_groups)  # under any norm, so that it is never ignored
    if settings.net == "normnet" and settings.multiplier is not None:
        message = f"multiplier is {settings.multiplier}"
        raise CourseError(f"{message}, but only the reference designs have one (--net reference)")


def check_type(name: str, value: Any, kind: Any) -> None:
    """Raise CourseError unless the value has the type.

    An int serves as a float, a bool only as a bool.
    """
    allowed = int | float if kind is float else kind
    foreign = hasattr(value, "shape")  # NumPy's float64 is a float, but no checkpoint can hold it
    if foreign or not isinstance(value, allowed) or isinstance(value, bool) != (kind is bool):
        raise CourseError(f"{name} is {value!r}; allowed: {getattr(kind, '__name__', kind)}")


def build(settings: Settings, num_classes: int = 10) -> nn.Module:
    """The network that the settings name, with random weights."""
    norm, dropout = settings.norm, settings.dropout
    if settings.net == "normnet":
        return NormNet(norm, num_classes, settings.num_groups, dropout)
    if settings.net == "reference":
        return reference_net(norm, settings.multiplier, num_classes, dropout)
    raise CourseError(f"unknown network {settings.net!r}; allowed: normnet, reference")


# --- one epoch ------------------------------------------------------------------------------------


def train_epoch(
    model: nn.Module,
    optimizers: list[Optimizer],
    stream: Iterable[tuple[Tensor, Tensor]],
    settings: Settings,
    epoch: int,
    count: int,
) -> tuple[Tensor, Tensor]:
    """One pass over ``count`` training images, whose batches the ``stream`` yields.

    Epochs count from 0. Returns the summed loss and the number of correct answers, as they were on
    the way: the weights change meanwhile.
    """
    device = next(model.parameters()).device
    total_loss = torch.zeros((), device=device)
    correct = torch.zeros((), device=device, dtype=torch.long)
    steps = math.ceil(count / settings.batch_size)
    model.train()
    for step, (x, y) in enumerate(stream):  # (N, 3, 32, 32), (N,)
        size = share_of_batch(settings, count, step)  # N, if there is one process
        logits = model(x).float()  # (N, num_classes)
        loss = F.cross_entropy(logits, y, reduction="sum") / size
        model.zero_grad()
        (loss + l1_penalty(model, settings.l1)).backward()
        for optimizer in optimizers:
            set_lr(optimizer, learning_rate(settings, epoch + step / steps))
            optimizer.step()
        total_loss += loss.detach() * size
        correct += (logits.argmax(1) == y).sum()
    return total_loss, correct


def share_of_batch(settings: Settings, count: int, step: int) -> float:
    """The images of a step's whole batch, of which the last may be short, over the processes.

    The loss is divided by this, not by the process's own number of images: then the average of the
    processes' gradients is the gradient of the whole batch.
    """
    left = count - step * settings.batch_size
    return min(settings.batch_size, left) / settings.processes


def l1_penalty(model: nn.Module, l1: float) -> Tensor | float:
    """``l1`` times the sum of all |w|."""
    if l1 == 0:
        return 0.0
    return l1 * torch.cat([p.flatten() for p in model.parameters()]).abs().sum()


def learning_rate(settings: Settings, epoch: float) -> float:
    """The rate at a moment of the training, ``epoch``, which need not be whole.

    One cycle: up for the first fifth, then linearly down to 0. Or a tenth after every 8 epochs.
    """
    if settings.schedule == "step":
        return settings.lr * 0.1 ** (int(epoch) // 8)
    part = epoch / settings.epochs
    if part < 0.2:
        return settings.lr * (0.05 + 0.95 * part / 0.2)
    return settings.lr * ((1 - part) / 0.8)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


# --- evaluation -----------------------------------------------------------------------------------


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, data: Data, batch_size: int = 100) -> Tensor:
    """Logits (N, num_classes) in eval mode and fp32, for images (N, 3, 32, 32) uint8."""
    was_training = model.training
    model.eval()
    logits = []
    for x, _ in batches(images, torch.zeros(len(images)), data, batch_size):
        logits.append(model(x))
    model.train(was_training)
    return torch.cat(logits)


def evaluate(model: nn.Module, images: Tensor, labels: Tensor, data: Data) -> tuple[float, Tensor]:
    """Mean cross-entropy, and the predicted classes (N,), in eval mode."""
    logits = predict(model, images, data)
    return F.cross_entropy(logits, labels).item(), logits.argmax(1)


def percent_correct(predicted: Tensor, labels: Tensor) -> float:
    """Correct over seen (the mean of batch accuracies would weigh a short last batch too much)."""
    return 100 * (predicted == labels).sum().item() / len(labels)


# --- optimizers -----------------------------------------------------------------------------------


def make_optimizers(model: nn.Module, settings: Settings) -> list[Optimizer]:
    """Muon with AdamW for the rest, AdamW alone, or SGD; each parameter belongs to one of them.

    Norms and biases are not decayed, but for the reference designs with their published SGD.
    """
    lr, weight_decay = settings.lr, settings.weight_decay
    if settings.optimizer == "sgd" and settings.net == "reference":
        return [SGD(model.parameters(), lr, settings.momentum, weight_decay=weight_decay)]
    weights = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": vectors, "weight_decay": 0.0}]
    if settings.optimizer == "sgd":
        return [SGD(groups, lr, settings.momentum, weight_decay=weight_decay)]
    optimizers: list[Optimizer] = []
    if settings.optimizer == "muon":
        matrices: list[Tensor] = []
        rest: list[Tensor] = []
        for p in weights:  # depthwise filters are no matrices, and the head, the last, is left out
            is_matrix = p.ndim == 4 and p.shape[1] > 1 and p is not weights[-1]
            (matrices if is_matrix else rest).append(p)
        optimizers.append(Muon(matrices, lr, settings.momentum, weight_decay))
        groups[0]["params"] = rest
    betas = (settings.momentum, 0.99)
    return [*optimizers, AdamW(groups, lr, betas, weight_decay=weight_decay)]


class Muon(Optimizer):
    """Steps along the nearest orthogonal matrix (Jordan et al. 2024).

    For the weights of convolutions. A gradient (C_out, C_in, K, K), averaged over the last steps,
    is taken as a matrix (C_out, C_in * K * K) with all its singular values set to about 1: rare
    directions move as far as common ones. The step is 0.2 times the lr in root mean square, about
    that of AdamW, so that both share one lr (Liu et al. 2025, section 2.2).
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float, weight_decay: float):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                gradient = p.grad.lerp(buffer, group["momentum"])  # Nesterov's
                matrix = orthogonalize(gradient.flatten(1))  # (C_out, C_in * K * K)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(matrix.view_as(p), alpha=0.2 * max(matrix.shape) ** 0.5 * group["lr"])


def orthogonalize(matrix: Tensor) -> Tensor:
    """Set the singular values of (M, N) to about 1 (Jordan et al. 2024).

    Five Newton-Schulz steps bring them to 0.7 to 1.2.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix / (matrix.norm() + 1e-7)
    x = x if wide else x.T
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if wide else x.T
