"""What the exercises' checks say: how an answer compares with the right one."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor


def verdict(answer: Any, expected: Tensor, others: dict[str, Tensor], within: float = 0.01) -> str:
    """How an answer, of any type, compares with the expected tensor.

    ``others`` are wrong answers by the name of the error. Returns "open" for None, "solved", or
    "not yet: " and what is wrong.
    """
    expected, found = expected.double(), as_numbers(answer)
    if answer is None:
        return "open"
    if found is None:
        return f"not yet: this is a {type(answer).__name__}, not a tensor of numbers"
    if found.shape != expected.shape:
        return f"not yet: the shape is {tuple(found.shape)}, not {tuple(expected.shape)}"
    if (found - expected).abs().max() < within:
        return "solved"
    return f"not yet: {what_is_wrong(found, expected, others)}"


def as_numbers(answer: Any) -> Tensor | None:
    """The answer as a tensor, or None if it is not made of numbers."""
    try:
        found = torch.as_tensor(answer).detach()
        return None if found.is_complex() else found.double()
    except (TypeError, ValueError, RuntimeError):
        return None


def what_is_wrong(found: Tensor, expected: Tensor, others: dict[str, Tensor]) -> str:
    """What is wrong with an answer of the right shape."""
    for name, other in others.items():
        if (found - other).abs().max() < 0.01:
            return f"this is {name}"
    factor = (found * expected).sum() / expected.square().sum()
    near = (found - factor * expected).abs().max() < 0.01
    if found.dim() and 0.5 < factor < 2 and near:
        return f"right up to a factor of {factor:.2f}; do you divide by the right σ?"
    return f"off by up to {(found - expected).abs().max():.3g}"


def verdict_on_function(
    yours: Callable[..., Any],
    right: Callable[..., Tensor],
    others: dict[str, Callable[..., Tensor]],
    batches: dict[str, tuple[Any, ...]],
) -> str:
    """The same of a function, called like the right one on copies of each batch's arguments."""
    for k, (name, given) in enumerate(batches.items()):
        expected = right(*deepcopy(given))
        wrong = {what: other(*deepcopy(given)) for what, other in others.items()}
        said = verdict(yours(*deepcopy(given)), expected, wrong)
        if said != "solved":
            where = f"right on the first batch; with {name}: " if k else ""
            return said.replace("not yet: ", f"not yet: {where}")
    return "solved"
