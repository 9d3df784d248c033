"""How good a method's gradients and feedback are, measured on any model and left without a trace.

Every function puts back what its passes change: feedback and its moments, noise, running statistics,
the gradients that the parameters have and torch's random generators.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from fdfa_ext.data_parallel import measuring
from fdfa_ext.dual_pass import DualPass
from fdfa_ext.duals import first_tensor, with_first
from fdfa_ext.feedback import FeedbackUpdate
from fdfa_ext.feedback_gradients import put_back_later
from fdfa_ext.jvp import point_rules
from fdfa_ext.layers import joins_positions
from fdfa_ext.methods import BlockMethod
from fdfa_ext.model import FDFA, inputs_of
from fdfa_ext.patches import as_image, as_sequence, patch_means, spread
from fdfa_ext.points import channels_first_at, place_of
from fdfa_ext.positions import Positions, Source

Loss = Callable[[Any, Any], Tensor]  # of what the model returns, and the target
Batch = tuple[Any, Any]  # input, as example_input of FDFA has it, and target


def gradient_alignment(
    model: FDFA, batch: Batch, loss_fn: Loss = F.cross_entropy, draws: int = 1
) -> dict[str, float]:
    """Angle in degrees between estimated and true gradient, for each parameter  (Fig. 8).

    The estimate is the mean over `draws` of the noise, with the feedback as it stands. One draw will do
    for methods that project the error by B; forward gradients need as many as they have dimensions.
    Dropout and other random modules do the same in each draw and for the true gradient.

    Args:
        model: an FDFA of any method.
        batch: (input, target). The input is what the model takes: a tensor, a tuple of inputs, or a
            dict of keyword inputs.
        loss_fn: loss_fn(model(input), target), a scalar.

    Returns:
        name within the module → angle from 0 to 180; 90 where a gradient is zero.

    Raises:
        ValueError: draws is below 1, or the model has not seen an input yet.
    """
    with _untouched(model):
        with _own_randomness(model), _images_in_channels_last(model):
            exact = _gradients(model, loss_fn(_run(model, model.module, batch[0]), batch[1]))
        with _held_feedback(model):
            estimates = _estimates(model, batch, loss_fn, draws, one_mask=True)
            mean = next(estimates)
            for estimate in estimates:
                for name, value in estimate.items():
                    mean[name] += value  # the length of a sum does not matter to its angle
    return {name: _angle(mean[name], value) for name, value in exact.items()}


def feedback_norm(model: FDFA) -> dict[str, float]:
    """Frobenius norm of each block's B, by the block's name."""
    norms = {name: torch.linalg.vector_norm(b.detach()) for name, b in model.feedback.items()}
    # A DTensor has a part of it in each process.
    return {
        name: float(n.full_tensor() if hasattr(n, "full_tensor") else n) for name, n in norms.items()
    }


def estimator_variance(
    model: FDFA,
    batch: Batch,
    loss_fn: Loss = F.cross_entropy,
    draws: int = 32,
    normalize: bool = False,
) -> dict[str, float]:
    """Variance of the estimate over the noise, mean over a parameter's elements  (z₂ of eq. 18).

    Every draw starts from the same feedback, which moves by the model's own rule as in a step that
    learns it: with rule "ema" this is the variance of Proposition 2. Zero for methods without noise,
    but for what random modules add, such as dropout.

    Args:
        model: an FDFA of any method.
        batch: (input, target). The input is what the model takes: a tensor, a tuple of inputs, or a
            dict of keyword inputs.
        loss_fn: loss_fn(model(input), target), a scalar.
        draws: of the noise; 2 or more.
        normalize: divide by the mean square of the estimates' elements, as in Fig. 7.

    Returns:
        name within the module → variance, unbiased.

    Raises:
        ValueError: draws is below 2, or the model has not seen an input yet.
    """
    if draws < 2:
        raise ValueError(f"estimator_variance: draws must be 2 or more; got {draws}")
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    first: dict[str, Tensor] = {}
    with _untouched(model):
        for estimate in _estimates(model, batch, loss_fn, draws):
            for name, value in estimate.items():
                # From the first estimate, so that a variance far below the square loses no digits.
                first.setdefault(name, value)
                apart = (value - first[name]).double()
                sums[name] = sums.get(name, 0) + apart
                squares[name] = squares.get(name, 0) + apart.square()
    result = {}
    for name, total in sums.items():
        variance = ((squares[name] - total.square() / draws) / (draws - 1)).mean()
        if normalize:
            mean = first[name].double() + total / draws
            variance = variance / (mean.square().mean() + variance * (draws - 1) / draws)
        result[name] = float(variance)
    return result


def feedback_alignment(model: FDFA, input: Any) -> dict[str, float]:
    """Angle in degrees between B and the mean Jacobian ∂output/∂block over a batch  (eq. 12).

    The Jacobian is that of `mean_jacobian`. B of patches is compared with it pixel by pixel.

    Args:
        model: an FDFA of a method with feedback.
        input: the module's input, of N samples.

    Returns:
        block → angle from 0 to 180.

    Raises:
        ValueError: the method has no feedback, or it does not exist yet.
    """
    if len(model.feedback) == 0:
        raise ValueError(
            "feedback_alignment: the model has no feedback matrices; use a method that has, and pass "
            "example_input or run one training forward"
        )
    angles = {}
    for name, jacobian in mean_jacobian(model, input).items():
        matrix = model.feedback[name]
        if model.patch > 1:
            jacobian = _as_image(model, name, jacobian)
            matrix = spread(matrix, jacobian.shape, model.patch)
        elif matrix.numel() != jacobian.numel():
            raise ValueError(
                f"feedback_alignment: block '{name}': B is {list(matrix.shape)}, and the Jacobian "
                f"{list(jacobian.shape)}; give inputs of the size that the model has trained on"
            )
        angles[name] = _angle(matrix, jacobian)
    return angles


def mean_jacobian(model: FDFA, input: Any) -> dict[str, Tensor]:
    """The mean Jacobian ∂output/∂block over a batch, exact: what B of "fdfa" estimates  (eq. 12).

    It is that of the module in eval mode. Of tokens, pixels and nodes it is that of an output with
    respect to the features at its own place, as B is. It takes K backward passes for each position of
    the output, and for each row where rows depend on each other, as nodes of a graph do.

    Args:
        model: an FDFA of any method; of one with blocks where the output is not [N, K].
        input: the module's input, of N samples, as example_input of FDFA has it.

    Returns:
        block → [K, *features].

    Raises:
        ValueError: the model has not seen an input yet, or its output is not what its method takes.
    """
    features: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> Tensor:
        # A tensor of its own, whatever the block's parameters want: the block may return its input. A
        # copy goes on, which may be changed in place.
        features[name] = output.clone() if output.requires_grad else output.detach().requires_grad_()
        return features[name].clone()

    with _untouched(model):
        model.module.eval()
        layout = _Layout(model, input)
        with _at_blocks(model, keep), _at_output(model) as outputs:
            _run(model, model.module, input)
        rows = layout.rows(outputs[0])  # [N · positions, K]
        kept = list(features.values())

        def gradients(of: Tensor) -> dict[str, Tensor]:
            # Zero, not None, for a block that the output does not depend on.
            found = torch.autograd.grad(
                of, kept, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            return {
                name: layout.rows_of(name, _wide(t)) for name, t in zip(features, found, strict=True)
            }

        # Marked one after the other: a row of each sample; or, as nodes of a graph may depend on each
        # other, a row by itself.
        step = max(len(rows) // max(len(outputs[0]), 1), 1)
        if _samples_depend(rows, step, gradients, layout):
            step = len(rows)
        found: dict[str, list[Tensor]] = {name: [] for name in features}
        for k in range(rows.shape[1]):
            totals = {name: torch.zeros(()) for name in features}
            for first in range(step):
                marks = _marks(rows, slice(first, None, step))
                for name, own in gradients((rows[:, k : k + 1] * marks).sum()).items():
                    part = (layout.shares(name, marks, own) * own).sum(0)
                    totals[name] = totals[name] + part / max(len(own), 1)
            for name, total in totals.items():
                found[name].append(total)
    return {name: torch.stack(rows) for name, rows in found.items()}


def feedback_ceiling(
    model: FDFA, batch: Batch, loss_fn: Loss = F.cross_entropy, patch: int = 1
) -> dict[str, float]:
    """`gradient_alignment` with the exact mean Jacobian as B: what a perfect estimate would reach.

    Args:
        model: an FDFA of any method; its own feedback plays no part.
        batch: (input, target). The input is what the model takes: a tensor, a tuple of inputs, or a
            dict of keyword inputs.
        loss_fn: loss_fn(model(input), target), a scalar. A loss on hidden activations plays no part.
        patch: side of the patches of images, or positions of those of sequences, over which the
            Jacobian is averaged.

    Returns:
        name within the module → angle from 0 to 180.

    Raises:
        ValueError: as of `mean_jacobian`.
    """
    jacobians = mean_jacobian(model, batch[0])
    features: dict[str, Tensor] = {}

    def cut(name: str, output: Tensor) -> Tensor:
        features[name] = output
        return output.detach().clone()

    with _untouched(model):
        layout = _Layout(model, batch[0])
        with _own_randomness(model):
            exact = _gradients(model, loss_fn(_run(model, model.module, batch[0]), batch[1]))
        with _own_randomness(model), _at_blocks(model, cut), _at_output(model) as outputs:
            loss = loss_fn(_run(model, model.module, batch[0]), batch[1])
        (error,) = torch.autograd.grad(loss, outputs[0], retain_graph=True)
        error = layout.rows(error)
        model.zero_grad(set_to_none=True)
        ends = [(loss, torch.ones_like(loss))]
        for name, output in features.items():
            jacobian = jacobians[name]
            if patch > 1:
                image = _as_image(model, name, jacobian)
                means = spread(patch_means(image, patch), image.shape, patch)
                jacobian = _as_output(model, name, means, jacobian.shape)
            delta = layout.errors(name, error) @ jacobian.flatten(1).to(error.dtype)
            ends.append((output, layout.of_rows(name, delta.unflatten(1, jacobian.shape[1:]))))
        wanted = [(t, gradient) for t, gradient in ends if t.requires_grad]
        torch.autograd.backward([t for t, _ in wanted], [gradient for _, gradient in wanted])
        found = _collected(model)
        return {name: _angle(found[name], value) for name, value in exact.items()}


def _wide(t: Tensor) -> Tensor:
    """In float32 or float64, so that a sum keeps its digits."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _samples_depend(
    rows: Tensor, step: int, gradients: Callable[[Tensor], dict[str, Tensor]], layout: "_Layout"
) -> bool:
    """Whether samples, of `step` rows each, have features that outputs of others depend on: signs of
    their outputs are then not those of their gradients."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (len(rows) // step, 1), generator=generator).to(rows) * 2 - 1
    signs = signs.repeat_interleave(step, 0)
    plain, signed = gradients(rows.sum()), gradients((rows * signs).sum())
    for name, own in plain.items():
        turned = layout.shares(name, signs, own) * own
        if (signed[name] - turned).abs().sum() > 1e-3 * own.abs().sum():
            return True
    return False


def _marks(rows: Tensor, which: slice) -> Tensor:
    """[len(rows), 1]: one at these, else zero."""
    marks = rows.new_zeros(len(rows), 1)
    marks[which] = 1
    return marks


class _Layout:
    """Which rows of the network's output those of a block's belong to, with this input."""

    def __init__(self, model: FDFA, input: Any) -> None:
        self._method = type(model.method).__name__
        self._step = model._step(model.module, *inputs_of(model.module, input))
        self._dual: DualPass | None = None  # of methods without blocks
        self._positions: dict[str, Positions | None] = {}
        self._sources: dict[str, Source | None] = {}
        if isinstance(model.method, BlockMethod):
            self._dual, rows, _ = self._step.dry_run()
            for part in self._dual.parts(len(rows)):
                for record in part.records:
                    self._positions[record.name] = record.positions
                    self._sources[record.name] = part.source

    def rows(self, output: Tensor) -> Tensor:
        """The network's output, or its gradient, with a row for each sample, token or pixel."""
        if self._dual is not None:
            return self._step.rows(self._dual, output, None)[0]
        if output.dim() != 2:
            raise ValueError(
                f"mean_jacobian: method {self._method} knows outputs [N, K] alone; got "
                f"{list(output.shape)}; measure on a model of another method, such as dfa"
            )
        return output

    def rows_of(self, name: str, t: Tensor) -> Tensor:
        """The same of a block's."""
        positions = self._positions.get(name)
        return t if positions is None else positions.rows(t)

    def of_rows(self, name: str, rows: Tensor) -> Tensor:
        positions = self._positions.get(name)
        return rows if positions is None else positions.of_rows(rows)

    def errors(self, name: str, rows: Tensor) -> Tensor:
        """Of each row of a block, from the errors of the output's."""
        source = self._sources.get(name)
        return rows if source is None else source.errors(rows)

    def shares(self, name: str, rows: Tensor, like: Tensor) -> Tensor:
        """Of each row of the block, the mean of these [N · positions, 1] that it belongs to, in a shape
        to multiply rows of features like these with."""
        source = self._sources.get(name)
        means = rows if source is None else source.tangents(rows)
        return means.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def _as_image(model: FDFA, name: str, values: Tensor) -> Tensor:
    """[*, *features] of a block's output in the shape in which a block in patches counts them."""
    if joins_positions(model.network.blocks[name]) and values.dim() > 3:
        values = values.flatten(1, -2)
    first = _has_channels_first(model, name)
    return as_image(values, first) if values.dim() == 3 else values


