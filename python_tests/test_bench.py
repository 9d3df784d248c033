"""The profiler: its plain-torch implementations compute what FDFA computes, and its figures mean what they say."""

import json
import re
import subprocess
import time
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from nets import NETS, batch
from torch import Tensor, nn

from fdfa_ext import FDFA, reference
from fdfa_ext.__main__ import main
from fdfa_ext.arguments import UserError
from fdfa_ext.bench import machine
from fdfa_ext.bench.implementations import METHODS, Case, methods_for, training_step
from fdfa_ext.bench.machine import Limits
from fdfa_ext.bench.operators import OperatorCall, necessary_bytes, record, time_operators
from fdfa_ext.bench.plain import PlainFDFA, PublishedFDFA
from fdfa_ext.bench.report import StepFailure, StepTime, slope, step_lines, step_summary
from fdfa_ext.bench.timing import OUT_OF_MEMORY, Implementation, Spread, peak_memory, take_turns
from fdfa_ext.train.models import build_net


@pytest.mark.parametrize("form", [PublishedFDFA, PlainFDFA])
@pytest.mark.parametrize("name", NETS)
def test_plain_forms_give_the_gradients_of_fdfa(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, name: str, form: type[nn.Module]
) -> None:
    """Weights' and feedback's, with the same noise and a feedback that is not zero."""
    x, y = batch(name, device)
    net = NETS[name][0]().to(device=device)
    model = FDFA(net, feedback="grad", example_input=x)
    for feedback in model.feedback_parameters():
        nn.init.normal_(feedback)
    blocks = count()

    def same_noise(like: Tensor) -> Tensor:
        images = like.dim() == 4
        return reference.perturbation(state, next(blocks), "gaussian", like.shape, channels_last=images)

    state = model.noise_state.clone()
    F.cross_entropy(model(x), y).backward()
    model.give_feedback_gradients()
    expected = [p.grad for p in [*model.forward_parameters(), *model.feedback_parameters()]]
    net.zero_grad()

    plain = form(net, x)
    for mine, theirs in zip(plain.feedback, model.feedback_parameters(), strict=True):
        mine.data.copy_(theirs)
    monkeypatch.setattr(torch, "randn_like", same_noise)
    F.cross_entropy(plain(x), y).backward()
    got = [p.grad for p in [*net.parameters(), *plain.feedback]]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_interleaved_contenders_get_equal_turns_and_slow_ones_fewer() -> None:
    naps = {"quick": 0.002, "other": 0.002, "slow": 0.02}
    implementations = [Implementation(name, lambda s=s: time.sleep(s)) for name, s in naps.items()]
    take_turns(implementations, seconds=1.0, device=torch.device("cpu"))
    turns = {c.name: len(c.ms) for c in implementations}
    assert turns["quick"] == turns["other"] > turns["slow"] >= 5
    for implementation in implementations:
        assert (
            implementation.spread.lower <= implementation.spread.median <= implementation.spread.upper
        )
        assert implementation.spread.median >= 1e3 * naps[implementation.name]


def test_peak_memory_counts_what_lives_at_once(device: torch.device) -> None:
    def step() -> None:
        a = torch.zeros(2**20, device=device)
        b = a + 1
        del a
        c = b + 1
        del b, c

    assert peak_memory(step, device) == pytest.approx(2 * 4 * 2**20, rel=1e-3)  # and the scalars


def test_recorded_operators_are_those_of_a_step_with_their_bytes_and_flops(
    device: torch.device,
) -> None:
    n, k, d = 5, 10, 32
    step = training_step(Case("mlp2", "mnist", n, k, width=d), "fdfa", device, "float32").run
    calls = {call.name: call for call in record(step)}
    linear, feedback = calls["fdfa::linear"], calls["fdfa::feedback_step"]
    rows = {row.name: row for row in time_operators([linear, feedback], Limits(1e9, 1e9, 1e3), device)}

    row = rows["fdfa::linear"]  # the first block has no tangent; its noise state has 3 words of 8 bytes
    assert row.n_flops == 2 * n * 784 * d
    assert row.n_bytes == 4 * (n * 784 + d * 784 + d + 2 * n * d + 1) + 24
    # B and two moments, read and written; e, d; saved_activation, δ; two biases' gradients; counters; the rate
    row = rows["fdfa::feedback_step"]
    assert row.n_flops == 2 * 2 * n * k * d
    assert row.n_bytes == 4 * (2 * 3 * k * d + 2 * n * k + 2 * n * d + d + k) + 24 + 2 * 8 + 8
    for row in rows.values():
        assert row.ms.median > 0
        assert row.calls == 1
    assert rows["fdfa::linear"].bound == "products"
    share = rows["fdfa::feedback_step"].n_flops / 1e3  # its products have a limit of their own
    assert rows["fdfa::feedback_step"].of_roofline == pytest.approx(
        1e3 * share / rows["fdfa::feedback_step"].ms.median
    )
    assert rows["fdfa::linear"].reference_ms > 0


