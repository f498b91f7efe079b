"""Sequences: what does a norm do for a recurrent network, and what does Batch Norm lose there?

Question: Ba et al. (2016, section 3) made Layer Norm for recurrent networks, where Batch Norm needs
statistics for each step, from fewer and fewer sequences, and has none for longer ones. What is each
worth, if no norm has the gain of 0.1 that all norms start with (Cooijmans et al. 2017)?
Varies: the norm: none, none with a learned gain, Layer Norm, RMSNorm, Batch Norm. Each in batches
of 32 and of 8, at four rates; an arm is judged at the rate with the least loss on sequences that
judge nothing else ("validation loss").
The task: a token is one of 20, four of them commands; a sequence has 1 to 16, and the answer is its
last command. The network is h = tanh(norm(W x + U h) + beta), of width 32.
Batch Norm as in Cooijmans et al.: W x and U h are normalized apart, each with its gain, by
statistics of each step; beyond step 16, by those of step 16. Padding is left out; where one
sequence is left, it is normalized by the running statistics.
Held: first weights and order of sequences, 600 steps of Adam whose rate falls in a line to 0, fp32.
Judged by the accuracy (%) on 1,000 new sequences of known lengths, on 1,000 longer ones (17 to 64),
and by length. Batch Norm also with precise statistics, of 2,000 sequences of 16 tokens: what of its
loss is the lag and noise of running averages, and what the longer sequences themselves?
Diverged: a loss that is not finite.
Controls: in Layer Norm and RMSNorm neither padding nor the other sequences of a batch change an
answer, in Batch Norm the others do; a gain of 1 without norm is no norm, to the last bit; W and U
times 10 change nothing in Batch Norm, each by itself (tests/test_experiments_sequences.py).
Seeds 0 to 4. Cost: 200 trainings of about 6 seconds on one core.
The papers found: Ba et al.: Layer Norm trains recurrent networks faster, most of all on long
sequences and in small batches. Cooijmans et al.: with a gain of 0.1 Batch Norm does, too, and it
goes on to longer sequences with the last step's statistics; theirs were of the whole training set.
"""

import copy
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import train_steps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LinearLR

from normcourse.model import count_parameters

TOKENS, COMMANDS, LONGEST, WIDTH, EPS = 20, 4, 16, 32, 1e-5
STEPS, EVERY, SEEDS, BATCH_SIZES = 600, 50, (0, 1, 2, 3, 4), (32, 8)
LENGTHS = (1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 24, 28, 32, 40, 48, 64)


class Batch(NamedTuple):
    """Sequences of unequal length."""

    tokens: Tensor  # (N, T)
    real: Tensor  # (N, T): not padding
    answers: Tensor  # (N,): the last command


def draw(count: int, shortest: int, longest: int, generator: torch.Generator) -> Batch:
    """Sequences that begin with a command; commands and noise follow."""
    tokens = torch.randint(TOKENS, (count, longest), generator=generator)
    tokens[:, 0] %= COMMANDS
    place = torch.arange(longest)
    real = place < torch.randint(shortest, longest + 1, (count, 1), generator=generator)
    last = torch.where(real & (tokens < COMMANDS), place, 0).amax(1, keepdim=True)
    return Batch(tokens, real, tokens.gather(1, last).squeeze(1))


class Data(NamedTuple):
    """Where the sequences are from, and those that judge."""

    name: str
    copy: str
    batches: dict[str, Batch]  # by the name of their figure


def load(source: str | None) -> Data:
    """The sequences that judge, drawn from seeds that no training has; no source needed."""
    batches = {
        "validation": draw(1000, 1, LONGEST, seeded(1001)),
        "known": draw(1000, 1, LONGEST, seeded(1002)),
        "longer": draw(1000, LONGEST + 1, LENGTHS[-1], seeded(1003)),
    }
    batches |= {f"length {n}": draw(1000, n, n, seeded(1004)) for n in LENGTHS}
    return Data("last command", "drawn from seeds 1001 to 1004", batches)


def seeded(seed: int) -> torch.Generator:
    """A generator of random numbers."""
    return torch.Generator().manual_seed(seed)


# --- the network ----------------------------------------------------------------------------------


class NoNorm(nn.Module):
    """Called like the norms, with z (N, WIDTH) at step t and which sequences go on, real (N,)."""

    def forward(self, z: Tensor, real: Tensor, t: int) -> Tensor:  # (N, WIDTH) -> (N, WIDTH)
        return z


