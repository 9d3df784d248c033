"""What README, docs/ and examples/ show: their code runs, and their figures are those of the records."""

import ast
import copy
import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import slow_but
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fdfa_ext
from fdfa_ext import FDFA, FDFALinear, jvp
from fdfa_ext.__main__ import main
from fdfa_ext.bench.implementations import Case
from fdfa_ext.bench.roofline import CASES, HEAD, parts_of_step, table_lines
from fdfa_ext.experiments.report import mean_and_deviation
from fdfa_ext.experiments.runs import read_record
from fdfa_ext.experiments.tables import paper_accuracies
from fdfa_ext.train.models import build_net

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
GUIDE, TROUBLESHOOTING, METHODS, EXTENDING, RESULTS, PERFORMANCE, CUDA = (
    (DOCS / f"{name}.md").read_text()
    for name in ("guide", "troubleshooting", "methods", "extending", "results", "performance", "cuda")
)
RECORDS = DOCS / "records"
EXAMPLES = ROOT / "examples"
PACKAGE = Path(fdfa_ext.__file__).parent
NETS = {"784-800-10": "mlp-2", "784-800-800-10": "mlp-3", "784-800-800-800-10": "mlp-4", "cnn": "cnn"}


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def table(text: str, first_columns: str) -> list[dict[str, str]]:
    """The rows, by column, of the table that begins with these columns."""
    lines = text[text.index(first_columns) :].split("\n\n")[0].splitlines()
    columns, _, *rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    return [dict(zip(columns, row, strict=True)) for row in rows]


def python(*arguments: str | Path, folder: Path, stdin: str | None = None) -> str:
    """What a fresh interpreter prints, without a word of errors."""
    run = subprocess.run(
        [sys.executable, *arguments],
        input=stdin,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Error" not in run.stderr, run.stderr
    return run.stdout


def images() -> dict[str, Tensor]:
    return {"x": torch.randn(8, 1, 28, 28), "y": torch.randint(10, (8,))}


def dense_net() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), FDFALinear(784, 8, activation="relu"), nn.Linear(8, 10))


def run(program: str) -> dict[str, Any]:
    """A program of docs/extending.md, with the names that it uses."""
    names: dict[str, Any] = {"net": dense_net(), **images()}
    exec(program, names)
    return names


def test_the_readmes_program_runs_as_it_is_pasted(tmp_path: Path) -> None:
    (program,) = python_blocks(README)
    printed = python("-i", "-q", folder=tmp_path, stdin=program)  # line by line, as at a prompt
    accuracy = re.search(r"test accuracy: ([\d.]+)%", printed)
    assert accuracy is not None, printed
    assert float(accuracy[1]) > 90  # ten classes
    assert not list(tmp_path.iterdir())


def accuracies_in(printed: str) -> list[float]:
    return [float(figure) for figure in re.findall(r"test accuracy ([\d.]+)%", printed)]


@pytest.mark.slow
def test_the_example_of_images_learns(tmp_path: Path) -> None:
    first, *_, last = accuracies_in(python(EXAMPLES / "images.py", folder=tmp_path))
    assert first + 10 < last
    assert last > 90


@pytest.mark.slow
def test_the_example_of_a_forward_of_its_own_learns_its_feedback(tmp_path: Path) -> None:
    printed = python(EXAMPLES / "own_forward.py", folder=tmp_path)
    angles = [int(angle) for angle in re.findall(r": (\d+) degrees", printed)]
    assert len(angles) == 4
    assert max(angles) < 30  # of a random B about 90
    assert accuracies_in(printed)[0] > 90


@pytest.mark.slow
def test_the_example_of_a_model_without_blocks_learns(tmp_path: Path) -> None:
    printed = python(EXAMPLES / "any_model.py", folder=tmp_path)
    assert re.findall(r"^(stem\.1|blocks\.0|blocks\.2|head) ", printed, re.MULTILINE)
    assert accuracies_in(printed)[0] > 90


@pytest.mark.slow
def test_the_example_of_a_language_model_comes_close_to_backpropagation(tmp_path: Path) -> None:
    printed = python(EXAMPLES / "language_model.py", folder=tmp_path)
    head, exact, own = (float(loss) for loss in re.findall(r"loss on other text ([\d.]+)", printed))
    assert exact < own < (head + exact) / 2


