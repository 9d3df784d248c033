"""The roofline of a training step, reckoned without a GPU."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fdfa_ext.__main__ import main
from fdfa_ext.bench import roofline
from fdfa_ext.bench.implementations import Case, training_step
from fdfa_ext.bench.launches import launch_counts, operators_of_cuda
from fdfa_ext.bench.machine import DATA_SHEETS
from fdfa_ext.bench.operators import record, works
from fdfa_ext.bench.roofline import HEAD, calls_of_step, parts_of_step, table_lines
from fdfa_ext.bench.timing import Spread

MLP2 = Case.of("mlp2", "mnist", 128, 10)


@pytest.mark.parametrize("net", ["mlp2", "cnn"])
def test_extrapolated_calls_are_those_of_a_step_of_that_size(net: str) -> None:
    case = Case.of(net, "mnist", 7, 10)
    with operators_of_cuda():
        calls = record(training_step(case, "fdfa", torch.device("cpu"), "float32").run)
    extrapolated = calls_of_step(case)
    assert [call.shapes for call in extrapolated] == [call.shapes for call in calls]
    assert [call.calls for call in extrapolated] == [call.calls for call in calls]
    assert [works(call) for call in extrapolated] == [works(call) for call in calls]


@pytest.mark.parametrize("net", ["mlp4", "cnn"])
def test_the_parts_of_a_step_launch_what_the_step_launches(net: str) -> None:
    parts = parts_of_step(Case.of(net, "mnist", 128, 10))
    launched = sum(part.calls * part.launches for part in parts if part.launches is not None)
    assert launched == launch_counts(net)["fdfa"].total()


def table(text: str) -> dict[str, dict[str, str]]:
    """Its lines by operator, each a cell by its column; of columns with one title the last."""
    columns, _, *rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line[:1] == "|"
    ]
    return {row[2]: dict(zip(columns, row, strict=True)) for row in rows}


def test_times_are_those_of_the_data_sheets() -> None:
    n, k, d = 128, 100, 800
    rows = table(
        f"{HEAD}\n{table_lines(replace(MLP2, outputs=k), parts_of_step(replace(MLP2, outputs=k)))}"
    )
    row = rows["fdfa::linear"]  # 800 x 784 products of one operand, in float32
    assert row["H100 SXM, µs"] == row["H200 SXM, µs"] == f"{2 * n * 784 * d / 67e6:.1f}"
    assert row["bound by"] == "products"
    row = rows["fdfa::linear less its products"]
    assert row["H100 SXM, µs"] == f"{12 * n * d / 3.35e6:.1f}"  # z read, y and ty written
    row = rows["fdfa::feedback_step"]
    n_bytes = 24 * k * d + 8 * n * (d + k) + 4 * d
    assert (row["calls"], row["launches"]) == ("1", "1")
    assert row["H100 SXM, µs"] == f"{n_bytes / 3.35e6:.1f}"
    assert row["H200 SXM, µs"] == f"{n_bytes / 4.8e6:.1f}"
    assert row["bound by"] == "bytes"
    assert float(row["GFLOP"]) == round(4 * n * k * d / 1e9, 3)
    for column in ("calls", "launches"):
        ours, others, whole = (
            int(rows[name][column]) for name in ("fdfa's operators", "torch's operators", "whole step")
        )
        assert ours == sum(
            int(row[column])
            for name, row in rows.items()
            if name.startswith("fdfa::") and "less" not in name
        )
        assert whole == ours + others


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `profile` writes of one net, as if an H200 had been there."""
    file = tmp_path_factory.mktemp("profile") / "profile.json"
    flags = ["--model", "mlp2", "--batch-size", "128", "--only-fdfa", "--json", str(file)]
    with pytest.MonkeyPatch.context() as patch, operators_of_cuda():
        patch.setattr("fdfa_ext.bench.operators._SECONDS", 0.001)
        patch.setattr("fdfa_ext.bench.command._STEP_SECONDS", 0.001)
        assert main(["profile", *flags]) == 0
    change(file, hardware="NVIDIA H200, some processor")
    return file.read_text()


@pytest.fixture
def figures(profiled: str, tmp_path: Path) -> Path:
    """A file of its own for each test, to change."""
    file = tmp_path / "profile.json"
    file.write_text(profiled)
    return file


def change(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text())
    for row in content["rows"]:
        row.update(values)
    file.write_text(json.dumps(content))


def test_measured_times_stand_beside_the_reckoned_ones(figures: Path, capsys) -> None:
    content = json.loads(figures.read_text())
    capsys.readouterr()
    roofline.main(["--measured", str(figures)])
    out = capsys.readouterr().out
    assert out.startswith(content["machine"])
    rows = table(out)
    assert {row["net"] for row in rows.values()} == {"784-800-10"}

    limits = DATA_SHEETS[1].limits
    parts = [part for part in parts_of_step(MLP2) if part.work.name == "fdfa::mm"]
    least = sum(part.calls * part.work.roof(limits)[0] for part in parts)
    timed = [row for row in content["rows"] if row["name"] == "fdfa::mm"]
    seconds = sum(row["calls"] * Spread(*row["ms"]).median for row in timed) / 1e3
    assert len(timed) == 3
    assert rows["fdfa::mm"]["measured, µs"] == f"{1e6 * seconds:.1f}"
    assert rows["fdfa::mm"]["of roofline"] == f"{least / seconds:.0%}"
    assert rows["fdfa's operators"]["measured, µs"]
    assert rows["whole step"]["measured, µs"] == ""  # for torch's operators were not timed


def test_what_was_not_timed_as_a_whole_has_no_time(figures: Path, capsys) -> None:
    content = json.loads(figures.read_text())
    content["rows"].remove(next(row for row in content["rows"] if row["name"] == "fdfa::mm"))
    figures.write_text(json.dumps(content))
    change(figures, hardware="NVIDIA A100")
    capsys.readouterr()
    roofline.main(["--measured", str(figures)])
    rows = table(capsys.readouterr().out)
    assert rows["fdfa::mm"]["measured, µs"] == rows["fdfa's operators"]["measured, µs"] == ""
    assert rows["fdfa::feedback_step"]["measured, µs"]
    assert rows["fdfa::feedback_step"]["of roofline"] == ""  # an A100's data sheet is not here


@pytest.mark.parametrize("values", [{"dtype": "bfloat16"}, {"method": "dfa"}, {"name": None}])
def test_figures_of_anything_else_are_refused(figures: Path, capsys, values: dict[str, Any]) -> None:
    change(figures, **values)
    if "name" in values:
        figures.write_text(figures.read_text().replace('"name"', '"other"'))
    with pytest.raises(SystemExit):
        roofline.main(["--measured", str(figures)])
    assert "--measured needs what profile writes of FDFA in float32" in capsys.readouterr().err
