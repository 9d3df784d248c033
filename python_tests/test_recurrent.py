"""The JVP rules of recurrent layers are torch's forward mode, which goes step by step."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fdfa_ext import recurrent
from fdfa_ext.duals import forward_mode, make_dual, step_by_step, unpack_dual
from fdfa_ext.jvp import point_rules

LAYERS: list[tuple[type[nn.RNNBase], dict[str, Any]]] = [
    (nn.LSTM, {}),
    (nn.GRU, {}),
    (nn.RNN, {}),
    (nn.RNN, {"nonlinearity": "relu"}),
]


def run(
    layer: nn.RNNBase, x: Tensor, states: Any, tangents: list[Tensor | None], by_rules: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Results, their tangents, and the gradients of the results' sum."""
    given = [x, *tree_leaves(states)] if states is not None else [x]
    with forward_mode():
        duals = [t if d is None else make_dual(t, d) for t, d in zip(given, tangents, strict=False)]
        own = None if states is None else duals[1] if len(duals) == 2 else tuple(duals[1:])
        with point_rules() if by_rules else step_by_step():
            results = tree_leaves(layer(duals[0], own))
        pairs = [unpack_dual(t) for t in results]
        layer.zero_grad()
        sum(y.square().sum() for y, _ in pairs).backward()
        gradients = [p.grad for p in layer.parameters()]
        assert all(t is not None for _, t in pairs)
        return [y for y, _ in pairs], [t for _, t in pairs], gradients  # type: ignore[misc]


@pytest.mark.parametrize(("kind", "options"), LAYERS)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("given", ["x", "states", "both"])
def test_rules_are_torchs_forward_mode(
    kind: type[nn.RNNBase],
    options: dict[str, Any],
    layers: int,
    bidirectional: bool,
    batch_first: bool,
    bias: bool,
    given: str,
) -> None:
    torch.manual_seed(0)
    layer = kind(
        6, 5, layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional, **options
    ).double()
    x = torch.randn(*((4, 7, 6) if batch_first else (7, 4, 6)), dtype=torch.float64)
    start = [torch.randn(layers * (1 + bidirectional), 4, 5, dtype=torch.float64) for _ in range(2)]
    states = None if given == "x" else tuple(start) if kind is nn.LSTM else start[0]
    tangents: list[Tensor | None] = [torch.randn_like(t) for t in (x, *start)]
    if given == "states":
        tangents[0] = None
    found, expected = (run(layer, x, states, tangents, by_rules) for by_rules in (True, False))
    for mine, theirs in zip(found, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b)
    if batch_first:
        assert found[0][0].shape[0] == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(6, 5, 2, batch_first=True).to(dtype)
    x = torch.randn(4, 7, 6, dtype=dtype)
    tangents: list[Tensor | None] = [torch.randn_like(x)]
    results, found, _ = run(layer, x, None, tangents, by_rules=True)
    _, expected, _ = run(
        layer.double(), x.double(), None, [torch.as_tensor(tangents[0]).double()], by_rules=False
    )
    assert {t.dtype for t in (*results, *found)} == {dtype}
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(6, 5, proj_size=3),
        lambda: nn.GRU(6, 5, 2, dropout=0.5),
    ],
)
def test_what_has_no_rule_goes_step_by_step(make: Any) -> None:
    """Projections, and dropout between layers."""
    torch.manual_seed(0)
    layer, x, tangent = make().double(), *torch.randn(2, 7, 4, 6, dtype=torch.float64)
    states = []
    for by_rules in (True, False):
        torch.manual_seed(1)
        states.append(run(layer, x, None, [tangent], by_rules))
    for mine, theirs in zip(*states, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b)
    assert torch.backends.mkldnn.enabled


def test_a_layer_without_a_tangent_stays_as_it_is() -> None:
    for function, rule in recurrent.RECURRENT_RULES.items():
        layers = {torch.lstm: nn.LSTM, torch.gru: nn.GRU}
        if function in layers:
            x, layer = torch.randn(7, 4, 6), layers[function](6, 5)
            states = [torch.zeros(1, 4, 5)] * 2 if function is torch.lstm else torch.zeros(1, 4, 5)
            given = x, states, [*layer.parameters()], True, 1, 0.0, True, False, False
            with forward_mode():
                assert rule(function, *given) is None
