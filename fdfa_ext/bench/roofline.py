"""How long the operators of a training step take at best on GPUs that are not at hand.

Bytes and FLOPs of an operator do not depend on the device: they are counted on tensors without data.
The larger of the times that they take by a GPU's data sheet is the operator's roofline. Print the table
of FDFA's steps with ``python -m fdfa_ext.bench.roofline``. With ``--measured FILE`` it has the nets
that ``python -m fdfa_ext profile --device cuda --batch-size 128 --json FILE`` has timed, and their
times. float32 alone.

The time of a launch is not in it, nor noise and other arithmetic outside matrix products, nor what a
kernel reads a second time. Data in a cache, as those of small nets may be, are faster.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fdfa_ext.bench.implementations import Case, training_step
from fdfa_ext.bench.launches import NETS, launches_of, operators_of_cuda
from fdfa_ext.bench.machine import DATA_SHEETS, DataSheet
from fdfa_ext.bench.operators import OperatorCall, Work, record, works
from fdfa_ext.bench.report import table_head, table_line
from fdfa_ext.bench.timing import Spread

BATCH_SIZE = 128
CASES = [Case.of(net, "mnist", BATCH_SIZE, outputs) for outputs in (10, 100) for net in NETS]
_METHOD, _DTYPE = "fdfa", "float32"
_RECORDED = (2, 3)  # samples, from which follows how each size grows with their number

_Key = tuple[Case, str, str]

HEAD = table_head(
    ["net", "outputs", "operator", "calls", "MB", "GFLOP", "launches"]
    + [cell for sheet in DATA_SHEETS for cell in (f"{sheet.name}, µs", "bound by")]
    + ["measured, µs", "of roofline"]
)


@dataclass(frozen=True)
class Part:
    """Equal calls of one operator in a step, or of the pass within them that is not the products."""

    work: Work  # of one call
    shapes: str
    calls: int
    launches: int | None  # of one call; those of a pass count with its operator

    @property
    def is_ours(self) -> bool:
        return self.work.name.startswith("fdfa::")


@dataclass
class Measured:
    """What ``profile`` timed of whole steps, by case, operator and shapes."""

    machine: str
    sheet: DataSheet | None = None  # of the GPU
    calls: Counter[_Key] = field(default_factory=Counter)
    seconds: dict[_Key, float] = field(default_factory=dict)

    @staticmethod
    def of(file: Path) -> "Measured":
        """
        Raises:
            KeyError, ValueError: the file is not what ``profile --json`` writes of FDFA in float32.
        """
        content = json.loads(file.read_text())
        measured = Measured(content["machine"])
        for row in content["rows"]:
            if (row["method"], row["dtype"]) != (_METHOD, _DTYPE):
                raise ValueError(f"figures of {row['method']} in {row['dtype']}")
            gpu = row["hardware"].split(",")[0]
            measured.sheet = next((sheet for sheet in DATA_SHEETS if sheet.device == gpu), None)
            key = (Case(**row["case"]), row["name"], row["shapes"])
            seconds = row["calls"] * Spread(*row["ms"]).median / 1e3
            measured.calls[key] += row["calls"]
            measured.seconds[key] = measured.seconds.get(key, 0.0) + seconds
        return measured

    @property
    def cases(self) -> set[Case]:
        return {case for case, _, _ in self.calls}

    def total(self, case: Case, parts: Iterable[Part]) -> float | None:
        """Seconds that they take in a step, where every call of them was timed."""
        calls: Counter[_Key] = Counter()
        for part in parts:
            calls[case, part.work.name, part.shapes] += part.calls
        if any(self.calls[key] != n for key, n in calls.items()):
            return None
        return sum(self.seconds[key] for key in calls)


def calls_of_step(case: Case) -> list[OperatorCall]:
    """The operators of FDFA's step, with arguments that have shapes and no data."""
    few, more = (_recorded(replace(case, batch_size=n)) for n in _RECORDED)

    def extrapolate(a: Any, b: Any) -> Any:
        if isinstance(a, Tensor):
            sizes = map(extrapolate, a.shape, b.shape)
            outermost_first = sorted(range(a.dim()), key=a.stride, reverse=True)
            return torch.empty_permuted(list(sizes), outermost_first, dtype=a.dtype, device="meta")
        if type(a) is int:
            first, second = _RECORDED
            return a + (case.batch_size - first) * (b - a) // (second - first)
        return a

    calls = []
    for a, b in zip(few, more, strict=True):
        args, kwargs = tree_map(extrapolate, (a.args, a.kwargs), (b.args, b.kwargs))
        calls.append(OperatorCall(a.operator, args, kwargs, a.calls))
    return calls