def test_bytes_of_pools_and_norms_are_those_that_their_kernels_read_and_write() -> None:
    """Nothing for autograd's node, one element for a placeholder, no reading of what is only written."""
    fused = torch.ops.fdfa
    order = torch.channels_last
    x, tangent, ty, anchor = (torch.randn(2, 3, 4, 4).to(memory_format=order) for _ in range(4))
    noise_state = torch.zeros(3, dtype=torch.int64)
    pool = ([2, 2], [2, 2], [0, 0])
    end = OperatorCall(
        fused.max_pool2d_end.default, (x, tangent, anchor, *pool, noise_state, 0, "gaussian"), {}
    )
    # x, tangent; y and ty, pre, winners; noise state
    assert necessary_bytes(end) == 4 * (2 * 96 + 2 * 24 + 1) + 24 + 24
    y, *_, winners = end()
    backward = OperatorCall(fused.max_pool2d_backward.default, (y, winners, [4, 4], *pool), {})
    assert necessary_bytes(backward) == 4 * 24 + 24 + 4 * 96  # δ, winners; the images' gradient

    weight, bias, mean, var = torch.ones(4, 3)
    batches = torch.zeros(1, dtype=torch.int64)[0]
    options = (batches, True, 0.1, 1e-5, noise_state, 0, "relu", "gaussian")
    norm = OperatorCall(
        fused.batch_norm.default, (x, tangent, ty, weight, bias, mean, var, *options), {}
    )
    # x, tangent; y, ty, pre; weight, bias, the batch's mean and 1 / σ; running ones, read and written
    assert necessary_bytes(norm) == 4 * (2 * 96 + 2 * 96 + 1 + 4 * 3 + 2 * 2 * 3) + 24 + 2 * 8


def test_fused_adam_reads_gradients_and_moves_weights_and_moments() -> None:
    weights = [torch.ones(5, 7, requires_grad=True)]
    optimizer = torch.optim.Adam(weights, fused=True)

    def step() -> None:
        weights[0].sum().backward()
        optimizer.step()

    step()
    (adam,) = [call for call in record(step) if call.name == "aten::_fused_adam_"]
    assert necessary_bytes(adam) == 4 * (35 + 3 * 2 * 35 + 1)  # and the count of steps


def test_a_feedback_steps_products_are_three_of_tf32_unless_torch_allows_tf32(monkeypatch) -> None:
    assert machine.feedback_flops(495e12) == 165e12
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert machine.feedback_flops(495e12) == 495e12


def test_roofline_is_the_larger_of_both_limits() -> None:
    limits = Limits(bytes=100.0, flops=10.0, feedback_flops=5.0)
    assert limits.seconds(200, 0) == 2
    assert limits.seconds(200, 30) == 3


def test_slope_is_the_power_of_growth() -> None:
    xs = [1.0, 2.0, 5.0, 10.0]
    assert slope(xs, [3 * x**1.5 for x in xs]) == pytest.approx(1.5)


def test_a_graph_is_compared_with_graphs_and_an_eager_step_with_eager_ones() -> None:
    """A replayed graph allocates nothing, so that it has no memory to compare."""
    case = Case.of("mlp2", "digits", 32, None)
    rows = [
        StepTime(case, method, Spread(ms, ms, ms), memory)
        for method, ms, memory in (
            ("fdfa", 2.0, 3 * 2**20),
            ("fdfa-graphed", 0.5, None),
            ("bp", 4.0, 2 * 2**20),
            ("bp-channels-last", 5.0, 2**20),
            ("bp-graphed", 1.0, None),
        )
    ]
    lines = step_lines(rows, [StepFailure(case, "published", OUT_OF_MEMORY)]).splitlines()
    cells = [[c.strip() for c in line.split("|")[5:-1]] for line in lines]
    assert [[c[0], *c[2:]] for c in cells[:-1]] == [
        ["fdfa", "0.50", "3", "1.50"],
        ["fdfa-graphed", "0.50", "", ""],
        ["bp", "1.00", "2", "1.00"],
        ["bp-channels-last", "1.25", "1", "0.50"],
        ["bp-graphed", "1.00", "", ""],
    ]
    assert cells[-1] == ["published", "out of memory", "", "", ""]
    assert step_summary(rows) == "fdfa 0.50 to 0.50 of best BP, fdfa-graphed 0.50 to 0.50 of best BP"


