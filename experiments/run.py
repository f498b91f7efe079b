"""Run the recorded experiments: python experiments/run.py [NAME ...] [--list] --data PATH

Trains what has no record yet, and goes on where a training was stopped; what is finished is only
counted. Two at a time, each with one thread, do more than one with two:

  export OMP_NUM_THREADS=1
  for part in 0/2 1/2; do python experiments/run.py --data PATH --part $part & done; wait
"""

import argparse
import importlib
import json

from common import Trial, run_trial

from normcourse import CourseError, load_data

NAMES = ("shared_statistics",)


def main(words: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; or all")
    parser.add_argument("--list", action="store_true", help="say what is there and what is missing")
    parser.add_argument("--data", help="source of images (default: $NORMCOURSE_DATA, else auto)")
    parser.add_argument(
        "--part", default="0/1", metavar="K/N", help="every Nth trial, from the Kth"
    )
    options = parser.parse_args(words)
    names = options.names or NAMES
    if unknown := set(names) - set(NAMES):
        parser.error(f"no experiment {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    try:
        part, parts = map(int, options.part.split("/"))
        range(parts)[part]
    except (ValueError, IndexError):
        parser.error(f"--part is {options.part!r}; K/N with K from 0 to N - 1, e.g. 0/2")
    for name in names:
        if options.list:
            print(told(name))
        else:
            run(name, options.data, part, parts)


def told(name: str) -> str:
    """What is there of an experiment, what it cost and what is missing."""
    seconds, missing = 0.0, []
    trials = list(importlib.import_module(name).trials())
    for trial in trials:
        path = trial.path(name).with_suffix(".json")
        if path.exists():
            seconds += json.loads(path.read_text(encoding="utf-8"))["seconds"]
        else:
            missing.append(path.stem)
    done = len(trials) - len(missing)
    lines = [f"{name}: {done} of {len(trials)} trials, {seconds / 3600:.1f} hours of training"]
    return "\n  missing: ".join([*lines, *missing])


def run(name: str, source: str | None, part: int, parts: int) -> None:
    """Train this part of an experiment's trials."""
    module = importlib.import_module(name)
    data = module.prepare_data(load_data(source))
    for trial in list(module.trials())[part::parts]:
        record = run_trial(name, module.__doc__, trial, data)
        print(f"{name}, {summary(trial, record)}", flush=True)


def summary(trial: Trial, record: dict) -> str:
    """A trial in one line."""
    figures = ", ".join(f"{key} {value:.2f}" for key, value in record["figures"].items())
    return f"{trial.arm}, seed {trial.settings.seed}: {figures or 'diverged'}"


if __name__ == "__main__":
    try:
        main()
    except CourseError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted; the same command goes on after the last epoch") from None
