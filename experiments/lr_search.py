"""Search each norm's peak learning rate on the validation split: python experiments/lr_search.py --data PATH

Every norm gets the same trials: 3 epochs, one seed, at 0.015, 0.03 and 0.06, and one more rate beyond the edge as long as the
best lies there. Less than half a point is noise: then the middle rate, 0.03, stays. The records go to
experiments/lr_search; a second call only reads them. No test image is touched.
"""

import argparse
from pathlib import Path

from normcourse import default_settings, fit, load_data
from normcourse.data import Data
from normcourse.norm import NORMS
from normcourse.train import DivergedError

FOLDER = Path(__file__).with_suffix("")
EPOCHS, RATES, FACTOR, NOISE = 3, (0.015, 0.03, 0.06), 2, 0.5  # NOISE in points of accuracy


def choose(accuracy: dict[float, float]) -> float:
    """The rate with the highest validation accuracy, or the middle one where that is not clearly better."""
    best, middle = max(accuracy, key=accuracy.__getitem__), RATES[1]
    return middle if accuracy[best] < accuracy.get(middle, 0) + NOISE else best


def search(norm: str, data: Data) -> float:
    """The chosen rate; the accuracy of each is printed as it is found."""
    accuracy: dict[float, float] = {}
    rates = list(RATES)
    while rates:
        lr = rates.pop(0)
        try:
            record = fit(default_settings(norm=norm, lr=lr, epochs=EPOCHS, validate=True), data, FOLDER)
            accuracy[lr] = record["history"][-1]["val_accuracy"]
        except DivergedError:
            accuracy[lr] = 0.0  # and no record
        print(f"{norm} lr {lr:<7g} validation accuracy {accuracy[lr]:.2f} %", flush=True)
        best = choose(accuracy)
        if not rates and best in (min(accuracy), max(accuracy)):
            rates.append(round(best / FACTOR if best == min(accuracy) else best * FACTOR, 6))
    return best


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="source of the images (default: $NORMCOURSE_DATA, else auto)")
    parser.add_argument("--norm", nargs="+", default=list(NORMS), choices=list(NORMS))
    arguments = parser.parse_args()
    images = load_data(arguments.data)
    for name in arguments.norm:
        print(f"{name}: best {search(name, images):g}", flush=True)