def test_a_contender_that_fails_says_why_and_leaves_the_others_their_turns() -> None:
    turns = count()

    def tires() -> None:
        if next(turns) > 10:
            raise torch.OutOfMemoryError("Tried to allocate 4 GiB.\nMore lines.")

    def breaks() -> None:
        raise RuntimeError("no kernel image\nCompile with ...")

    steps = {"steady": lambda: time.sleep(0.001), "tires": tires, "breaks": breaks}
    implementations = [Implementation(name, step) for name, step in steps.items()]
    take_turns(implementations, seconds=0.05, device=torch.device("cpu"))
    assert [c.error for c in implementations] == ["", OUT_OF_MEMORY, "no kernel image"]
    assert len(implementations[0].ms) >= 5


def test_the_commit_is_that_of_the_package_and_of_no_repository_around_it(
    tmp_path, monkeypatch
) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    commit = ["git", "-C", str(tmp_path), *who, "commit", "-q", "--allow-empty", "-m", "other"]
    subprocess.run(commit, check=True)
    inside = tmp_path / "copy" / "fdfa_ext" / "bench"
    inside.mkdir(parents=True)
    monkeypatch.delenv("FDFA_COMMIT", raising=False)
    monkeypatch.setattr(machine, "__file__", str(inside / "machine.py"))
    cpu = torch.device("cpu")
    assert machine.machine_facts(cpu)["commit"] == "unknown"
    monkeypatch.setenv("FDFA_COMMIT", "abc1234")
    assert machine.machine_facts(cpu)["commit"] == "abc1234"
    assert machine.description(cpu).endswith("commit abc1234")


def test_bench_keeps_the_table_of_those_that_ran_and_resumes(tmp_path, capsys, monkeypatch) -> None:
    """Rows of the same commit alone are taken from the file, and only whole cases."""
    monkeypatch.setenv("FDFA_COMMIT", "abc1234")
    figures = tmp_path / "bench.json"
    made: list[tuple[int, str]] = []

    def step(case, method, *rest):
        made.append((case.outputs, method))
        if method == failing:
            raise RuntimeError("no kernel image")
        return training_step(case, method, *rest)

    monkeypatch.setattr("fdfa_ext.bench.command.training_step", step)
    flags = "bench --models mlp2 --shapes digits --methods fdfa,bp --batch-sizes 2 --seconds 0.001"
    command = [*flags.split(), "--json", str(figures), "--resume", "--outputs"]

    failing = "bp"
    assert main([*command, "10"]) == 1
    out, err = capsys.readouterr()
    assert "| 10 | bp | no kernel image |" in out
    assert "RuntimeError: no kernel image" in err
    saved = json.loads(figures.read_text())
    assert [row["method"] for row in saved["rows"]] == ["fdfa"]
    assert saved["failures"][0]["error"] == "no kernel image"
    assert all(saved["rows"][0][key] for key in ("hardware", "torch", "commit", "dtype"))

    failing = ""
    made.clear()
    assert main([*command, "10,3"]) == 0
    assert made == [(10, "fdfa"), (10, "bp"), (3, "fdfa"), (3, "bp")]
    table = capsys.readouterr().out
    made.clear()
    assert main([*command, "10,3"]) == 0
    assert made == []
    again = capsys.readouterr().out
    assert [line for line in again.splitlines() if line[:1] == "|"] == [
        line for line in table.splitlines() if line[:1] == "|"
    ]
    for other, taken in (("def5678", True), ("unknown", False), ("abc1234-dirty", False)):
        monkeypatch.setenv("FDFA_COMMIT", other)
        made.clear()
        assert main([*command, "10"]) == main([*command, "10"]) == 0
        assert len(made) == (2 if taken else 4)


