"""The feedback step computes what the reference in plain torch defines, and a refused one changes nothing."""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from operands import DTYPES, RATE, assert_close, noise_state, rand
from torch import Tensor

from fdfa_ext import reference
from fdfa_ext._ops import fused


def feedback_step(
    ops: Any,
    matrices: Sequence[Tensor],
    updates: Tensor | None,
    saved_activation: Tensor,
    *common: Any,
    output: Tensor | None = None,
    decay: float = 1.0,
) -> Tensor:
    """δ of one block. matrices: B and its moments, of which only B moves without `updates`.

    common: error, tangent, noise_state, block, activation, noise.
    """
    error, tangent, state, block, activation, noise = common
    outputs = [] if output is None else [output]
    feedback, *moments = [[m] for m in matrices] if updates is not None else [[matrices[0]], [], []]
    order = torch.channels_last if not matrices[0].is_contiguous() else torch.contiguous_format
    delta = torch.empty_like(saved_activation, memory_format=order)
    numbers = (decay, RATE, 0.9, 0.999, 1e-8)
    rest = (
        error,
        tangent,
        [saved_activation],
        outputs,
        state,
        [block],
        [activation],
        noise,
        *numbers,
        [delta],
    )
    biased = saved_activation.dim() == 2
    bias_grads = (
        [torch.full(saved_activation.shape[1:], torch.nan, device=saved_activation.device)]
        if biased
        else []
    )
    output_bias_grad = torch.full(error.shape[1:], torch.nan, device=saved_activation.device)
    ops.feedback_step(feedback, *moments, updates, *rest, bias_grads, output_bias_grad)
    torch.testing.assert_close(output_bias_grad, error.float().sum(0), rtol=1e-4, atol=1e-4)
    if biased:
        torch.testing.assert_close(bias_grads[0], delta.float().sum(0), rtol=1e-4, atol=1e-4)
    return delta


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("follows", "rule"),
    [*product(["tangent", "outputs"], ["ema", "adam", "gradient"]), ("nothing", "fixed")],
)
@pytest.mark.parametrize("activation", ["identity", "relu", "sigmoid", "gelu"])
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [
        ((1, 1), 1),
        ((5, 129), 10),
        ((130, 151), 3),
        ((4, 3, 5), 2),
        ((2, 3, 4, 5), 7),
        ((3, 70), 130),
        ((200, 70), 140),  # more than a tile of each
        ((0, 6), 4),
    ],
)
def test_feedback_step_is_the_reference(
    device: torch.device,
    dtype: torch.dtype,
    follows: str,
    rule: str,
    activation: str,
    shape: tuple[int, ...],
    outputs: int,
) -> None:
    """For B as it follows the tangent (FDFA), the blocks' outputs (Kolen-Pollack) or nothing."""
    order = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    saved_activation = rand(*shape, dtype=dtype, device=device)
    if activation == "sigmoid":  # whose derivative y (1 - y) is small for a y that it may have
        saved_activation = saved_activation.sigmoid()
    error = torch.randn(shape[0], outputs, device=device)
    tangent = torch.randn_like(error) if follows == "tangent" else None
    state = noise_state(device) if follows == "tangent" else None
    y = rand(*shape, dtype=dtype, device=device) if follows == "outputs" else None
    decay = 0.3 if follows == "outputs" else 1.0
    feedback = torch.randn(outputs, *shape[1:], device=device).contiguous(memory_format=order)
    exp_avg = torch.randn_like(feedback)
    exp_avg_sq = torch.rand_like(feedback) + 0.1
    results = []
    for ops in (fused, reference):
        matrices = [feedback.clone(), exp_avg.clone(), exp_avg_sq.clone()]
        if rule == "gradient":
            ys = [] if y is None else [y]
            rest = (error, tangent, [saved_activation], ys, state, [2], [activation], "gaussian", decay)
            (delta,), (gradient,) = ops.feedback_gradient([matrices[0]], *rest)
            assert torch.equal(matrices[0], feedback)
            results.append((delta, gradient))
        else:
            updates = torch.tensor([3], device=device) if rule == "adam" else None
            common = (error, tangent, state, 2, activation, "gaussian")
            delta = feedback_step(
                ops, matrices, updates, saved_activation, *common, output=y, decay=decay
            )
            assert updates is None or updates == 4
            assert torch.equal(matrices[0], feedback) == (
                follows == "nothing" or len(saved_activation) == 0
            )
            results.append((delta, *matrices))
    (delta, *matrices), (delta2, *matrices2) = results
    for actual, expected in zip(matrices, matrices2, strict=True):
        assert actual.stride() == expected.stride()
        assert_close(actual, expected, torch.float32)
    assert_close(delta, delta2, dtype, scale=outputs**0.5)


