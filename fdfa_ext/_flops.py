"""What torch.utils.flop_counter counts of the compiled operators: matrix products, as of torch's."""

import math
from typing import Any

from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from fdfa_ext._ops import fused

# The counter gives shapes where the operators take tensors.


@register_flop_formula(fused.linear)
def _(x: Any, tangent: Any, weight: Any, *_: Any, **__: Any) -> int:
    return (1 if tangent is None else 2) * 2 * math.prod(x) * weight[0]


@register_flop_formula(fused.mm)
def _(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(a) * b[1]


@register_flop_formula(fused.conv2d)
def _(x: Any, tangent: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return (1 if tangent is None else 2) * conv_flop_count(x, weight, out_shape[0])


def _feedback_flops(feedback: Any, error: Any, tangent: Any, outputs: Any) -> int:
    products = 1 if tangent is None and not outputs else 2
    return sum(products * 2 * error[0] * math.prod(matrix) for matrix in feedback)


@register_flop_formula(fused.feedback_step)
def _(
    feedback: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    updates: Any,
    error: Any,
    tangent: Any,
    saved_activations: Any,
    outputs: Any,
    *_: Any,
    **__: Any,
) -> int:
    return _feedback_flops(feedback, error, tangent, outputs)


@register_flop_formula(fused.feedback_gradient)
def _(feedback: Any, error: Any, tangent: Any, saved: Any, outputs: Any, *_: Any, **__: Any) -> int:
    return _feedback_flops(feedback, error, tangent, outputs)
