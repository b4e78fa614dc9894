"""`python -m bench` lists the cases, `python -m bench CASE …` runs some, and `--gpu` is the suite for a GPU.

A case is a module with `name`, `description` and `run(out_dir)`, which returns the path of the file it wrote.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from bench.gpu.budget import BUDGETS, SUITES

CASES = {
    "memory": "bench.cases.memory",
    "training": "bench.cases.training_step",
    "evaluation": "bench.cases.evaluation_pass",
    "precision": "bench.cases.precision",
    "aot": "bench.compile.aot",
}


def _gpu(options: argparse.Namespace) -> int:
    """Run the GPU suites; print the targets, whether the file may be published, and last a table of the suites."""
    from bench.gpu.collect import collect
    from bench.gpu.summary import print_summary
    from bench.verify import problems, refused

    try:
        path = collect(
            options.out,
            budget=options.budget,
            only=options.only,
            dry_run=options.dry_run,
            sanitize=options.sanitize_budget if options.sanitize else None,
        )
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    result = json.loads(path.read_text())
    if not options.dry_run:
        from bench.gpu.goals import print_verdicts

        print_verdicts(result)
    found = problems(result, allow_dirty=True)
    without = "" if found else "".join(f", without {name}" for name in refused(result))
    print(*found[:10], f"wrote {path}: {'not to be published' if found else 'verified'}{without}", sep="\n")
    print_summary(result)
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    """Return the checked options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="cases to run; none lists them")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--gpu", action="store_true", help="run every suite on this GPU into gpu.json")
    seconds = f"seconds of the suites of --gpu and what they compile; without --only {sum(BUDGETS.values()):.0f}"
    parser.add_argument("--budget", type=float, help=seconds)
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"suites of --gpu: {', '.join(SUITES)}")
    parser.add_argument("--sanitize", action="store_true", help="run compute-sanitizer over kernel tests afterwards")
    parser.add_argument("--sanitize-budget", type=float, default=300.0, help="seconds of --sanitize, in all")
    parser.add_argument("--dry-run", action="store_true", help="run --gpu on the CPU in tiny shapes: no result")
    options = parser.parse_args(arguments)
    if unknown := [suite for suite in options.only or () if suite not in SUITES]:
        parser.error(f"no suite {', '.join(unknown)}; there are {', '.join(SUITES)}")
    if unknown := [case for case in options.cases if case not in CASES]:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}, and --gpu")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _options(arguments)
    if options.gpu:
        return _gpu(options)
    for case in options.cases:
        print(f"wrote {importlib.import_module(CASES[case]).run(options.out)}")
    if not options.cases:
        for path in CASES.values():
            module = importlib.import_module(path)
            print(f"{module.name:10} {module.description}")
        print(f"{'--gpu':10} one GPU: {', '.join(SUITES)}; --sanitize adds compute-sanitizer")
    return 0


if __name__ == "__main__":
    sys.exit(main())
