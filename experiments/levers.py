"""The tables of what was tried on NormNet, for experiments/README.md: python experiments/levers.py"""

import json
from pathlib import Path

RECORD = json.loads(Path(__file__).with_suffix(".json").read_text())


def table() -> str:
    """The first trials, a row each: validation accuracy in % after each epoch, of a cycle of five."""
    lines = ["| norm | what | peak lr | 1 | 2 | 3 | 4 | 5 |", "|---|---|--:|--:|--:|--:|--:|--:|"]
    for trial in RECORD["trials"]:
        cells = [f"{accuracy:.1f}" for accuracy in trial["val_accuracy"]]
        cells += ["stopped"] * (trial["of_epochs"] > len(cells))
        cells += [""] * (trial["of_epochs"] - len(cells))
        lines.append(f"| {trial['norm']} | {trial['what']} | {trial['lr']:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def later_table(trials: str) -> str:
    """The trials that followed, ``later`` or ``mirrored``, a row each: figures after the last epoch, or before a stop."""
    lines = [
        "| norm | what | epochs | parameters | train (%) | validation (%) | validation loss | flip-averaged (%) |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for trial in RECORD[trials]:
        last, epochs = trial["val_accuracy"][-1], trial["of_epochs"]
        if trial.get("stopped"):
            cells = [f"stopped at {len(trial['val_accuracy'])} of {epochs}", "", "", f"{last:.2f}", "", ""]
        else:
            cells = [str(epochs), f"{trial['parameters']:,}", f"{trial['train_accuracy'][-1]:.2f}", f"{last:.2f}"]
            flip = trial["flip_accuracy"]
            cells += [f"{trial['val_loss']:.4f}", "" if flip is None else f"{flip:.2f}"]
        lines.append(f"| {trial['norm']} | {trial['what']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), later_table("later"), later_table("mirrored"), sep="\n\n")
