"""200 random choices for the explorer and what normcourse says of each, as JSON. Needs torch."""

import json
import random

import torch

from normcourse.norm import AXES, shared_set

LEAST_AND_MOST = {"N": (1, 4), "C": (1, 8), "H": (1, 3), "W": (1, 3)}


def choice(random):
    """A norm, a size of the batch, an entry; and the mean, the deviation and the result."""
    norm = random.choice(list(AXES))
    size = {letter: random.randint(*ends) for letter, ends in LEAST_AND_MOST.items()}
    G = random.choice([g for g in range(1, size["C"] + 1) if size["C"] % g == 0])
    at = tuple(random.randrange(length) for length in size.values())
    shape = tuple(size.values())
    x = (torch.arange(torch.Size(shape).numel()) * 7 % 10).double().reshape(shape)
    members = x[shared_set(AXES[norm], shape, G, at)]
    var, mean = torch.var_mean(members, correction=0)
    result = (x[at] - mean) / (var + 1e-5).sqrt()
    numbers = {"mean": mean.item(), "deviation": var.sqrt().item(), "result": result.item()}
    return {"norm": norm, **size, "G": G, "at": at, "count": len(members), **numbers}


if __name__ == "__main__":
    seeded = random.Random(0)
    print(json.dumps([choice(seeded) for _ in range(200)]))