def test_blocks_of_several_sizes_and_dtypes_step_as_each_would_alone(device: torch.device) -> None:
    shapes, dtypes = ((4, 3), (4, 2, 5, 5), (4, 200)), (torch.float32, torch.float32, torch.bfloat16)
    activations = ["relu", "identity", "gelu"]
    error, tangent = torch.randn(2, 4, 3, device=device).unbind()
    state = noise_state(device)
    saved_activations = [
        rand(*shape, dtype=dtype, device=device) for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    matrices = [
        [torch.rand(3, *shape[1:], device=device) for shape in shapes] for _ in range(3)
    ]  # B, exp_avg, exp_avg_sq
    alone = [[t.clone() for t in block] for block in zip(*matrices, strict=True)]
    deltas = [torch.empty_like(saved_activation) for saved_activation in saved_activations]
    common = (error, tangent, saved_activations, [], state, [0, 1, 2], activations, "gaussian")
    numbers = (1.0, RATE, 0.9, 0.999, 1e-8)
    sums = [
        torch.empty(3, device=device),
        torch.empty(0, device=device),
        torch.empty(200, device=device),
    ]
    updates = torch.tensor([6], device=device)
    fused.feedback_step(*matrices, updates, *common, *numbers, deltas, sums)
    assert updates == 7
    for i in (0, 2):
        torch.testing.assert_close(sums[i], deltas[i].float().sum(0))
    for i, block in enumerate(alone):
        updates = torch.tensor([6], device=device)
        rest = (error, tangent, state, i, activations[i], "gaussian")
        assert torch.equal(feedback_step(fused, block, updates, saved_activations[i], *rest), deltas[i])
        for actual, expected in zip(block, (kind[i] for kind in matrices), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("rule", "overflows"),
    [("ema", [math.inf, math.nan]), ("adam", [math.inf, math.nan]), ("adam", [1e25, -1e25])],
)
def test_a_batch_that_overflowed_leaves_what_it_reached_of_the_feedback_alone(
    device: torch.device, rule: str, overflows: list[float]
) -> None:
    """The rest of B moves as ever: a tangent of inf or NaN, or one whose square is infinite, reaches one
    row of B from one output."""
    saved_activation, error = torch.randn(5, 70, device=device), torch.randn(5, 4, device=device)
    tangent = torch.randn(5, 4, device=device)
    tangent[1, 2], tangent[3, 0] = overflows
    results = []
    for ops in (fused, reference):
        matrices = list((torch.rand(3, 4, 70, generator=torch.Generator().manual_seed(1))).to(device))
        before = [m.clone() for m in matrices]
        updates = torch.tensor([1], device=device) if rule == "adam" else None
        common = (error, tangent, noise_state(device), 0, "relu", "gaussian")
        results.append([feedback_step(ops, matrices, updates, saved_activation, *common), *matrices])
        for matrix, old in zip(matrices[: 3 if rule == "adam" else 1], before, strict=False):
            assert torch.equal(matrix[[0, 2]], old[[0, 2]])
            assert not (matrix[[1, 3]] == old[[1, 3]]).all(1).any()
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, torch.float32)


