"""JVP rules of attention, of which every input may have a tangent.

torch's fused kernels have no forward mode: the weights are computed again for the tangent.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fdfa_ext._ops import fused
from fdfa_ext._torch_internals import safe_softmax
from fdfa_ext.arithmetic import DualRule
from fdfa_ext.duals import has_tangent, make_dual, make_dual_of_fresh, unpack_dual

aten = torch.ops.aten
_ATTENTION = F.scaled_dot_product_attention


def _attention(
    function: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    (q, tq), (k, tk), (v, tv) = map(unpack_dual, (query, key, value))
    alike = q.dtype == k.dtype == v.dtype and not torch.is_autocast_enabled(q.device.type)
    tangents = [t for t in (tq, tk, tv) if t is not None]
    if not alike or not tangents or dropout_p >= 1 or 0 in q.shape[-1:]:
        return None
    if attn_mask is not None and (
        has_tangent(attn_mask) or attn_mask.dim() > q.dim() or (is_causal and dropout_p > 0)
    ):
        return None
    if dropout_p > 0 and q.shape[:-2] != v.shape[:-2]:  # the mask is that of the weights
        return None
    output = None
    if dropout_p == 0:
        output = function(q, k, v, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        k, v, tk, tv = (
            None if t is None else t.repeat_interleave(q.shape[-3] // t.shape[-3], -3)
            for t in (k, v, tk, tv)
        )
    heads = torch.broadcast_shapes(*(t.shape[:-2] for t in (q, k, v)))
    factor = q.shape[-1] ** -0.5 if scale is None else scale

    def matrices(t: Tensor) -> Tensor:
        """[heads, *, *], in one copy for all products."""
        return t.expand(*heads, *t.shape[-2:]).reshape(math.prod(heads), *t.shape[-2:])

    keep = kept = dropped = None
    queries, keys, values = matrices(q), matrices(k).mT, matrices(v)
    with torch.set_grad_enabled(dropout_p > 0 and torch.is_grad_enabled()):
        weights = _weights(queries, keys, factor, heads, attn_mask, is_causal)
        if dropout_p > 0:
            dropped, keep = torch.native_dropout(weights, dropout_p, True)
            output = torch.bmm(dropped, values).view(*heads, q.shape[-2], v.shape[-1])
    with torch.no_grad():
        if keep is not None:
            kept = keep.to(weights.dtype) / (1 - dropout_p)
        tangent = score = None  # of the output, and of what softmax is taken of
        if tq is not None:
            score = _add_product(score, matrices(tq), keys, factor)
        if tk is not None:
            score = _add_product(score, queries, matrices(tk).mT, factor)
        if score is not None:
            score = aten._softmax_backward_data(score, weights, -1, weights.dtype)
            tangent = _add_product(tangent, score if kept is None else score.mul_(kept), values)
        if tv is not None:
            tangent = _add_product(tangent, weights if dropped is None else dropped, matrices(tv))
    assert output is not None
    assert tangent is not None, "one of the three has one"
    return make_dual_of_fresh(output, tangent.view(output.shape))


def _weights(
    queries: Tensor,
    keys: Tensor,
    factor: float,
    heads: Sequence[int],
    mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """[heads, L, S], for queries [heads, L, E] and keys [heads, E, S]."""
    size = queries.shape[1], keys.shape[2]
    if is_causal:
        later = queries.new_full(size, -torch.inf).triu_(1)
        return torch.baddbmm(later, queries, keys, alpha=factor).softmax(-1)
    scores = _add_product(None, queries, keys, factor)
    if mask is None:
        return scores.softmax(-1)
    shaped = scores.view(*heads, *size)
    shaped = shaped.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else shaped + mask
    return safe_softmax(
        shaped.reshape(scores.shape).to(scores.dtype), -1
    )  # zero in a row without any key


def _add_product(sum: Tensor | None, first: Tensor, second: Tensor, factor: float = 1.0) -> Tensor:
    """sum + factor · first @ second, of batches of matrices, in the sum's memory."""
    if sum is None:
        return torch.baddbmm(first.new_empty(1), first, second, beta=0, alpha=factor)
    return sum.baddbmm_(first, second, alpha=factor)


def _self_attention(
    function: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    **others: Any,
) -> tuple[Tensor, None] | None:
    """That of nn.MultiheadAttention, of one sequence [L, N, E]."""
    x, tx = unpack_dual(query)
    parameters = (in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias)
    is_one = query is key and key is value and x.dim() == 3 and tx is not None
    is_simple = (
        bias_k is None
        and bias_v is None
        and not (add_zero_attn or need_weights)
        and key_padding_mask is None
        and (not is_causal if attn_mask is None else attn_mask.shape == (x.shape[0], x.shape[0]))
        and not others.get("use_separate_proj_weight")
        and all(others.get(name) is None for name in ("static_k", "static_v"))
        and not any(p is not None and has_tangent(p) for p in parameters)
        and not torch.is_autocast_enabled(x.device.type)
    )
    if not is_one or not is_simple or in_proj_weight is None or x.shape[2] != embed_dim_to_check:
        return None
    assert tx is not None
    # In [N, L, E], as nn.MultiheadAttention most often has them.
    pair = fused.dual_linear(x.transpose(0, 1), tx.transpose(0, 1), in_proj_weight, in_proj_bias)
    n, length, _ = pair[0].shape
    shape = n, length, 3, num_heads, embed_dim_to_check // num_heads
    heads = [t.view(shape).permute(2, 0, 3, 1, 4).unbind(0) for t in pair]
    parts = [make_dual(*both) for both in zip(*heads, strict=True)]
    if is_causal:  # which torch takes for all that the mask says
        attn_mask = None
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = ~attn_mask  # where it is true attention has none here, and some there
    result = _attention(
        _ATTENTION,
        parts[0],
        parts[1],
        parts[2],
        attn_mask,
        dropout_p if training else 0.0,
        is_causal,
    )
    if result is None:
        return None
    joined = [t.transpose(1, 2).flatten(2) for t in unpack_dual(result)]
    y, ty = fused.dual_linear(*joined, out_proj_weight, out_proj_bias)
    return make_dual(y.transpose(0, 1), ty.transpose(0, 1)), None


ATTENTION_RULES: dict[Any, DualRule] = {
    _ATTENTION: _attention,
    F.multi_head_attention_forward: _self_attention,
}
