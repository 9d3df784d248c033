"""The paper's figures come out with the slopes of its theory, on a data set that is at hand."""

from pathlib import Path

import pytest

from fdfa_ext.__main__ import main
from fdfa_ext.experiments.variance import FIGURES


@pytest.mark.parametrize("figure", FIGURES)
def test_variances_grow_as_the_propositions_say(figure: str, tmp_path: Path, capsys) -> None:
    flags = ["--dataset", "digits", "--quick", "--output", str(tmp_path)]
    assert main(["experiment", figure, *flags]) == 0
    lines = (tmp_path / "table.md").read_text().splitlines()[2:]
    assert lines
    for line in lines:
        found, theory = (float(cell) for cell in line.split("|")[2:4])
        assert found == pytest.approx(theory, abs=0.25)  # of a few images and draws
    assert lines[0] in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"points.csv", "figure.png", "table.md"}
