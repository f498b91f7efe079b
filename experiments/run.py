"""Run the recorded experiments: python experiments/run.py [NAME ...] [--list] --data PATH

Trains what has no record yet, goes on where a training was stopped, and says at the end what is
there. Start it twice: each process takes the next trial that no other has, and two with one thread
each do more than one with two:

  export OMP_NUM_THREADS=1
  for process in 1 2; do python experiments/run.py --data PATH & done; wait
"""

import argparse
import importlib
import json
import time
from types import ModuleType

from common import claimed, made_here, missing, record_path, run_trial

from normcourse import CourseError
from normcourse.results import Record

NAMES = (
    "shared_statistics",
    "main_table",
    "published_designs",
    "transformer",
    "groups",
    "larger_rates",
    "rates_by_norm",
    "layer_norm_axes",
    "sequences",
    "instance_norm",
)


def main(words: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; or all")
    parser.add_argument("--list", action="store_true", help="say what is there and what is missing")
    parser.add_argument("--data", help="source of images (default: $NORMCOURSE_DATA, else auto)")
    options = parser.parse_args(words)
    names = options.names or NAMES
    if unknown := set(names) - set(NAMES):
        parser.error(f"no experiment {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    modules = {name: importlib.import_module(name) for name in names}
    wanted = [] if options.list else names
    while left := [name for name in wanted if missing(name, modules[name].trials())]:
        if not any([run(name, modules[name], options.data) for name in left]):
            time.sleep(5)  # other processes are at work on the last ones
    print("\n".join(told(name, module) for name, module in modules.items()))


def told(name: str, module: ModuleType) -> str:
    """What is there of an experiment, what it cost and what is missing."""
    trials = list(module.trials())
    left = missing(name, trials)
    done = [record_path(name, trial) for trial in trials if trial not in left]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in done]
    hours = sum(record["seconds"] for record in records) / 3600
    where = "".join(f" ({device})" for device in sorted({record["device"] for record in records}))
    lines = [f"{name}: {len(done)} of {len(trials)} trials, {hours:.1f} hours of training{where}"]
    return "\n  missing: ".join([*lines, *(f"{trial.arm}, seed {trial.seed}" for trial in left)])


def run(name: str, module: ModuleType, source: str | None) -> bool:
    """Train what is missing of an experiment and no other process has taken; whether any was."""
    data, count, before = None, 0, -1
    while count > before:  # a record can make more trials known
        before = count
        for trial in missing(name, module.trials()):
            with claimed(record_path(name, trial)) as mine:
                if mine and not made_here(record_path(name, trial)):
                    data = data or module.load(source)
                    record = run_trial(name, module.__doc__, trial, data)
                    print(f"{name}, {summary(record)}", flush=True)
                    count += 1
    return count > 0


def summary(record: Record) -> str:
    """A trial in one line."""
    figures = ", ".join(f"{key} {value:.4g}" for key, value in record["figures"].items())
    return f"{record['arm']}, seed {record['settings']['seed']}: {figures or 'diverged'}"


if __name__ == "__main__":
    try:
        main()
    except CourseError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted; the same command goes on after the last epoch") from None