@pytest.mark.slow
def test_the_example_of_stages_learns(tmp_path: Path) -> None:
    launch = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    printed = python(*launch, EXAMPLES / "stages.py", folder=tmp_path)
    assert accuracies_in(printed)[0] > 85


@pytest.mark.slow
def test_the_example_of_a_rule_learns_by_each_method(tmp_path: Path) -> None:
    printed = python(EXAMPLES / "own_rule.py", folder=tmp_path)
    dfa, own, exact = accuracies_in(printed)
    assert min(dfa, own, exact) > 70
    assert own != dfa


def test_the_guides_penalty_reaches_its_block() -> None:
    (program,) = (block for block in python_blocks(GUIDE) if "class Sparse(" in block)
    names: dict[str, Any] = {
        "nn": nn,
        "FDFA": FDFA,
        "FDFALinear": FDFALinear,
        "inputs": torch.randn(8, 64),
        "targets": torch.randint(10, (8,)),
    }
    exec(program, names)
    hidden = names["sparse"].hidden
    with_both = hidden.weight.grad.clone()
    (alone,) = torch.autograd.grad(
        0.1 * torch.relu(hidden.plain(names["inputs"])).mean(), hidden.weight
    )
    # B is zero but for its first step, which is far smaller than the penalty.
    torch.testing.assert_close(with_both, alone, rtol=0.2, atol=0.2 * float(alone.abs().max()))


def test_the_guides_program_trains_every_weight_and_matrix() -> None:
    program = next(block for block in python_blocks(GUIDE) if "loss.backward()" in block)
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


@pytest.mark.parametrize(("name", "method"), [("ForwardFeedback", "fdfa"), ("KolenPollack", "dkp")])
def test_a_documented_rule_is_the_method(name: str, method: str) -> None:
    (program,) = (block for block in python_blocks(EXTENDING) if f"class {name}(" in block)
    names = run(program)
    documented = names["model"]
    model = FDFA(copy.deepcopy(names["net"]), method=method, example_input=names["x"])
    for each in (documented, model):
        each.noise_state.copy_(torch.tensor([7, 0, 0]))
        each.feedback_lr = 0.1  # so that B is of a size where its decay counts
        for _ in range(3):
            each.zero_grad()
            F.cross_entropy(each(names["x"]), names["y"]).backward()
    for one, other in zip(documented.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(documented.feedback["1"], model.feedback["1"])


def test_the_documented_sign_of_the_error_reaches_the_block() -> None:
    (program,) = (block for block in python_blocks(EXTENDING) if "class ErrorSign(" in block)
    names = run(program)
    model, net, x, y = (names[name] for name in ("model", "net", "x", "y"))
    feedback = model.feedback["1"].clone()
    output = model(x)
    F.cross_entropy(output, y).backward()
    error = (output.detach().softmax(1) - F.one_hot(y, 10)) / len(x)
    delta = error.sign() / len(x) @ feedback * (net[1](x.flatten(1)) > 0)
    torch.testing.assert_close(net[1].weight.grad, delta.t() @ x.flatten(1), rtol=1e-4, atol=1e-6)
    assert torch.equal(model.feedback["1"], feedback)


def test_the_documented_start_of_dfa_is_orthogonal() -> None:
    (program,) = (block for block in python_blocks(EXTENDING) if "orthogonal_" in block)
    feedback = run(program)["model"].feedback["1"]  # [10, 8]
    torch.testing.assert_close(feedback.t() @ feedback, torch.eye(8))


def test_the_documented_module_of_ones_own_is_trained() -> None:
    (program,) = (block for block in python_blocks(EXTENDING) if "class Gated(" in block)
    names = run(program)
    model = names["model"]
    F.cross_entropy(model(names["x"]), names["y"]).backward()
    assert len(model.feedback) == 2
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_the_documented_joint_regression_learns_the_mean_jacobian() -> None:
    """Of a linear net, whose Jacobians are products of its weights, and better than FDFA does."""
    (program,) = (block for block in python_blocks(EXTENDING) if "class JointRegression(" in block)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), FDFALinear(784, 8), FDFALinear(8, 8), nn.Linear(8, 10))
    names = images() | {"net": net}
    exec(program, names)
    joint = names["model"]
    separate = FDFA(copy.deepcopy(net), feedback="ema", feedback_lr=1e-2, example_input=names["x"])
    jacobian = net[3].weight.detach() @ net[2].weight.detach()
    distances = []
    for model in (joint, separate):
        for _ in range(1000):
            model(names["x"]).sum().backward()
        distances.append((model.feedback["1"] - jacobian).norm() / jacobian.norm())
    assert distances[0] < 0.05
    assert distances[0] < distances[1] / 2