@pytest.mark.parametrize(
    "changed",
    [
        {"ms": [1, "2", 3]},
        {"ms": 5},
        {"ms": [1.0, 2.0]},
        {"memory": "all of it"},
        {"method": ["fdfa"]},
        {"case": {"model": "mlp2"}},
        {"case": {"model": [], "shape": "digits", "batch_size": 2, "outputs": 10}},
    ],
    ids=str,
)
def test_a_file_with_figures_of_another_kind_is_refused(tmp_path, capsys, monkeypatch, changed) -> None:
    monkeypatch.setenv("FDFA_COMMIT", "abc1234")
    figures = tmp_path / "bench.json"
    flags = "bench --models mlp2 --shapes digits --methods fdfa --batch-sizes 2 --seconds 0.001"
    command = [*flags.split(), "--json", str(figures), "--resume"]
    assert main(command) == 0
    content = json.loads(figures.read_text())
    content["rows"][0] |= changed
    figures.write_text(json.dumps(content))
    capsys.readouterr()
    assert main(command) == 2
    assert capsys.readouterr().err.endswith("is not what bench --json writes: move it away\n")


def test_a_method_without_memory_has_its_line_and_is_no_error(capsys, monkeypatch) -> None:
    def step(case, method, *rest):
        if method == "published":
            raise torch.OutOfMemoryError("Tried to allocate 4 GiB.")
        return training_step(case, method, *rest)

    monkeypatch.setattr("fdfa_ext.bench.command.training_step", step)
    flags = "bench --models mlp2 --shapes digits --methods published,bp --batch-sizes 2 --seconds 0.001"
    assert main(flags.split()) == 0
    out = capsys.readouterr().out
    assert "| 10 | published | out of memory |" in out
    assert "| 10 | bp | " in out
    assert main(flags.replace(",bp", "").split()) == 0
    assert "| 10 | published | out of memory |" in capsys.readouterr().out


def test_graphs_of_backpropagation_run_in_both_memory_orders() -> None:
    def graphs(model: str) -> list[str]:
        case = Case.of(model, "mnist", 8, None)
        return [
            m for m in methods_for(case, [*METHODS], "float32", torch.device("cuda")) if "graph" in m
        ]

    assert graphs("cnn") == ["fdfa-graphed", "bp-graphed", "bp-channels-last-graphed"]
    assert graphs("mlp2") == ["fdfa-graphed", "bp-graphed"]


def test_every_operator_of_a_step_is_profiled(capsys, monkeypatch, tmp_path) -> None:
    """The nets of the GPU check together call all that a training step by FDFA may call."""
    monkeypatch.setattr("fdfa_ext.bench.operators._SECONDS", 0.001)
    monkeypatch.setattr("fdfa_ext.bench.command._STEP_SECONDS", 0.001)
    monkeypatch.setattr("fdfa_ext.bench.command.measure_limits", lambda *_: Limits(1e9, 1e9, 1e9))
    figures = tmp_path / "profile.json"
    flags = (
        f"profile --model mlp2,cnn,cnn-two-pool,other-ends --batch-size 2 --only-fdfa --json {figures}"
    )
    assert main(flags.split()) == 0
    found = {row["name"].split()[0] for row in json.loads(figures.read_text())["rows"]}
    ours = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fdfa::")}
    # The first four are made of others; the gradient is the rule "grad"'s
    composed = ("feedback_node", "product", "dual_linear", "dual_batch_norm")
    unseen = {f"fdfa::{name}" for name in (*composed, "feedback_gradient")}
    assert found == ours - unseen
    out = capsys.readouterr().out
    assert "| whole step |" in out
    assert re.search(r"\nfdfa's kernels reach \d+% of the roofline\n", out)


