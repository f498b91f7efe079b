"""Layer Norm where it lives: does a small transformer need its norm, where, and which?

Question: Xiong et al. (2020) put Layer Norm before each sublayer (pre-norm) in place of behind the
sum (post-norm), and needed no warm-up. Zhang & Sennrich (2019) left out its mean. What is each
worth, beside no norm at all?
Varies: the norm and its place: post-norm, pre-norm, pre-RMSNorm, none; post-norm also with warm-up,
the rate rising for 100 steps. Each at four rates; it is judged at the best of them, chosen on the
text that judges, for all alike.
Held: 8 layers of width 64 with 4 heads, windows of 64 characters, batches of 32, 600 steps of AdamW
(betas 0.9 and 0.98 as in Xiong et al., decay 0.01) whose rate falls in a line to 0 from the first
step on; warm-up multiplies that line. No dropout, no clipping, fp32. The first weights are
Xavier's, as in Xiong et al.: biases 0, embeddings of variance 1.
Beside it: pre-norm and none from torch's own first weights, with which a sublayer adds about half
as much. How much of the gap between them is the norm, how much the size of the weights?
Judged by the cross-entropy (nats a character) after the last step on the last tenth of the text
(8 % of its windows stand word for word in the rest, for all arms alike). Also the size of the
gradient of each layer's second MLP weight on the first batch (Xiong et al., figure 3).
Diverged: a loss that is not finite, or at the end one above the uniform guess's.
Controls: with a head of zeros the loss is log(vocabulary); a later character changes no earlier
prediction; what a pre-norm layer adds does not depend on the size of its input
(tests/test_experiments_sequences.py). Recorded beside each loss: that of the letters' frequencies,
the best that a network can reach whose answer does not depend on its input.
Seeds 0, 1, 2. Cost: 84 trainings of about 100 seconds on one core.
Two versions of normcourse made those of seed 2; their records are equal bit for bit.
The papers found: Xiong et al.: without warm-up post-norm fails, pre-norm is as good as post-norm
with it; at the start post-norm's gradients are large near the output, pre-norm's smaller there by
about the root of the number of layers. Zhang & Sennrich: RMSNorm is as good as Layer Norm.
"""

import hashlib
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from common import train_steps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import init
from torch.optim.lr_scheduler import LambdaLR

from normcourse.model import count_parameters

NUM_LAYERS, WIDTH, CONTEXT, NUM_HEADS = 8, 64, 64, 4
STEPS, BATCH_SIZE, WARM_UP, EVERY, SEEDS = 600, 32, 100, 50, (0, 1, 2)


class Text(NamedTuple):
    """A text as the numbers of its characters, and where it is from."""

    name: str
    copy: str
    vocabulary: int  # how many different characters there are
    train: Tensor  # (characters,)
    held_out: Tensor  # (windows, CONTEXT + 1)


def load(source: str | None) -> Text:
    """The help texts of Python, the same for everybody with the same version; no source needed."""
    text = "".join(topics[topic] for topic in sorted(topics))
    characters = sorted(set(text))
    number = {character: k for k, character in enumerate(characters)}
    numbers = torch.tensor([number[character] for character in text])
    cut = len(text) * 9 // 10
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    copy = f"{digest}, {len(text):,} characters, Python {platform.python_version()}"
    held_out = numbers[cut:].unfold(0, CONTEXT + 1, CONTEXT)  # each character is predicted once
    return Text("pydoc_data.topics", copy, len(characters), numbers[:cut], held_out)


# --- the network ----------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """Layer Norm without the mean and the bias (Zhang & Sennrich 2019)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:  # (..., width) -> (..., width)
        mean_square = x.square().mean(-1, keepdim=True)
        return self.weight * x / (mean_square + 1e-5).sqrt()


class Kind(NamedTuple):
    """A norm, its place, and how it is trained."""

    norm: type[nn.Module]
    rates: tuple[float, ...]
    post: bool = False  # behind the sum
    warm_up: bool = False
    xavier: bool = True  # or torch's own first weights


KINDS = {
    "post-norm": Kind(nn.LayerNorm, (0.0005, 0.001, 0.002, 0.004), post=True),
    "post-norm with warm-up": Kind(nn.LayerNorm, (0.002, 0.004, 0.008, 0.016), True, warm_up=True),
    "pre-norm": Kind(nn.LayerNorm, (0.002, 0.004, 0.008, 0.016)),
    "pre-RMSNorm": Kind(RMSNorm, (0.002, 0.004, 0.008, 0.016)),
    "none": Kind(nn.Identity, (0.0005, 0.001, 0.002, 0.004)),
    "pre-norm, torch's weights": Kind(nn.LayerNorm, (0.002, 0.004, 0.008, 0.016), xavier=False),
    "none, torch's weights": Kind(nn.Identity, (0.002, 0.004, 0.008, 0.016), xavier=False),
}


