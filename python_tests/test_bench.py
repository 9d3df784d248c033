"""The profiler: its plain-torch contenders compute what FDFA computes, and its figures mean what they say."""

import json
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
from fdfa_ext.bench.contenders import METHODS, Case, training_step
from fdfa_ext.bench.machine import Limits
from fdfa_ext.bench.operators import record, time_operators
from fdfa_ext.bench.plain import PlainFDFA, PublishedFDFA
from fdfa_ext.bench.report import StepTime, slope, step_table
from fdfa_ext.bench.timing import Contender, Spread, peak_memory, take_turns
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
    contenders = [Contender(name, lambda s=s: time.sleep(s)) for name, s in naps.items()]
    take_turns(contenders, seconds=1.0, device=torch.device("cpu"))
    turns = {c.name: len(c.ms) for c in contenders}
    assert turns["quick"] == turns["other"] > turns["slow"] >= 5
    for contender in contenders:
        assert contender.spread.lower <= contender.spread.median <= contender.spread.upper
        assert contender.spread.median >= 1e3 * naps[contender.name]


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
    rows = {row.name: row for row in time_operators([linear, feedback], Limits(1e9, 1e9), device)}

    row = rows["fdfa::linear"]  # the first block has no tangent; its noise state has 3 words of 8 bytes
    assert row.n_flops == 2 * n * 784 * d
    assert row.n_bytes == 4 * (n * 784 + d * 784 + d + 2 * n * d + 1) + 24
    # B and two moments, read and written; e, d; gate, δ; the bias's gradient, twice; counters
    row = rows["fdfa::feedback_step"]
    assert row.n_flops == 2 * 2 * n * k * d
    assert row.n_bytes == 4 * (2 * 3 * k * d + 2 * n * k + 2 * n * d + 2 * d) + 24 + 2 * 8
    for row in rows.values():
        assert row.ms.median > 0
        assert row.calls == 1
    assert rows["fdfa::linear"].reference_ms > 0


def test_roofline_is_the_larger_of_both_limits() -> None:
    limits = Limits(bytes=100.0, flops=10.0)
    assert limits.seconds(200, 0) == 2
    assert limits.seconds(200, 30) == 3


def test_slope_is_the_power_of_growth() -> None:
    xs = [1.0, 2.0, 5.0, 10.0]
    assert slope(xs, [3 * x**1.5 for x in xs]) == pytest.approx(1.5)


def test_memory_is_compared_with_that_of_a_step_that_has_one() -> None:
    """A replayed graph allocates nothing, and says nothing of what the step needs."""
    case = Case.of("mlp2", "digits", 32, None)
    rows = [
        StepTime(case, method, Spread(ms, ms, ms), memory)
        for method, ms, memory in (
            ("fdfa", 2.0, 3 * 2**20),
            ("bp", 4.0, 2 * 2**20),
            ("bp-graphed", 1.0, None),
        )
    ]
    cells = [[c.strip() for c in line.split("|")[4:-1]] for line in step_table(rows).splitlines()[2:]]
    assert [[c[0], *c[2:]] for c in cells] == [
        ["fdfa", "2.00", "3", "1.50"],
        ["bp", "4.00", "2", "1.00"],
        ["bp-graphed", "1.00", "", ""],
    ]


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
        ("bench --batch-sizes 64,0", "'0' is not a whole number of 1 or more"),
        ("bench --json .", "--json . is a folder: give a file"),
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

    monkeypatch.setattr("fdfa_ext.bench.contenders.FDFA", remembered)
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