def test_commands_print_tables_and_write_their_files(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("fdfa_ext.bench.operators._SECONDS", 0.001)
    monkeypatch.setattr("fdfa_ext.bench.command._STEP_SECONDS", 0.01)
    flags = "bench --models mlp2,cnn-two-pool --methods fdfa,bp --batch-sizes 2 --seconds 0.01"
    figures, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    assert main([*flags.split(), "--json", str(figures), "--plot", str(plot)]) == 0
    table = capsys.readouterr().out
    assert table.count("| fdfa |") == table.count("| bp |") == 2
    rows = json.loads(figures.read_text())["rows"]
    assert [row["method"] for row in rows] == ["fdfa", "bp", "fdfa", "bp"]
    assert plot.stat().st_size > 0

    sweep = tmp_path / "sweep.png"
    monkeypatch.setattr("fdfa_ext.bench.command._SWEEPS", {"batch_size": (2, 4)})
    flags = "bench --models mlp2 --methods fdfa,bp --sweep batch_size --seconds 0.01"
    assert main([*flags.split(), "--plot", str(sweep)]) == 0
    assert capsys.readouterr().out.count("| fdfa |") == 2
    assert sweep.stat().st_size > 0

    trace = tmp_path / "trace.json"
    assert main(["profile", "--model", "mlp2", "--batch-size", "2", "--trace", str(trace)]) == 0
    assert "| fdfa::feedback_step |" in capsys.readouterr().out
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"step 0", "fdfa::linear", "fdfa::feedback_step"} <= names


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("bench --models mlp3", "'mlp3' is not some of mlp2, mlp4"),
        ("bench --models cnn --sweep width", "--sweep width is for the mlps, not for cnn"),
        (
            "bench --models mlp2 --methods plain --dtype bfloat16",
            "784-800-10 in bfloat16 on cpu: nothing to time with plain",
        ),
        ("bench --batch-sizes 64,0", "'0' is not a whole number from 1 to 2^63 - 1"),
        ("bench --threads 99999999999", "'99999999999' is not a number of threads from 1 to 4096"),
        ("profile --outputs 99999999999999999999", "is not a whole number from 1 to 2^63 - 1"),
        ("profile --device privateuseone", "there is no device 'privateuseone' here"),
        ("profile --trace /dev/null", "--trace /dev/null is a folder, a pipe or a device: give a file"),
        ("bench --resume", "--resume goes on with the file of --json: give one"),
        ("profile --model mlp2,cnn --trace t.json", "--trace is of one net; got --model mlp2,cnn"),
        ("bench --json .", "--json . is a folder, a pipe or a device: give a file"),
        ("profile --model mlp2 --nvtx", "--nvtx is for CUDA devices; got --device cpu"),
        ("bench --plot b.foo", "--plot b.foo must end in one of"),
        ("profile --trace nowhere/t.json", "--trace nowhere/t.json: there is no folder nowhere"),
        ("bench --plot nowhere/b.png", "--plot nowhere/b.png: there is no folder nowhere"),
    ],
)
def test_what_the_user_gets_wrong_is_one_sentence(capsys, flags: str, message: str) -> None:
    try:
        code = main(flags.split())
    except SystemExit as error:  # argparse's way out
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_every_method_takes_a_step_in_bfloat16_or_is_left_out(capsys) -> None:
    """torch.compile aside, which takes half a minute."""
    flags = "bench --models cnn --methods fdfa,plain,published,bp,bp-channels-last --dtype bfloat16"
    assert main([*flags.split(), "--batch-sizes", "2", "--seconds", "0.01"]) == 0
    table = capsys.readouterr().out
    assert [word for word in METHODS if f"| {word} |" in table] == ["fdfa", "bp", "bp-channels-last"]


def test_local_heads_learn_in_what_is_timed(monkeypatch) -> None:
    made = []

    def remembered(*args, **kwargs) -> FDFA:
        made.append(FDFA(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr("fdfa_ext.bench.implementations.FDFA", remembered)
    case = Case.of("mlp4", "digits", 8, None)
    timed = training_step(case, "lg-fg-a", torch.device("cpu"), "float32")
    (model,) = made
    before = {name: head.weight.detach().clone() for name, head in model.heads.items()}
    timed.run()
    assert len(before) == 2
    assert not any(torch.equal(model.heads[name].weight, weight) for name, weight in before.items())


def test_alexnet_learns_in_every_block() -> None:
    """On the smallest image that its pools allow: one step reaches each weight and each feedback."""
    net = build_net("alexnet", (3, 63, 63), 3)
    x, y = torch.randn(2, 3, 63, 63), torch.tensor([0, 2])
    model = FDFA(net, example_input=x)
    assert len(model.feedback) == 7
    F.cross_entropy(model(x), y).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    assert all(b.abs().sum() > 0 for b in model.feedback.values())


def test_digits_stand_for_the_small_mlp_and_are_too_small_for_convolutions() -> None:
    assert Case.of("mlp2", "digits", 32, None).net == "64-128-10"
    with pytest.raises(UserError, match="needs images of"):
        Case.of("cnn", "digits", 32, None).build()