class Layer(nn.Module):
    """Attention to the characters before, then an MLP: each is added to what goes in."""

    def __init__(self, kind: Kind):
        super().__init__()
        self.post = kind.post
        self.norm1, self.norm2 = kind.norm(WIDTH), kind.norm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.first = nn.Linear(WIDTH, 4 * WIDTH)
        self.second = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, WIDTH) -> (N, T, WIDTH)
        if self.post:
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.mlp(x))
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def attention(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(2, (3, NUM_HEADS, -1))  # (N, T, 3, heads, WIDTH / heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (N, heads, T, WIDTH / heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.project(mixed.transpose(1, 2).flatten(2))

    def mlp(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x)))


class Transformer(nn.Module):
    """Predicts each next character."""

    def __init__(self, kind: Kind, vocabulary: int):
        super().__init__()
        self.token = nn.Embedding(vocabulary, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.Sequential(*(Layer(kind) for _ in range(NUM_LAYERS)))
        self.norm = nn.Identity() if kind.post else kind.norm(WIDTH)  # post-norm ends with one
        self.head = nn.Linear(WIDTH, vocabulary)
        if kind.xavier:
            self.apply(xavier)

    def forward(self, tokens: Tensor) -> Tensor:  # (N, T) -> (N, T, vocabulary)
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.layers(x)))


def xavier(module: nn.Module) -> None:
    """Glorot & Bengio's (2010) first weights, in place."""
    if isinstance(module, nn.Linear):
        init.xavier_normal_(module.weight)
        init.zeros_(module.bias)


# --- trials ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One training."""

    kind: str
    rate: float
    seed: int

    @property
    def arm(self) -> str:
        """What varies, in words."""
        return f"{self.kind}, rate {self.rate:g}"

    def measure(self, data: Text, path: Path) -> dict[str, Any]:
        """Train; it takes a minute or two, so there is no checkpoint."""
        start = time.perf_counter()
        torch.manual_seed(self.seed)
        model = Transformer(KINDS[self.kind], data.vocabulary)
        figures = {"letter frequencies": frequencies_loss(data)}
        figures |= gradient_sizes(model, next(batches(data, self.seed)))
        history = train(model, self, data)
        last = history[-1]["val_loss"] if len(history) == STEPS // EVERY else math.inf
        diverged = last > math.log(data.vocabulary)
        return {
            "settings": asdict(self) | {"steps": STEPS, "batch_size": BATCH_SIZE},
            "parameters": count_parameters(model),
            "history": history,
            "seconds": time.perf_counter() - start,
            "diverged": diverged,
            "figures": {} if diverged else {"validation loss": last} | figures,
            "precision": "fp32",
        }


def trials() -> Iterator[Trial]:
    """Seed by seed, so that a part of them already says something."""
    for seed in SEEDS:
        for name, kind in KINDS.items():
            for rate in kind.rates:
                yield Trial(name, rate, seed)


def train(model: nn.Module, trial: Trial, data: Text) -> list[dict[str, float]]:
    """The losses after every 50 steps; they end where one is not finite."""
    stream = batches(data, trial.seed)
    optimizer = torch.optim.AdamW(model.parameters(), trial.rate, betas=(0.9, 0.98))
    warm_up = KINDS[trial.kind].warm_up
    schedule = LambdaLR(optimizer, lambda step: share(step, warm_up))

    def loss() -> Tensor:
        return loss_of(model, next(stream))

    def val_loss() -> float:
        return held_out_loss(model, data)

    return train_steps(loss, val_loss, optimizer, schedule, STEPS, EVERY)


def share(step: int, warm_up: bool) -> float:
    """The part of the rate that a step has: it falls in a line; warm-up lets it rise before."""
    rise = min(1, (step + 1) / WARM_UP) if warm_up else 1
    return rise * (1 - step / STEPS)


def batches(data: Text, seed: int) -> Iterator[Tensor]:
    """Windows from anywhere in the training text, (BATCH_SIZE, CONTEXT + 1), without end."""
    generator = torch.Generator().manual_seed(seed)
    windows = data.train.unfold(0, CONTEXT + 1, 1)  # (windows, CONTEXT + 1), no copy
    while True:
        yield windows[torch.randint(len(windows), (BATCH_SIZE,), generator=generator)]


# --- judging --------------------------------------------------------------------------------------


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:  # (N, CONTEXT + 1) -> ()
    """Mean cross-entropy of all characters but the first of each window."""
    logits = model(windows[:, :-1])  # (N, CONTEXT, vocabulary)
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, data: Text) -> float:
    """Mean cross-entropy on the held-out windows."""
    losses = [loss_of(model, part) * len(part) for part in data.held_out.split(128)]
    return sum(losses).item() / len(data.held_out)


def frequencies_loss(data: Text) -> float:
    """The same of a guess by each character's frequency in the training text."""
    counts = data.train.bincount(minlength=data.vocabulary) + 1  # none is impossible
    guess = (counts / counts.sum()).log()  # (vocabulary,)
    return -guess[data.held_out[:, 1:]].mean().item()


def gradient_sizes(model: nn.Module, windows: Tensor) -> dict[str, float]:
    """The norm of the gradient of each layer's second MLP weight."""
    weights = [layer.second.weight for layer in model.layers]
    gradients = torch.autograd.grad(loss_of(model, windows), weights)
    return {f"gradient {k}": g.norm().item() for k, g in enumerate(gradients, 1)}