def test_the_documented_momentum_is_that_of_torch() -> None:
    (program,) = (block for block in python_blocks(EXTENDING) if "class Momentum(" in block)
    names = run(program)
    model = names["model"]
    twin = FDFA(copy.deepcopy(names["net"]), feedback="grad", example_input=names["x"])
    optimizer = torch.optim.SGD(twin.feedback_parameters(), lr=1e-2, momentum=0.9)
    twin.noise_state.copy_(model.noise_state)
    for _ in range(4):
        for each in (model, twin):
            F.cross_entropy(each(names["x"]), names["y"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(model.feedback["1"], twin.feedback["1"].detach())


def test_the_documented_jvp_rule_is_right() -> None:
    (program,) = (block for block in python_blocks(EXTENDING) if "class Scale(" in block)
    names = images()
    try:
        exec(program, names)
        model = FDFA(names["net"], feedback="ema", feedback_lr=0.5, example_input=names["x"])
        by_forward_mode = copy.deepcopy(model)
        model(names["x"]).sum().backward()
    finally:
        del jvp.MODULE_RULES[names["Scale"]]
        jvp._REGISTERED.discard(names["Scale"])
    by_forward_mode(names["x"]).sum().backward()
    assert model.feedback["1"].any()
    torch.testing.assert_close(model.feedback["1"], by_forward_mode.feedback["1"])


def test_the_documented_diagnostics_run() -> None:
    names = run("")
    (diagnostics,) = python_blocks(METHODS)
    exec(diagnostics, names | {"model": FDFA(names["net"], example_input=names["x"])})


def test_links_lead_somewhere() -> None:
    for page in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *DOCS.glob("*.md"),
    ):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def words(node: ast.expr, names: dict[str, str]) -> str:
    """The fixed words of a string, with … for each value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(words(part, names) for part in node.values)
    if isinstance(node, ast.BinOp):
        return words(node.left, names) + words(node.right, names)
    return names.get(node.id, "…") if isinstance(node, ast.Name) else "…"


def messages() -> Iterator[tuple[str, str]]:
    """File and first clause of each error and warning that a user of the layers may meet."""
    commands = ("__main__.py", "arguments.py")  # their messages are for the command line
    for path in sorted(PACKAGE.glob("*.py")):
        if path.name in commands:
            continue
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {
            node.targets[0].id: words(node.value, {})
            for node in nodes
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        for node in nodes:
            if not isinstance(node, ast.Call) or not node.args:
                continue
            text = words(node.args[0], names)
            if ast.unparse(node.func).endswith(("Error", "warn")) or text.startswith("FDFA: "):
                yield path.name, text
    for path in sorted((ROOT / "csrc").rglob("*.cpp")):
        for text in re.findall(r'"(FDFA: [^"]+)"', path.read_text()):
            yield path.name, text


def test_troubleshooting_has_each_message() -> None:
    documented = " ".join(TROUBLESHOOTING.split())
    found = {(file, re.split(r"[;.?] ", re.sub("…+", "…", text))[0]) for file, text in messages()}
    assert len(found) > 50
    missing = [f"{file}: {clause}" for file, clause in sorted(found) if f"`{clause}" not in documented]
    assert not missing, "docs/troubleshooting.md lacks\n" + "\n".join(missing)


def scaling() -> Any:
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "scripts" / "scaling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module  # which dataclasses look themselves up in
    spec.loader.exec_module(module)
    return module


def test_the_page_on_scaling_has_the_tables_of_its_script() -> None:
    page = (DOCS / "scaling.md").read_text()
    assert scaling().written(page) == page


@pytest.mark.parametrize("which", [1, 2])
def test_the_page_on_scaling_counts_the_operations_that_torch_counts(which: int) -> None:
    """Of a dense net and a convolutional one, forward and backward."""
    on_paper = scaling().NETS[which]
    name, shape, hidden = [("mlp", (1, 28, 28), 3), ("cnn-unnormalised", (1, 28, 28), 1)][which - 1]
    net = build_net(name, shape, 10, hidden)
    x = torch.randn(4, *shape)
    for method in ("bp", "fdfa"):
        model = FDFA(copy.deepcopy(net), method=method, example_input=x)
        with FlopCounterMode(display=False) as counter:
            output = model(x)
            forward = counter.get_total_flops()
            output.sum().backward()
        counted = forward / len(x), (counter.get_total_flops() - forward) / len(x)
        expected = on_paper.bp_forward, on_paper.bp_backward
        if method == "fdfa":
            expected = on_paper.forward, on_paper.gradients
        assert counted == pytest.approx(expected, rel=1e-3), method


@pytest.mark.parametrize("name", ["table-b6", "table-2"])
@pytest.mark.parametrize("dataset", ["fashion-mnist", "mnist"])
def test_documented_tables_are_what_the_records_beside_them_say(
    name: str, dataset: str, tmp_path: Path
) -> None:
    shutil.copytree(RECORDS, tmp_path / "records")
    which = ["--datasets", dataset, "--seeds", "1"]
    assert main(["experiment", name, *which, "--output", str(tmp_path)]) == 0
    lines = (tmp_path / name / "table.md").read_text().splitlines()
    assert "\n".join(line for line in lines if line.startswith("|")) in RESULTS


def final(dataset: str, net: str, method: str, seed: int = 0) -> float:
    """Test accuracy in percent after the last epoch of the run on file."""
    rows = list(csv.DictReader((RECORDS / f"{dataset}-{net}-{method}-seed{seed}.csv").open()))
    return 100 * float(rows[-1]["test_accuracy"])


@pytest.mark.parametrize(("page", "rows"), [("README.md", 3), ("docs/results.md", 7)])
def test_documented_accuracies_are_those_of_the_records(page: str, rows: int) -> None:
    on_file = [
        row for row in table((ROOT / page).read_text(), "| data | net |") if row["data"] != "digits"
    ]
    assert len(on_file) == rows
    for row in on_file:
        dataset, net = row["data"].lower(), NETS[row["net"]]
        assert row.get("epochs", "100") == "100"
        for column, method in (("FDFA", "fdfa"), ("backpropagation", "bp")):
            assert row[column].removesuffix(" %") == f"{final(dataset, net, method):.2f}"
            if f"paper, {column}" in row:
                mean, deviation = paper_accuracies()[net, method, dataset]
                assert row[f"paper, {column}"] == f"{mean:.2f} ± {deviation:.2f}"


def test_the_readmes_speeds_are_those_of_the_documents() -> None:
    head = "| net | input | batch | FDFA, ms | backpropagation, ms | FDFA / BP |"
    on_cpu = {
        (machine, row["net"], row["input"], row["batch"]): [
            row[f"{way}, ms"] for way in ("FDFA", "backpropagation")
        ]
        for machine, column in (("AMD EPYC", "memory, FDFA / BP"), ("Intel Xeon", "DFA / BP"))
        for row in table(PERFORMANCE, f"{head} {column} |")
    }
    on_gpu = {
        (row["net"], row["outputs"]): row["float32"]
        for row in table(CUDA, "| net | outputs | float32 |")
    }
    rows = table(README, "| machine | net | input |")
    assert {row["machine"].split(",")[0] for row in rows} == {"AMD EPYC", "Intel Xeon", "H200"}
    for row in rows:
        machine = row["machine"].split(",")[0]
        if machine != "H200":
            case = on_cpu[machine, row["net"], row["input"], row["batch"]]
            times = [time.split()[0] for time in case]
        else:
            times = on_gpu[f"`{NETS[row['net']].replace('-', '')}`", "10"].split(" / ")
        assert [row["FDFA"], row["backpropagation"]] == times
        assert row["ratio"] == f"{float(times[0]) / float(times[1]):.2f}"


def test_the_documented_means_of_three_seeds_are_those_of_the_records() -> None:
    rows = table(RESULTS, "| method | three seeds | mean | paper |")
    assert len(rows) == 6
    for method, each, average, paper in map(dict.values, rows):
        accuracies = [final("fashion-mnist", "mlp-2", method, seed) for seed in range(3)]
        assert each == ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
        assert average == "{:.2f} ± {:.2f}".format(*mean_and_deviation(accuracies))
        assert paper == "{:.2f} ± {:.2f}".format(*paper_accuracies()["mlp-2", method, "fashion-mnist"])


PATCH_RUNS = {
    "backpropagation": "cnn-bp-lr1e-4",
    "backpropagation at 1e-3": "cnn-bp",
    "FDFA": "cnn-fdfa",
    "FDFA, patches of 4": "cnn-fdfa-patch4",
    "FDFA, patches of 8": "cnn-fdfa-patch8",
    "FDFA after the pool": "cnn-pooled-fdfa",
    "FDFA after the pool, patches of 4": "cnn-pooled-fdfa-patch4",
}


def read_patch_run(method: str, seed: int) -> Any:
    return read_record(RECORDS / f"cifar10-{PATCH_RUNS[method]}-seed{seed}.csv")


def test_the_documented_losses_in_patches_are_those_of_the_records() -> None:
    losses: dict[str, list[float]] = {}
    for row in table((DOCS / "estimation.md").read_text(), "| method | loss 1 |"):
        name = row["method"]
        records = [read_patch_run(name, seed) for seed in range(3)]
        losses[name] = [mean(r[epoch]["train_loss"] for r in records) for epoch in range(3)]
        for epoch, loss in enumerate(losses[name]):
            assert row[f"loss {epoch + 1}"] == f"{loss:.3f}"
            gap = loss - losses["backpropagation"][epoch]
            assert row[f"gap {epoch + 1}"] == (f"{gap:.3f}" if gap else "")
        assert row["test accuracy"] == f"{100 * mean(r[2]['test_accuracy'] for r in records):.1f} %"
    assert len(losses) == 6


def test_the_documented_runs_that_learn_feedback_now_and_then_are_those_of_the_records() -> None:
    rows = table((DOCS / "estimation.md").read_text(), "| method | B learns in |")
    assert len(rows) == 4
    for row in rows:
        every = "" if row["B learns in"] == "each step" else "-every4"
        record = read_record(RECORDS / f"cifar10-{PATCH_RUNS[row['method']]}{every}-seed0.csv")
        for epoch in (1, 2, 3, 10, 20):
            known = epoch <= len(record)
            loss = f"{record[epoch - 1]['train_loss']:.3f}" if known else "not run"
            assert row[f"loss {epoch}"] == loss
        last = [100 * epoch["test_accuracy"] for epoch in record][10:20]
        assert row["test accuracy, mean of 11 to 20"] == (f"{mean(last):.2f}" if last else "not run")


def test_the_documented_longer_runs_are_those_of_the_records() -> None:
    rows = table((DOCS / "estimation.md").read_text(), "| method | epoch 10 |")
    assert len(rows) == 4
    for row in rows:
        record = read_patch_run(row["method"], 0)
        accuracies = [100 * epoch["test_accuracy"] for epoch in record]
        for epoch in (10, 20, 30, 40):
            assert row[f"epoch {epoch}"] == f"{accuracies[epoch - 1]:.2f}"
        assert row["mean of 31 to 40"] == f"{mean(accuracies[30:40]):.2f}"
        last = accuracies[90:100]
        assert row["mean of 91 to 100"] == (f"{mean(last):.2f}" if len(last) == 10 else "")
        assert row["training, epoch 40"] == f"{100 * record[39]['train_accuracy']:.1f}"
    last = [100 * r["test_accuracy"] for r in read_patch_run("FDFA after the pool, patches of 4", 1)][
        90:
    ]
    seed_1 = f"Its seed 1 has {last[-1]:.2f} there, and {mean(last):.2f} as the mean of 91 to 100."
    assert seed_1 in (DOCS / "estimation.md").read_text()


@pytest.mark.parametrize(
    "case",
    slow_but(CASES, *(case for case in CASES if case.model != "alexnet")),
    ids=lambda case: f"{case.model}-{case.outputs}",
)
def test_the_documented_roofline_is_what_the_command_prints(case: Case) -> None:
    assert table_lines(case, parts_of_step(case)) in CUDA[CUDA.index(HEAD) :]