def _as_output(model: FDFA, name: str, values: Tensor, shape: torch.Size) -> Tensor:
    """The values that `_as_image` was given, of this shape."""
    if values.dim() == 4 and (len(shape) == 3 or joins_positions(model.network.blocks[name])):
        values = as_sequence(values, _has_channels_first(model, name))
    return values.reshape(shape)


def _has_channels_first(model: FDFA, name: str) -> bool:
    own = next(own for own in model.network.passes if own.name == name)
    return bool(channels_first_at(model.module, own.module))


@contextmanager
def _images_in_channels_last(model: FDFA) -> Iterator[None]:
    """Within it images lie in memory as in training: dropout draws in memory order."""

    def before(_: object, args: Any) -> Any:
        return tree_map(_in_channels_last, args)

    blocks = {*model.network.blocks.values()}
    hooks = [block.register_forward_pre_hook(before) for block in blocks]
    plan = model.network.plan
    rules = point_rules() if plan is not None and plan.has_points else nullcontext()
    try:
        with _at_blocks(model, lambda _, output: _in_channels_last(output)), rules:
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _in_channels_last(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.dim() != 4:
        return value
    value = value.contiguous(memory_format=torch.channels_last)
    # With one channel or pixel torch keeps row-major strides, and makes more of them.
    _, c, h, w = value.shape
    return value.as_strided(value.shape, (h * w * c, 1, w * c, c))


@contextmanager
def _at_blocks(model: FDFA, function: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Within it each block hands out what function(name, output) returns, and so do other points."""
    names: dict[str, list[str]] = {}  # of the uses of each block or point
    for own in model.network.passes:
        names.setdefault(own.module, []).append(own.name)
    uses: dict[str, Iterator[str]] = {}

    def start(module: nn.Module, inputs: Any) -> None:
        uses.clear()
        uses.update({point: iter(of_point) for point, of_point in names.items()})

    def replace(point: str, result: Any) -> Any:
        first = first_tensor(result)
        assert first is not None, "training has seen the same"
        name = next(uses[point], None)  # more uses than training has seen have no feedback
        return result if name is None else with_first(result, function(name, first))

    def after(point: str, module: nn.Module, inputs: Any, result: Any) -> Any:
        return replace(point, result)

    def before(point: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return replace(point, args), kwargs
        return args, dict(zip(kwargs, replace(point, (*kwargs.values(),)), strict=True))

    handles: list[RemovableHandle] = [model.module.register_forward_pre_hook(start)]
    for point in names:
        block, at_input = place_of(model.module, point)
        if at_input:
            hook = block.register_forward_pre_hook(partial(before, point), with_kwargs=True)
        else:
            hook = block.register_forward_hook(partial(after, point))
        handles.append(hook)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _at_output(model: FDFA) -> Iterator[list[Tensor]]:
    """The network's outputs within it, each with a graph."""
    outputs: list[Tensor] = []

    def hook(module: nn.Module, inputs: Any, result: Any) -> Any:
        if not isinstance(result, Tensor):
            raise ValueError(
                f"mean_jacobian: the model returns {type(result).__name__}; name the module that "
                "returns the output by output= of FDFA"
            )
        outputs.append(result if result.requires_grad else result.detach().requires_grad_())
        return outputs[-1]

    name = model.network.output
    end = model.module if name is None else model.module.get_submodule(name)
    handle = end.register_forward_hook(hook)
    try:
        yield outputs
    finally:
        handle.remove()


def _estimates(
    model: FDFA, batch: Batch, loss_fn: Loss, draws: int, one_mask: bool = False
) -> Iterator[dict[str, Tensor]]:
    """The method's gradients from `draws` draws of the noise and always the same feedback.

    one_mask: random modules do the same in each draw, or torch's generators go on as they do.
    """
    if draws < 1:
        raise ValueError(f"gradient_alignment: draws must be 1 or more; got {draws}")
    model.training = True
    start = _state(model)
    for _ in range(draws):
        with _own_randomness(model) if one_mask else nullcontext():
            loss = loss_fn(_run(model, model, batch[0]), batch[1])
            found = _gradients(model, sum((loss_fn(o, batch[1]) for o in model.local_outputs), loss))
        yield found
        _restore(model, start, but="noise_state")


def _run(model: FDFA, module: nn.Module, input: Any) -> Any:
    args, kwargs = inputs_of(model.module, input)
    with measuring():
        return module(*args, **kwargs)


def _gradients(model: FDFA, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return _collected(model)


def _collected(model: FDFA) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.module.named_parameters()
        if p.requires_grad
    }


def _own_randomness(model: FDFA) -> AbstractContextManager[None]:
    """What is drawn from torch's generators within starts from where they are and leaves them there."""
    device = model.noise_state.device
    return torch.random.fork_rng([] if device.type == "cpu" else [device], device_type="cuda")


def _tensors(model: FDFA) -> Iterator[tuple[str, Tensor]]:
    """With the buffers that state_dict leaves out."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _state(model: FDFA) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in _tensors(model)}


@torch.no_grad()
def _restore(model: FDFA, state: dict[str, Tensor], but: str = "") -> None:
    for name, tensor in _tensors(model):
        if name != but:
            tensor.copy_(state[name])


class _NoUpdate(FeedbackUpdate):
    def step(self, name: str, feedback: Tensor, gradient: Tensor) -> None:
        """Leaves B as it is."""


@contextmanager
def _held_feedback(model: FDFA) -> Iterator[None]:
    """Within it B stays as it is."""
    update, learning_rate = model.feedback_update, model.learning_rate
    model.learning_rate = torch.zeros_like(learning_rate)
    if update is not None:
        model._modules["feedback_update"] = _NoUpdate()
    try:
        yield
    finally:
        model.learning_rate = learning_rate
        if update is not None:
            model._modules["feedback_update"] = update


@contextmanager
def _untouched(model: FDFA) -> Iterator[None]:
    if not model.prepared:
        raise ValueError(
            "fdfa_ext.metrics: the model has not seen an input yet; pass example_input to FDFA or run "
            "one training forward"
        )
    state = _state(model)
    gradients = {p: p.grad for p in model.parameters()}
    put_back = put_back_later(model.feedback_parameters())
    modes = {module: module.training for module in model.modules()}
    local_outputs, learns = model.local_outputs, model.learns_feedback
    try:
        if model.method.feedback == "learned" and not learns:
            model.learns_feedback = True
        with torch.enable_grad(), _own_randomness(model):
            yield
    finally:
        _restore(model, state)
        model.local_outputs = local_outputs
        if model.learns_feedback != learns:
            model.learns_feedback = learns
        for p, gradient in gradients.items():
            p.grad = gradient
        put_back()
        for module, mode in modes.items():
            module.training = mode


def _angle(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().flatten().double(), b.detach().flatten().double()
    # Half-angle form: exact near 0 and 180, where the arc cosine loses half its digits.
    a, b = a * b.norm(), b * a.norm()
    if not a.any() or not b.any():
        return 90.0
    return float(torch.rad2deg(2 * torch.atan2((a - b).norm(), (a + b).norm())))