def _recorded(case: Case) -> list[OperatorCall]:
    with operators_of_cuda():
        step = training_step(case, _METHOD, torch.device("cpu"), _DTYPE).run
        return record(step, "meta")


def parts_of_step(case: Case) -> list[Part]:
    """What moves bytes in FDFA's step."""
    return [part for call in calls_of_step(case) for part in _parts(call)]


def _parts(call: OperatorCall) -> Iterator[Part]:
    launches = launches_of(call.operator, call.args, call.kwargs)
    if launches:
        whole, *passes = works(call)
        yield Part(whole, call.shapes, call.calls, launches)
        yield from (Part(work, call.shapes, call.calls, None) for work in passes)


def table_lines(case: Case, parts: Sequence[Part], measured: Measured | None = None) -> str:
    """One case's lines of the table: each of this package's operators with all its calls, and sums."""
    rows: dict[str, list[Part]] = {}
    for part in parts:
        if part.is_ours:
            rows.setdefault(part.work.name, []).append(part)
    whole = [part for part in parts if part.launches is not None]
    rows["fdfa's operators"] = [part for part in whole if part.is_ours]
    rows["torch's operators"] = [part for part in whole if not part.is_ours]
    rows["whole step"] = whole
    return "\n".join(
        table_line([case.net, case.outputs, name, *_cells(case, row, measured)])
        for name, row in rows.items()
    )


def _cells(case: Case, parts: Sequence[Part], measured: Measured | None) -> list[str]:
    def total(amount: Callable[[Part], Any]) -> Any:
        return sum(part.calls * amount(part) for part in parts)

    is_pass = any(part.launches is None for part in parts)
    launches = "" if is_pass else str(total(lambda part: part.launches))
    n_bytes, n_flops = total(lambda part: part.work.n_bytes), total(lambda part: part.work.n_flops)
    cells = [str(total(lambda _: 1)), f"{n_bytes / 1e6:.2f}", f"{n_flops / 1e9:.3f}", launches]
    for sheet in DATA_SHEETS:
        roofs = [(part.calls, *part.work.roof(sheet.limits)) for part in parts]
        cells.append(f"{1e6 * sum(calls * seconds for calls, seconds, _ in roofs):.1f}")
        cells.append(" and ".join(sorted({bound for *_, bound in roofs})))
    seconds = measured.total(case, parts) if measured else None
    if not measured or seconds is None:
        return [*cells, "", ""]
    share = ""
    if measured.sheet:
        limits = measured.sheet.limits
        share = f"{total(lambda part: part.work.roof(limits)[0]) / seconds:.0%}"
    return [*cells, f"{1e6 * seconds:.1f}", share]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fdfa_ext.bench.roofline")
    parser.add_argument(
        "--measured",
        type=Path,
        metavar="FILE",
        help=f"what profile --device cuda --batch-size {BATCH_SIZE} --json FILE wrote",
    )
    file = parser.parse_args(arguments).measured
    try:
        measured = Measured.of(file) if file else None
    except (OSError, KeyError, ValueError) as error:
        parser.error(f"--measured needs what profile writes of FDFA in float32; {file}: {error!r}")
    title = measured.machine if measured else "reckoned"
    print(f"{title}; {_METHOD}, {_DTYPE}, batch {BATCH_SIZE}", "", HEAD, sep="\n", flush=True)
    for case in CASES:
        if measured is None or case in measured.cases:
            print(table_lines(case, parts_of_step(case), measured), flush=True)


if __name__ == "__main__":
    main()
