"""Search each norm's peak learning rate: python experiments/lr_search.py

Every norm gets the same trials on the validation split: 3 epochs, one seed, at 0.015, 0.03 and
0.06, and one more rate beyond the edge as long as the best lies there. Less than half a point is
noise: then the middle rate, 0.03, stays. The records go to experiments/lr_search; a second call
only reads them. No test image is touched. $NORMCOURSE_DATA names another source of the
images than CIFAR-10.
"""

from pathlib import Path

from normcourse import default_settings, fit, load_data
from normcourse.data import Data
from normcourse.errors import DivergedError
from normcourse.norm import NORMS

FOLDER = Path(__file__).with_suffix("")
EPOCHS, RATES, FACTOR = 3, (0.015, 0.03, 0.06), 2
NOISE = 0.5  # in points of accuracy


def choose(accuracy: dict[float, float]) -> float:
    """The rate with the highest accuracy, or the middle one if that is not clearly lower."""
    best, middle = max(accuracy, key=accuracy.__getitem__), RATES[1]
    return middle if accuracy[best] < accuracy.get(middle, 0) + NOISE else best


def search(norm: str, data: Data) -> float:
    """The chosen rate; the accuracy of each is printed as it is found."""
    accuracy: dict[float, float] = {}
    rates = list(RATES)
    while rates:
        lr = rates.pop(0)
        accuracy[lr] = reached(norm, lr, data)
        print(f"{norm} lr {lr:<7g} validation accuracy {accuracy[lr]:.2f} %", flush=True)
        best = choose(accuracy)
        if not rates and best == min(accuracy):
            rates.append(round(best / FACTOR, 6))
        elif not rates and best == max(accuracy):
            rates.append(round(best * FACTOR, 6))
    return best


def reached(norm: str, lr: float, data: Data) -> float:
    """The validation accuracy of a trial, in %; of one that diverged 0, and there is no record."""
    settings = default_settings(norm=norm, lr=lr, epochs=EPOCHS, validate=True)
    try:
        return fit(settings, data, FOLDER)["history"][-1]["val_accuracy"]
    except DivergedError:
        return 0.0


if __name__ == "__main__":
    images = load_data()
    for name in NORMS:
        print(f"{name}: best {search(name, images):g}", flush=True)
