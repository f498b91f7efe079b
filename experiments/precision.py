"""What bf16 costs in accuracy, a table for experiments/README.md: python experiments/precision.py

The published runs of Group Norm, in bf16, beside the same command on a processor where the course trains in fp32.
"""

from pathlib import Path

from normcourse.report import RESULTS, find_records, mean_std

FOLDER = Path(__file__).with_suffix("")
FIGURES = {"train_accuracy": "train accuracy (%)", "test_accuracy": "test accuracy (%)"}


def table() -> str:
    """A row for each precision: mean and standard deviation over the seeds, after the last epoch."""
    lines = [f"| Group Norm in | processor | seeds | {' | '.join(FIGURES.values())} |", "|---|---|--:|--:|--:|"]
    for folder in (RESULTS, FOLDER):
        records = [r for r in find_records(folder).values() if (r["settings"]["net"], r["settings"]["norm"]) == ("normnet", "gn")]
        last = [record["history"][-1] for record in records]
        cells = [records[0]["precision"], records[0]["device"], str(len(records))]
        cells += [mean_std([epoch[key] for epoch in last]) for key in FIGURES]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
