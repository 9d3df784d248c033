"""Command line: ``python -m fdfa_ext train``, ``experiment``, ``bench``, ``profile`` and ``info``."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from fdfa_ext import build_info
from fdfa_ext.arguments import UserError
from fdfa_ext.bench import command as bench
from fdfa_ext.experiments import command as experiments
from fdfa_ext.memory import is_out_of_memory
from fdfa_ext.train import command as train


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")  # one sentence, without the long usage


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 where something could not be timed, or 2 after a
    sentence on what the user got wrong.
    """
    parser = _Parser(prog="fdfa_ext", description="Forward Direct Feedback Alignment for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    train.add_arguments(
        commands.add_parser(
            "train",
            help="train a net by FDFA or by other methods, and compare",
            description="Train a net and write CSV and plot. The defaults are the paper's Appendix A.",
        )
    )
    experiments.add_arguments(
        commands.add_parser(
            "experiment",
            help="repeat a table or figure of the paper",
            description=experiments.DESCRIPTION,
        )
    )
    bench.add_bench_arguments(
        commands.add_parser(
            "bench",
            help="time whole training steps beside backpropagation's and plain torch's",
            description=bench.BENCH_DESCRIPTION,
        )
    )
    bench.add_profile_arguments(
        commands.add_parser(
            "profile",
            help="time a training step operator by operator, beside the machine's limits",
            description=bench.PROFILE_DESCRIPTION,
        )
    )
    commands.add_parser("info", help="print what this package was built for")
    args = parser.parse_args(arguments)
    try:
        if args.command == "train":
            train.train(vars(args))
        elif args.command == "experiment":
            experiments.experiment(args)
        elif args.command == "bench":
            return bench.bench(args)
        elif args.command == "profile":
            return bench.profile(args)
        else:
            _info()
    except UserError as error:
        print(f"fdfa_ext: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a file or folder that cannot be read or written
        print(f"fdfa_ext: error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            f"fdfa_ext: error: out of memory: {args.command} needs more than there is; take a smaller "
            "net or batch",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _info() -> None:
    facts: dict[str, str] = build_info()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name.ljust(width)}  {value}")


if __name__ == "__main__":
    sys.exit(main())