class Gain(nn.Module):
    """No norm, but the gain that the norms have: it starts at 0.1 (Cooijmans et al. 2017)."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.1))

    def forward(self, z: Tensor, real: Tensor, t: int) -> Tensor:
        return self.gamma * z


class LayerNorm(Gain):
    """Layer Norm over the features."""

    def forward(self, z: Tensor, real: Tensor, t: int) -> Tensor:
        mean, var = z.mean(1, keepdim=True), z.var(1, correction=0, keepdim=True)
        return self.gamma * (z - mean) / (var + EPS).sqrt()


class RMSNorm(Gain):
    """Layer Norm without the mean."""

    def forward(self, z: Tensor, real: Tensor, t: int) -> Tensor:
        return self.gamma * z / (z.square().mean(1, keepdim=True) + EPS).sqrt()


class BatchNorm(Gain):
    """Batch Norm of z (N, WIDTH) over the sequences that go on, with statistics of each step."""

    def __init__(self):
        super().__init__()
        self.momentum = 0.1
        self.register_buffer("means", torch.zeros(LONGEST, WIDTH))
        self.register_buffer("variances", torch.ones(LONGEST, WIDTH))

    def forward(self, z: Tensor, real: Tensor, t: int) -> Tensor:
        step = min(t, LONGEST - 1)  # beyond the longest in training: that of its last step
        if self.training and real.sum() > 1:
            mean, var = z[real].mean(0), z[real].var(0, correction=0)  # (WIDTH,)
            self.remember(step, z[real].detach())
        else:
            mean, var = self.means[step], self.variances[step]
        return self.gamma * (z - mean) / (var + EPS).sqrt()

    def remember(self, step: int, z: Tensor) -> None:
        """Move the running statistics of a step towards those of z."""
        self.means[step].lerp_(z.mean(0), self.momentum)
        self.variances[step].lerp_(z.var(0), self.momentum)


NORMS = {
    "no norm": NoNorm,
    "no norm, learned gain": Gain,
    "Layer Norm": LayerNorm,
    "RMSNorm": RMSNorm,
    "Batch Norm": BatchNorm,
}
LOW, HIGH = (0.003, 0.01, 0.03, 0.1), (0.01, 0.03, 0.1, 0.3)
RATES = {name: LOW if name.startswith("no norm") else HIGH for name in NORMS}


class Recurrent(nn.Module):
    """Reads a sequence token by token: h = tanh(norm(W x + U h) + beta)."""

    def __init__(self, norm: str):
        super().__init__()
        self.W = nn.Parameter(torch.randn(TOKENS, WIDTH))
        self.U = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.out = nn.Parameter(torch.randn(WIDTH, COMMANDS) / WIDTH**0.5)
        self.beta = nn.Parameter(torch.zeros(WIDTH))
        self.norm = NORMS[norm]()
        self.norm_input = BatchNorm() if norm == "Batch Norm" else None

    def forward(self, tokens: Tensor, real: Tensor) -> Tensor:  # (N, T), (N, T) -> (N, COMMANDS)
        h = torch.zeros(len(tokens), WIDTH)
        for t in range(tokens.shape[1]):
            z = self.normalized(self.W[tokens[:, t]], h @ self.U, real[:, t], t)
            new = torch.tanh(z + self.beta)
            h = torch.where(real[:, t, None], new, h)  # padding changes nothing
        return h @ self.out

    def normalized(self, wx: Tensor, uh: Tensor, real: Tensor, t: int) -> Tensor:
        """W x + U h, both (N, WIDTH), with the norm; Batch Norm normalizes them apart."""
        if self.norm_input:
            return self.norm_input(wx, real, t) + self.norm(uh, real, t)
        return self.norm(wx + uh, real, t)


# --- trials ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One training."""

    norm: str
    batch_size: int
    rate: float
    seed: int

    @property
    def arm(self) -> str:
        """What varies, in words."""
        return f"{self.norm}, batch {self.batch_size}, rate {self.rate:g}"

    def measure(self, data: Data, path: Path) -> dict[str, Any]:
        """Train; it takes seconds, so there is no checkpoint."""
        start = time.perf_counter()
        torch.manual_seed(self.seed)
        network = Recurrent(self.norm)
        history = train(network, self, data)
        diverged = len(history) < STEPS // EVERY
        return {
            "settings": asdict(self) | {"steps": STEPS},
            "parameters": count_parameters(network),
            "history": history,
            "seconds": time.perf_counter() - start,
            "diverged": diverged,
            "figures": {} if diverged else judge(network, data),
            "precision": "fp32",
        }


def trials() -> Iterator[Trial]:
    """Seed by seed, so that a part of them already says something."""
    for seed in SEEDS:
        for batch_size in BATCH_SIZES:
            for norm, rates in RATES.items():
                for rate in rates:
                    yield Trial(norm, batch_size, rate, seed)


def train(network: Recurrent, trial: Trial, data: Data) -> list[dict[str, float]]:
    """The losses after every 50 steps; they end where one is not finite."""
    generator = seeded(trial.seed)
    optimizer = torch.optim.Adam(network.parameters(), trial.rate)
    schedule = LinearLR(optimizer, 1, 0, STEPS)

    def loss() -> Tensor:
        return loss_of(network, draw(trial.batch_size, 1, LONGEST, generator))

    def val_loss() -> float:
        return evaluate(network, data.batches["validation"])[0]

    return train_steps(loss, val_loss, optimizer, schedule, STEPS, EVERY)


# --- judging --------------------------------------------------------------------------------------


def loss_of(network: Recurrent, batch: Batch) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(network(batch.tokens, batch.real), batch.answers)


@torch.no_grad()
def evaluate(network: Recurrent, batch: Batch) -> tuple[float, float]:
    """Loss, and accuracy in %; leaves the network in training mode."""
    logits = network.eval()(batch.tokens, batch.real)
    network.train()
    right = (logits.argmax(1) == batch.answers).float()
    return F.cross_entropy(logits, batch.answers).item(), 100 * right.mean().item()


def judge(network: Recurrent, data: Data) -> dict[str, float]:
    """Accuracy (%) by kind of sequence; the validation loss, which chooses the rate."""
    figures = {"validation loss": evaluate(network, data.batches["validation"])[0]}
    figures |= {name: evaluate(network, batch)[1] for name, batch in data.batches.items()}
    if isinstance(network.norm, BatchNorm):
        precise = with_precise_statistics(network)
        for name in ("known", "longer"):
            figures[f"{name}, precise"] = evaluate(precise, data.batches[name])[1]
    return figures


@torch.no_grad()
def with_precise_statistics(network: Recurrent) -> Recurrent:
    """A copy with the statistics of 2,000 sequences that all go on to the last step."""
    network = copy.deepcopy(network)
    network.norm.momentum = network.norm_input.momentum = 1
    batch = draw(2000, LONGEST, LONGEST, seeded(1005))
    network(batch.tokens, batch.real)
    return network