def test_the_feedback_step_takes_either_setting_of_tf32(device: torch.device) -> None:
    """torch refuses to read the older one once the newer one differs from it."""
    saved_activation, error = torch.randn(5, 70, device=device), torch.randn(5, 4, device=device)
    feedback = torch.randn(4, 70, device=device)
    rest = (error, error, noise_state(device), 0, "identity", "gaussian")
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "tf32"
        delta = feedback_step(fused, [feedback], None, saved_activation, *rest)
    finally:
        settings.fp32_precision = before
    torch.testing.assert_close(delta, error @ feedback, rtol=1e-2, atol=1e-2)


def test_a_transposed_delta_is_the_same() -> None:
    """As the weight gradient takes it."""
    saved_activation, error, tangent = torch.randn(33, 70), *torch.randn(2, 33, 10).unbind()
    deltas = torch.empty(33, 70), torch.empty(70, 33).t()
    sums: list[Tensor] = []
    for delta in deltas:
        follows = (tangent, [saved_activation], [], noise_state(torch.device("cpu")))
        rest = ([1], ["tanh"], "gaussian", 1.0, RATE, 0.9, 0.999, 1e-8, [delta])
        sums.append(torch.empty(70))
        fused.feedback_step([torch.ones(10, 70)], [], [], None, error, *follows, *rest, sums[-1:])
    assert torch.equal(*deltas)
    assert torch.equal(*sums)
    torch.testing.assert_close(sums[0], deltas[0].sum(0))


