"""The tables of what was tried on NormNet, for README.md: python experiments/levers.py"""

import json
from pathlib import Path

RECORD = json.loads(Path(__file__).with_suffix(".json").read_text())
LATER = """\
| norm | what | epochs | parameters | train (%) | validation (%) | validation loss | \
flip-averaged (%) |
|---|---|--:|--:|--:|--:|--:|--:|"""


def table() -> str:
    """The first trials, a row each: validation accuracy in % after each of five epochs."""
    lines = ["| norm | what | peak lr | 1 | 2 | 3 | 4 | 5 |", "|---|---|--:|--:|--:|--:|--:|--:|"]
    for trial in RECORD["trials"]:
        cells = [trial["norm"], trial["what"], f"{trial['lr']:g}"]
        cells += [f"{accuracy:.1f}" for accuracy in trial["val_accuracy"]]
        left = trial["of_epochs"] - len(trial["val_accuracy"])
        if left > 0:
            cells += ["stopped"] + [""] * (left - 1)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def later_table(trials: str) -> str:
    """The trials ``later`` or ``mirrored``, a row each: figures after the last epoch run."""
    lines = [LATER]
    for trial in RECORD[trials]:
        cells = [trial["norm"], trial["what"], *later_cells(trial)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def later_cells(trial: dict) -> list[str]:
    """Epochs, parameters and figures of a trial; of one that was stopped only the accuracy."""
    epochs, reached = trial["of_epochs"], f"{trial['val_accuracy'][-1]:.2f}"
    if trial.get("stopped"):
        return [f"stopped at {len(trial['val_accuracy'])} of {epochs}", "", "", reached, "", ""]
    flip = trial["flip_accuracy"]
    return [
        str(epochs),
        f"{trial['parameters']:,}",
        f"{trial['train_accuracy'][-1]:.2f}",
        reached,
        f"{trial['val_loss']:.4f}",
        "" if flip is None else f"{flip:.2f}",
    ]


if __name__ == "__main__":
    print(table(), later_table("later"), later_table("mirrored"), sep="\n\n")
