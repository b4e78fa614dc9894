"""`python -m bench` lists the cases, `python -m bench CASE …` runs some and writes their results.

A case is a module with `name`, `description` and `run(out_dir) -> path of what it wrote`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

CASES = ("memory", "aot")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="cases to run; none lists them")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    options = parser.parse_args(arguments)
    unknown = [case for case in options.cases if case not in CASES]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    for case in options.cases or CASES:
        module = importlib.import_module(f"bench.{case}")
        if options.cases:
            print(f"wrote {module.run(options.out)}")
        else:
            print(f"{module.name:10} {module.description}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
