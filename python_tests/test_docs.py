"""What README and docs/ show: their code runs, and their figures are those of the records."""

import copy
import csv
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdfa_ext import FDFA, FDFALinear
from fdfa_ext.__main__ import main
from fdfa_ext.bench.roofline import CASES, HEAD, parts_of_step, table_lines
from fdfa_ext.experiments.report import mean_and_deviation
from fdfa_ext.experiments.tables import paper_accuracies

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
METHODS = (ROOT / "docs" / "methods.md").read_text()
RESULTS = (ROOT / "docs" / "results.md").read_text()
CUDA = (ROOT / "docs" / "cuda.md").read_text()
RECORDS = ROOT / "docs" / "records"
NETS = {"784-800-10": "mlp-2", "784-800-800-10": "mlp-3", "784-800-800-800-10": "mlp-4", "cnn": "cnn"}


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def images() -> dict[str, Tensor]:
    return {"x": torch.randn(8, 1, 28, 28), "y": torch.randint(10, (8,))}


def test_the_readmes_program_trains_every_weight_and_matrix() -> None:
    (program,) = python_blocks(README)
    begin, step = program.split("\nloss =")
    names: dict[str, Any] = images()
    exec(begin, names)
    model = names["model"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):  # in the first, weights have their gradients from a B that has just begun
        exec("loss =" + step, names)
    unmoved = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    assert not [name for name in unmoved if name.endswith(("weight", "bias", "feedback"))]
    assert len(model.feedback) == 3


def test_the_documented_rule_is_fdfa_and_the_diagnostics_run() -> None:
    rule, diagnostics = python_blocks(METHODS)
    net = nn.Sequential(nn.Flatten(), FDFALinear(784, 8, activation="relu"), nn.Linear(8, 10))
    names: dict[str, Any] = {"net": net, **images()}
    exec(rule, names)
    exec(diagnostics, names)
    documented, fdfa = names["model"], FDFA(copy.deepcopy(net), example_input=names["x"])
    for model in (documented, fdfa):
        model.noise_state.copy_(torch.tensor([7, 0, 0]))
        F.cross_entropy(model(names["x"]), names["y"]).backward()
    for one, other in zip(documented.parameters(), fdfa.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(documented.feedback["1"], fdfa.feedback["1"])


@pytest.mark.parametrize("name", ["table-b6", "table-2"])
@pytest.mark.parametrize("dataset", ["fashion-mnist", "mnist"])
def test_documented_tables_are_what_the_records_beside_them_say(
    name: str, dataset: str, tmp_path: Path
) -> None:
    shutil.copytree(RECORDS, tmp_path / "records")
    which = ["--datasets", dataset, "--seeds", "1"]
    assert main(["experiment", name, *which, "--output", str(tmp_path)]) == 0
    lines = (tmp_path / name / "table.md").read_text().splitlines()
    table = "\n".join(line for line in lines if line.startswith("|"))
    assert table in RESULTS


def final(dataset: str, net: str, method: str, seed: int = 0) -> float:
    """Test accuracy in percent after the last epoch of the run on file."""
    rows = list(csv.DictReader((RECORDS / f"{dataset}-{net}-{method}-seed{seed}.csv").open()))
    return 100 * float(rows[-1]["test_accuracy"])


def test_the_readmes_accuracies_are_those_of_the_records() -> None:
    head = README.index("| data | net | epochs |")
    rows = [re.split(r" *\| *", row)[1:-1] for row in README[head:].split("\n\n")[0].splitlines()[2:]]
    on_file = [row for row in rows if row[0] != "digits"]
    assert len(on_file) == 7
    for data, net, epochs, fdfa, paper, bp, _ in on_file:
        dataset, net = data.lower(), NETS[net]
        assert epochs == "100"
        assert fdfa == f"{final(dataset, net, 'fdfa'):.2f} %"
        assert bp == f"{final(dataset, net, 'bp'):.2f} %"
        mean, deviation = paper_accuracies()[net, "fdfa", dataset]
        assert paper == f"{mean:.2f} ± {deviation:.2f}"


def test_the_documented_means_of_three_seeds_are_those_of_the_records() -> None:
    head = RESULTS.index("| method | three seeds | mean | paper |")
    rows = [re.split(r" *\| *", row)[1:-1] for row in RESULTS[head:].split("\n\n")[0].splitlines()[2:]]
    assert len(rows) == 6
    for method, each, mean, paper in rows:
        accuracies = [final("fashion-mnist", "mlp-2", method, seed) for seed in range(3)]
        assert each == ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
        assert mean == "{:.2f} ± {:.2f}".format(*mean_and_deviation(accuracies))
        assert paper == "{:.2f} ± {:.2f}".format(*paper_accuracies()["mlp-2", method, "fashion-mnist"])


def test_the_documented_roofline_is_what_the_command_prints() -> None:
    table = CUDA[CUDA.index(HEAD) :]
    # Of alexnet, which takes seconds, with one number of outputs.
    checked = [case for case in CASES if (case.model, case.outputs) != ("alexnet", 100)]
    for case in checked:
        assert table_lines(case, parts_of_step(case)) in table
    assert "| alexnet | 100 | whole step |" in table
