"""A whole training step as one CUDA graph, which spares the launches from Python."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fdfa_ext.model import FDFA

_WARM_UP_STEPS = 3  # libraries choose their algorithms and optimizers make their state in the first


def make_graphed_step(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    example_batch: tuple[Tensor, Tensor],
) -> Callable[[Tensor, Tensor], Tensor]:
    """Captures forward, loss, backward and optimizer step; returns step(input, target) → loss.

    Each call replays the graph: fresh noise, the same result as the eager step. What FDFA is set to, as
    feedback_lr and learns_feedback, is a part of the graph. Making it leaves parameters, feedback,
    noise and optimizer as they were. While it is made, no output or loss of an earlier step may be
    alive: it would tie the capture to that step's stream.

    Args:
        model: in training mode, on a CUDA device; FDFA or any other.
        loss_fn: loss_fn(model(input), target), a scalar.
        optimizer: with capturable=True where it has the option, and with state that starts at zero, as
            that of torch.optim.Adam does. Its learning rate is a part of the graph.
        example_batch: (input, target); all batches must have its shapes and dtypes.

    Raises:
        ValueError: a batch is not on a CUDA device or not like the example, the optimizer cannot be
            captured, the model is not in training mode or has not seen an input yet, or a setting of
            FDFA has changed.
    """
    if not all(group.get("capturable", True) for group in optimizer.param_groups):
        raise ValueError(f"make_graphed_step: make {type(optimizer).__name__} with capturable=True")
    if not model.training:
        raise ValueError("make_graphed_step: the model must be in training mode")
    if any(isinstance(module, FDFA) and not module.prepared for module in model.modules()):
        raise ValueError(
            "make_graphed_step: the feedback does not exist yet; give FDFA example_input, or run one "
            "training forward before making the optimizer"
        )
    for name, tensor in zip(("input", "target"), example_batch, strict=True):
        if not tensor.is_cuda:
            raise ValueError(
                f"make_graphed_step: the example's {name} must be on a CUDA device; got {tensor.device}"
            )
    static = tuple(tensor.clone() for tensor in example_batch)

    def eager_step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_fn(model(static[0]), static[1])
        loss.backward()
        optimizer.step()
        return loss.detach()

    models = [module for module in model.modules() if isinstance(module, FDFA)]
    saved, settings = _saved_state(model, optimizer), [*map(_settings, models)]
    device = static[0].device
    # Streams and graphs belong to the current device, which need not be the model's.
    with torch.cuda.device(device):
        # Capture demands that the steps before it ran on a stream of their own.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_STEPS):
                eager_step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            static_loss = eager_step()
    _restore_state(model, optimizer, saved)

    def step(input: Tensor, target: Tensor) -> Tensor:
        for captured, now in zip(settings, map(_settings, models), strict=True):
            _refuse_changes(captured, now)
        for name, mine, given in zip(("input", "target"), static, (input, target), strict=True):
            if given.shape != mine.shape or given.dtype != mine.dtype:
                raise ValueError(
                    f"graphed step: {name} must be {mine.dtype} {list(mine.shape)} as in the example; "
                    f"got {given.dtype} {list(given.shape)}"
                )
            mine.copy_(given)
        with torch.cuda.device(device):
            graph.replay()
        return static_loss.clone()

    return step


def _settings(model: FDFA) -> dict[str, Any]:
    """What a graph keeps of them that may be set at any time."""
    names = ("feedback_lr", "learns_feedback", "betas", "eps", "noise", "backend")
    return {name: getattr(model, name) for name in names}


def _refuse_changes(captured: dict[str, Any], now: dict[str, Any]) -> None:
    for name, value in captured.items():
        if now[name] != value:
            raise ValueError(
                f"graphed step: {name} was {value!r} when the graph was made, and is {now[name]!r}; "
                "make a graph for each"
            )


def _saved_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    state = {
        parameter: {k: v.clone() for k, v in values.items() if isinstance(v, Tensor)}
        for parameter, values in optimizer.state.items()
    }
    return tensors, state


@torch.no_grad()
def _restore_state(model: nn.Module, optimizer: torch.optim.Optimizer, saved: tuple[Any, Any]) -> None:
    """In place, since the graph has the addresses. What the optimizer has made since becomes zero."""
    tensors, state = saved
    for key, value in model.state_dict().items():
        value.copy_(tensors[key])
    for parameter, values in optimizer.state.items():
        before = state.get(parameter, {})
        for key, value in values.items():
            if isinstance(value, Tensor):
                value.copy_(before[key]) if key in before else value.zero_()
