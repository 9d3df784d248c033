"""All fuzzers beside each other: ``python -m fuzz [--minutes 3] [--seed 0]``, in this folder's parent.

A minute is a number of cases, so that a seed draws the same ones everywhere. Each finding is printed with the seed and the case that repeat it, and makes the exit code 1.
"""

import argparse
import subprocess
import sys

CASES = {"nets": 150, "operators": 5000, "files": 3000}  # of a minute, on two cores


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    flags = ["--seed", str(arguments.seed)]
    running = {
        name: subprocess.Popen(
            [sys.executable, "-m", f"fuzz.{name}", *flags, "--cases", str(arguments.minutes * cases)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, cases in CASES.items()
    }
    for name, process in running.items():
        print(f"=== {name}, seed {arguments.seed}", process.communicate()[0], sep="\n", flush=True)
    return int(any(process.returncode for process in running.values()))


if __name__ == "__main__":
    sys.exit(main())
