"""How many groups? From one group of all channels to a group for each.

Question: does the number of groups G matter, and where is the best (Wu & He 2018, table 3)?
Varies: G = 1 (Layer Norm), 2, 4, 8, C (Instance Norm), each at its own best learning rate: of three
peak rates or more, so that the best has one on either side, tried with seed 0.
Held: the course's recipe but for the rate, 5 epochs of 44,928 images, batches of 128, bf16; the
first weights and the order of images.
Judged on 5,000 training images held out, after the last epoch, with three seeds that had no part in
choosing a rate.
Controls: G = 1 trains like Layer Norm and G = C like Instance Norm, to the last bit in fp32 (a
test).
Seeds 0 (rates), 1, 2, 3. Cost: 33 trainings of 6 to 15 minutes on one core;
where other work ran beside them, up to 70.
The papers found: Wu & He, ResNet-50, ImageNet, error (%) at G = 64, 32, 16, 8, 4, 2, 1: 24.6, 24.1,
24.6, 24.4, 24.6, 24.7, 25.3; with Instance Norm 28.4.
"""

from collections.abc import Iterator
from functools import partial
from itertools import product

from common import Training, final_accuracy, held_out, search

from normcourse.data import Data, load_data
from normcourse.train import default_settings

EPOCHS, SEEDS = 5, (1, 2, 3)
GROUPS = (1, 2, 4, 8, "C")
STEPS = (-1, 0, 1)  # the recipe's rate, halved and doubled


def trials() -> Iterator[Training]:
    """First the rates; when they are known, the seeds that are judged."""
    best = {}
    for num_groups in GROUPS:
        steps, best[num_groups] = search("groups", STEPS, partial(first_seed, num_groups))
        for step in steps:
            yield from first_seed(num_groups, step)
    if None not in best.values():
        for seed, num_groups in product(SEEDS, GROUPS):
            yield arm(num_groups, best[num_groups], seed)


def first_seed(num_groups: int | str, step: int) -> list[Training]:
    return [arm(num_groups, step, seed=0)]


def arm(num_groups: int | str, step: int, seed: int) -> Training:
    """A training; the rate is Group Norm's, 0.03, times 2 ** step."""
    lr = 0.03 * 2**step
    norm = {"norm": "in"} if num_groups == "C" else {"norm": "gn", "num_groups": num_groups}
    settings = default_settings(**norm, lr=lr, epochs=EPOCHS, seed=seed, validate=True)
    return Training(f"G = {num_groups}, rate {lr:g}", settings, at_end=final_accuracy)


def load(source: str | None) -> Data:
    return held_out(load_data(source), 128)