def test_strided_inputs_give_the_dense_result(device: torch.device) -> None:
    state = noise_state(device)
    x, tangent = torch.randn(2, 6, 10, device=device).unbind()
    weight = torch.randn(9, 5, device=device)
    strided = (x[:, ::2], tangent[:, ::2])
    dense = [t.contiguous() for t in strided]
    for a, b in zip(
        fused.linear(*strided, weight.t().contiguous().t(), None, state, 0, "relu", "gaussian"),
        fused.linear(*dense, weight, None, state, 0, "relu", "gaussian"),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    saved_activation = torch.randn(9, 6, device=device).t()
    error = torch.randn(4, 6, device=device).t()
    results = []
    for g, e in ((saved_activation, error), (saved_activation.contiguous(), error.contiguous())):
        feedback = torch.zeros(4, 9, device=device)
        delta = feedback_step(fused, [feedback], None, g, e, e, state, 0, "relu", "gaussian")
        results.append((feedback, delta))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    state = noise_state(torch.device("cpu"))
    y = torch.randn(40, 5000)
    error = torch.randn(40, 10)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        matrices = torch.zeros(3, 10, 5000).unbind()
        common = (error, error, state, 1, "relu", "gaussian")
        delta = feedback_step(fused, matrices, torch.tensor([0]), y, *common)
        results.append((fused.perturb(y, y, state, 1, "gaussian"), *matrices, delta))
    torch.set_num_threads(1)
    for one, several in zip(*results, strict=True):
        assert torch.equal(one, several)


def test_a_refused_feedback_step_changes_nothing(device: torch.device) -> None:
    """Of two blocks the second one is wrong."""
    saved_activation, error = torch.randn(3, 5, device=device), torch.randn(3, 2, device=device)
    feedback, m, v = (torch.randn(2, 5, device=device) for _ in range(3))
    updates = torch.tensor([1], device=device)
    delta = torch.zeros_like(saved_activation)
    good = {
        "feedback": [feedback, feedback], "exp_avg": [m, m], "exp_avg_sq": [v, v], "updates": updates,
        "error": error, "tangent": error, "saved_activations": [saved_activation, saved_activation], "outputs": [],
        "noise_state": noise_state(device), "blocks": [0, 1], "activations": ["relu", "relu"],
        "noise": "gaussian", "decay": 1.0, "lr": RATE, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8,
        "deltas": [delta, delta], "bias_grads": [],
    }  # fmt: skip
    before = [t.clone() for t in (feedback, m, v, updates, delta)]
    for change, message in (
        ({"tangent": error[:2]}, "tangent must have shape"),
        ({"noise_state": None}, "a tangent needs the noise_state"),
        ({"outputs": [saved_activation, saved_activation]}, "the feedback follows the tangent or the outputs, not both"),
        ({"tangent": None}, "updates without tangent or outputs"),
        ({"tangent": None, "outputs": [saved_activation]}, "outputs must have one entry for each of 2 blocks; got 1"),
        ({"tangent": None, "outputs": [saved_activation, saved_activation[:2]]}, r"output must have shape \[3, 5\]"),
        ({"saved_activations": [saved_activation, saved_activation[:2]]}, r"saved_activation must be \[3, \*features\]; got \[2, 5\]"),
        ({"saved_activations": [saved_activation]}, "saved_activations must have one entry for each of 2 blocks; got 1"),
        ({"feedback": [feedback, feedback[:, :4]]}, r"feedback must have shape \[2, 5\]"),
        ({"updates": None}, "Adam needs exp_avg, exp_avg_sq and updates"),
        ({"lr": RATE.float()}, "lr must be a float64 scalar on the CPU; got Float"),
        ({"exp_avg": []}, "Adam needs exp_avg, exp_avg_sq and updates"),
        ({"exp_avg_sq": [v, v[:, :4]]}, "exp_avg_sq must have shape"),
        ({"deltas": [delta, delta[:, :4]]}, "delta must have shape"),
        ({"deltas": [delta, torch.zeros(3, 10, device=device)[:, ::2]]}, "delta must have the memory order"),
        ({"bias_grads": [delta[0]]}, "bias_grads must have one entry for each of 2 blocks; got 1"),
        ({"bias_grads": [delta[0], delta[0, :4]]}, r"bias_grads must have shape \[5\]; got \[4\]"),
        ({"output_bias_grad": delta[0]}, r"output_bias_grad must have shape \[2\]; got \[5\]"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="fdfa::feedback_step: " + message):
            fused.feedback_step(**{**good, **change})
        with pytest.raises(ValueError, match="activation must be one of"):
            fused.feedback_step(**{**good, "activations": ["relu", "swish"]})
        for tensor, old in zip((feedback, m, v, updates, delta), before, strict=True):
            assert torch.equal(tensor, old)


def test_a_compiler_knows_the_order_of_a_large_delta() -> None:
    """Its code asserts the strides that the fake kernel foretells."""
    features = 1 << 14
    saved_activation, error = torch.randn(2, features), torch.randn(2, 3)
    args = ([torch.zeros(3, features)], error, error, [saved_activation], [])
    rest = (noise_state(torch.device("cpu")), [0], ["relu"], "gaussian", 1.0)
    torch.library.opcheck(fused.feedback_gradient.default, (*args, *rest), test_utils="test_faketensor")


def test_a_feedback_node_refuses_lists_of_other_lengths() -> None:
    """Before its backward would have moved B."""
    x, saved_activation = torch.randn(3, 2), torch.randn(3, 5)
    good = {
        "x": x, "tangent": x, "weight": None, "bias": None, "noise_state": noise_state(torch.device("cpu")),
        "anchors": [saved_activation.clone().requires_grad_()], "biases": [], "biased": [],
        "saved_activations": [saved_activation], "donated": [False], "outputs": [],
        "feedback": [torch.randn(2, 5)], "exp_avg": [], "exp_avg_sq": [], "updates": torch.tensor([0]),
        "blocks": [0], "activations": ["relu"], "noise": "gaussian", "rule": "ema",
        "decay": 1.0, "lr": RATE, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8,
    }  # fmt: skip
    fused.feedback_node(**good).sum().backward()
    before = good["noise_state"].clone()
    for change, message in (
        ({"anchors": []}, "anchors must have one entry for each of 1 blocks; got 0"),
        ({"donated": []}, "donated must have one entry for each of 1 blocks; got 0"),
        ({"weight": torch.randn(4), "input": torch.randn(3, 4)}, "x and weight must be matrices"),
    ):
        with pytest.raises(RuntimeError, match="fdfa::feedback_node: " + message):
            fused.feedback_node(**{**good, **change})
    assert torch.equal(good["noise_state"], before)
