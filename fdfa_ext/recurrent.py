"""JVP rules of recurrent layers and packed sequences.

torch's whole layers, of oneDNN and cuDNN, have no forward mode, and its other way is a chain of small
functions for each step, each a dual tensor. Here the layer computes its primal as it does without a
tangent. The states that it returns tell all gates at once, and only the tangent goes step by step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fdfa_ext._torch_internals import PACK_PADDED_SEQUENCE
from fdfa_ext.arithmetic import DualRule
from fdfa_ext.duals import has_tangent, make_dual_of_fresh, step_by_step, unpack_dual


@dataclass(frozen=True, slots=True)
class _Run:
    """One layer in one direction, in the order of its steps."""

    x: Tensor  # [T, N, D]
    tx: Tensor
    before: Tensor  # [T, N, H]: hidden states before each step
    after: Tensor
    initial: list[Tensor]  # [N, H] each
    tangents: list[Tensor]  # of these
    weights: Sequence[Tensor]  # of inputs and of states, and their biases if any


# The tangents of the hidden states after each step, and of all last states.
_Tangents = Callable[[_Run], tuple[Tensor, list[Tensor]]]


def _lstm_tangents(run: _Run) -> tuple[Tensor, list[Tensor]]:
    w, u, *biases = run.weights
    gates = F.linear(run.x, w) + F.linear(run.before, u)
    for bias in biases:
        gates += bias
    i, f, g, o = gates.chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cells = [run.initial[1]]
    for new, kept in zip((i * g).unbind(), f.unbind(), strict=True):
        cells.append(torch.addcmul(new, kept, cells[-1]))
    tanh = torch.stack(cells[1:]).tanh()
    # ∂c/∂(i, f, g) before their functions, ∂h/∂o, ∂h/∂c, and ∂c/∂c of the step before.
    inner = torch.stack([g * i * (1 - i), torch.stack(cells[:-1]) * f * (1 - f), i * (1 - g * g)], 2)
    slopes = inner, tanh * o * (1 - o), o * (1 - tanh * tanh), f
    size = u.shape[1]
    turned = u.t()
    th, tc = run.tangents
    found = []
    steps = zip(F.linear(run.tx, w).unbind(), *(t.unbind() for t in slopes), strict=True)
    for fed, inner_slopes, by_o, by_c, kept in steps:
        gate = torch.addmm(fed, th, turned).view(-1, 4, size)
        tc = torch.addcmul((gate[:, :3] * inner_slopes).sum(1), kept, tc)
        th = torch.addcmul(gate[:, 3] * by_o, by_c, tc)
        found.append(th)
    return torch.stack(found), [th, tc]


def _gru_tangents(run: _Run) -> tuple[Tensor, list[Tensor]]:
    w, u, *biases = run.weights
    of_x, of_h = biases or (None, None)
    size = u.shape[1]
    read, kept = F.linear(run.x, w, of_x), F.linear(run.before, u, of_h)
    r, z = (read + kept)[..., : 2 * size].sigmoid().chunk(2, -1)
    n = torch.addcmul(read[..., 2 * size :], r, kept[..., 2 * size :]).tanh()
    slope = (1 - z) * (1 - n * n)
    # ∂h/∂(r, z) before their sigmoids, and ∂h/∂n before its tanh; the states come into n by r.
    by_r, by_z = slope * kept[..., 2 * size :] * r * (1 - r), (run.before - n) * z * (1 - z)
    fed = (F.linear(run.tx, w) * torch.cat([by_r, by_z, slope], -1)).unflatten(-1, (3, size)).sum(-2)
    inner, turned = torch.stack([by_r, by_z, slope * r], 2), u.t()
    (th,) = run.tangents
    found = []
    for own, slopes, share in zip(fed.unbind(), inner.unbind(), z.unbind(), strict=True):
        gates = torch.mm(th, turned).view(-1, 3, size)
        th = torch.addcmul((gates * slopes).sum(1).add_(own), share, th)
        found.append(th)
    return torch.stack(found), [th]


def _rnn_tangents(slope: Callable[[Tensor], Tensor]) -> _Tangents:
    """slope: of the activation, by its result."""

    def tangents_of(run: _Run) -> tuple[Tensor, list[Tensor]]:
        w, u, *_ = run.weights
        turned = u.t()
        (th,) = run.tangents
        found = []
        steps = zip(F.linear(run.tx, w).unbind(), slope(run.after).unbind(), strict=True)
        for own, slopes in steps:
            th = torch.addmm(own, th, turned) * slopes
            found.append(th)
        return torch.stack(found), [th]

    return tangents_of


def _layers(tangents_of: _Tangents, function: Any, *given: Any) -> Any:
    """torch.lstm, gru, rnn_tanh or rnn_relu: the outputs [T, N, H] or [N, T, H] and the last states."""
    if not any(has_tangent(t) for t in tree_leaves(given) if isinstance(t, Tensor)):
        return None
    if not _is_known(*given):
        with step_by_step():
            return function(*given)
    x, hidden, weights, has_biases, layers, _, training, is_both, batch_first = given
    x, tx = unpack_dual(x)
    if batch_first:
        x, tx = x.transpose(0, 1), None if tx is None else tx.transpose(0, 1)
    starts = [unpack_dual(t) for t in ([hidden] if isinstance(hidden, Tensor) else hidden)]
    directions = 2 if is_both else 1
    ends: list[list[Tensor]] = [[] for _ in starts]
    end_tangents: list[list[Tensor]] = [[] for _ in starts]
    for layer in range(layers):
        places = range(layer * directions, (layer + 1) * directions)
        own = [t[places.start : places.stop] for t, _ in starts]
        count = len(weights) // (layers * directions)
        parts = weights[places.start * count : places.stop * count]
        options = has_biases, 1, 0.0, training, is_both, False
        y, *last = function(x, own if len(own) > 1 else own[0], parts, *options)
        with torch.no_grad():
            found = []
            for i, side in enumerate(y.detach().chunk(directions, -1)):
                turned = i == 1
                run = _run(x, tx, side, starts, places[i], parts[i * count : (i + 1) * count], turned)
                tangents, of_last = tangents_of(run)
                found.append(tangents.flip(0) if turned else tangents)
                for kept, t in zip(end_tangents, of_last, strict=True):
                    kept.append(t)
            x, tx = y, torch.cat(found, -1)
        for kept, t in zip(ends, last, strict=True):
            kept.append(t)
    if batch_first:
        x, tx = x.transpose(0, 1), tx.transpose(0, 1)
    with torch.no_grad():
        of_ends = [*map(torch.stack, end_tangents)]
    states = [make_dual_of_fresh(torch.cat(t), tt) for t, tt in zip(ends, of_ends, strict=True)]
    return make_dual_of_fresh(x, tx), *states


def _is_known(x: Tensor, hidden: Any, weights: Any, *options: Any) -> bool:
    """Whether the rule has these arguments: no packed sequences, tangents of weights, projections, or
    dropout between layers."""
    if isinstance(weights, Tensor) or (isinstance(hidden, Tensor) and not hidden.is_floating_point()):
        return False
    has_biases, layers, dropout, training, is_both, _ = options
    count = (4 if has_biases else 2) * layers * (2 if is_both else 1)
    drops = dropout > 0 and training and layers > 1
    plain = len(weights) == count and not any(map(has_tangent, weights)) and not drops
    return plain and x.numel() > 0 and not torch.is_autocast_enabled(x.device.type)


def _run(
    x: Tensor,
    tx: Tensor | None,
    after: Tensor,
    starts: Sequence[tuple[Tensor, Tensor | None]],
    place: int,
    weights: Sequence[Tensor],
    turned: bool,
) -> _Run:
    """after: the hidden states [T, N, H] that the layer returned. place: of this direction in the
    initial states. turned: whether it begins at the end."""
    tx = torch.zeros_like(x) if tx is None else tx.detach()
    x = x.detach()
    if turned:
        x, tx, after = x.flip(0), tx.flip(0), after.flip(0)
    initial = [t.detach()[place] for t, _ in starts]
    tangents = [torch.zeros_like(t[place]) if tt is None else tt.detach()[place] for t, tt in starts]
    before = torch.cat([initial[0].unsqueeze(0), after[:-1]])
    return _Run(x, tx, before, after, initial, tangents, weights)


def _pack(function: Any, input: Tensor, lengths: Tensor, batch_first: bool) -> Any:
    """[N, T, *] or [T, N, *] → the packed data [ΣT, *] and the batch sizes [T]."""
    if not has_tangent(input):
        return None
    x, tangent = unpack_dual(input)
    data, batch_sizes = function(x, lengths, batch_first)
    with torch.no_grad():
        packed, _ = function(tangent, lengths, batch_first)
    return make_dual_of_fresh(data, packed), batch_sizes


RECURRENT_RULES: dict[Any, DualRule] = {
    torch.lstm: partial(_layers, _lstm_tangents),
    torch.gru: partial(_layers, _gru_tangents),
    torch.rnn_tanh: partial(_layers, _rnn_tangents(lambda h: 1 - h * h)),
    torch.rnn_relu: partial(_layers, _rnn_tangents(lambda h: (h > 0).to(h.dtype))),
    PACK_PADDED_SEQUENCE: _pack,
}
