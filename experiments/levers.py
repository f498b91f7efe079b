"""The table of what was tried on NormNet, for experiments/README.md: python experiments/levers.py"""

import json
from pathlib import Path

RECORD = json.loads(Path(__file__).with_suffix(".json").read_text())


def table() -> str:
    """A row for each trial: validation accuracy in % after each epoch, of a cycle of five."""
    lines = ["| norm | what | peak lr | 1 | 2 | 3 | 4 | 5 |", "|---|---|--:|--:|--:|--:|--:|--:|"]
    for trial in RECORD["trials"]:
        cells = [f"{accuracy:.1f}" for accuracy in trial["val_accuracy"]]
        cells += ["stopped"] * (trial["of_epochs"] > len(cells))
        cells += [""] * (trial["of_epochs"] - len(cells))
        lines.append(f"| {trial['norm']} | {trial['what']} | {trial['lr']:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
