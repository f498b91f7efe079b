"""What bf16 costs in accuracy, a table for experiments/README.md: python experiments/precision.py

The published runs of Group Norm, in bf16, beside the same command on a processor where the course
trains in fp32.
"""

from pathlib import Path

from normcourse.engine.record import find_records
from normcourse.results import RESULTS, Record, mean_std

FOLDER = Path(__file__).with_suffix("")
HEADER = """\
| Group Norm in | processor | seeds | train accuracy (%) | test accuracy (%) |
|---|---|--:|--:|--:|"""


def table() -> str:
    """A row for each precision: mean and deviation over the seeds, after the last epoch."""
    return "\n".join([HEADER, row(RESULTS), row(FOLDER)])


def row(folder: Path) -> str:
    """The runs of NormNet with Group Norm in a folder."""
    records = [record for record in find_records(folder).values() if is_group_norm(record)]
    last = [record["history"][-1] for record in records]
    train = mean_std([epoch["train_accuracy"] for epoch in last])
    test = mean_std([epoch["test_accuracy"] for epoch in last])
    precision, device = records[0]["precision"], records[0]["device"]
    return f"| {precision} | {device} | {len(records)} | {train} | {test} |"


def is_group_norm(record: Record) -> bool:
    """Whether a run is one of NormNet with Group Norm."""
    settings = record["settings"]
    return (settings["net"], settings["norm"]) == ("normnet", "gn")


if __name__ == "__main__":
    print(table())
