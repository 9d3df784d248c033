"""Launches of a training step on CUDA, reckoned without a GPU."""

import pytest
import torch
from marks import slow_but

from fdfa_ext.bench import launches
from fdfa_ext.bench.launches import NETS, count_launches, launch_counts


@pytest.mark.parametrize("net", slow_but(NETS, *NETS[:-1]))
def test_a_step_launches_no_more_than_backpropagations(net: str) -> None:
    counts = launch_counts(net)
    fdfa, bp = (counts[method].total() for method in ("fdfa", "bp"))
    assert fdfa <= bp, counts


def test_a_step_of_blocks_adds_no_launch_but_its_kernels() -> None:
    """No fills, no sums of δ, no counters of their own."""
    launches = launch_counts("mlp4")["fdfa"]
    ours = {name: n for name, n in launches.items() if name.startswith("fdfa::")}
    # Three blocks of which the first has no tangent; the output's tangent, and four weight gradients.
    assert ours == {
        "fdfa::linear": 2 + 3 + 3,
        "fdfa::mm": 1 + 4,
        "fdfa::next_noise": 1,
        "fdfa::feedback_step": 1,
    }
    others = {
        "aten::sum.dim_IntList",
        "aten::add_.Tensor",
        "aten::zero_",
        "aten::fill_.Scalar",
        "aten::copy_",
    }
    assert not others & set(launches)


def test_an_operator_that_the_table_lacks_is_named() -> None:
    x = torch.zeros(2)
    with pytest.raises(LookupError, match="lacks aten::erfinv; say what it launches on CUDA"):
        count_launches(lambda: torch.erfinv(x))


def test_the_command_prints_the_counts_of_every_net(capsys, monkeypatch) -> None:
    monkeypatch.setattr(launches, "NETS", ("mlp2", "mlp4"))
    launches.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| net | fdfa | bp |"
    for net, line in zip(("mlp2", "mlp4"), lines[2:], strict=True):
        counts = launch_counts(net)
        assert line == f"| {net} | {counts['fdfa'].total()} | {counts['bp'].total()} |"
