"""torch's private names that the package uses, each with its reason; the only place that has them.

Checked on torch 2.11 and 2.13. test_torch_internals.py says which one is gone when torch moves.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.modules import module as nn_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._device import DeviceContext
from torch.utils.hooks import RemovableHandle

# Dual tensors while a compiler traces, which forward_ad's functions hide behind Python that it cannot
# follow. An eager step has csrc/dual.h. There is no level but 0.


def traced_make_dual(primal: Tensor, tangent: Tensor) -> Tensor:
    return torch._make_dual(primal, tangent, level=0)


def traced_unpack_dual(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Primal and tangent, None for none."""
    return torch._unpack_dual(x, level=0)


# forward_ad.dual_level takes three times as long: 6 us of a small step.


def enter_dual_level() -> None:
    """Raises RuntimeError, and closes it, where a compiled program has left one open: of its levels
    Python knows nothing, and no later one could be opened."""
    try:
        forward_ad._current_level = torch._C._enter_dual_level()
    except RuntimeError as error:
        if forward_ad._current_level >= 0:  # the user's
            raise
        torch._C._exit_dual_level(level=0)
        raise RuntimeError(
            "FDFA: torch.compile broke the graph within a training forward, where tangents are lost; "
            "compile with fullgraph=True to see where, or leave the model uncompiled"
        ) from error


def exit_dual_level() -> None:
    torch._C._exit_dual_level(level=0)
    forward_ad._current_level = -1


def is_in_dual_level() -> bool:
    return forward_ad._current_level >= 0


# What else sees a call than the package's own mode: fused operators would hide the functions from it.
# torch.device and torch.set_default_device are such modes too, which only mind what makes tensors.


def function_modes() -> int:
    """How many torch function modes are on, but for those of devices."""
    if torch._C._len_torch_function_stack() == 0:
        return 0
    modes = torch.overrides._get_current_function_mode_stack()
    return sum([not isinstance(mode, DeviceContext) for mode in modes])


class without_forward_mode:
    """Within it functions of dual tensors leave tangents as they are."""

    def __enter__(self) -> None:
        self._enabled = torch._C._is_fwd_grad_enabled()
        torch._C._set_fwd_grad_enabled(False)

    def __exit__(self, *error: object) -> None:
        torch._C._set_fwd_grad_enabled(self._enabled)


# torch function modes for a part of the code, which have no other switch.
DisableTorchFunction = torch._C.DisableTorchFunction
EnableTorchFunction = torch._C._EnableTorchFunction


def is_in_transform() -> bool:
    """Whether a transform of torch.func runs, whose tensors wrap others."""
    return torch._C._are_functorch_transforms_active()


# Hooks, which decide what a module's call may do, and have no public reader. Of all modules:
GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)
# and the attributes that hold them and the children of one.
MODULE_CONTENTS = (
    "_modules",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# The functions that nn.Module's call goes through, and what Module.compile puts into an instance.
CALL_NAMES = ("__call__", "_call_impl")
COMPILED_CALL = "_compiled_call_impl"
# What torch.nn.utils.rnn.pack_padded_sequence calls.
PACK_PADDED_SEQUENCE: Any = torch._pack_padded_sequence


def remove_global_hook(hook: RemovableHandle) -> None:
    """As hook.remove(), which leaves behind that a hook of all modules takes keywords: torch.compile
    then warns of hooks."""
    hook.remove()
    nn_module._global_forward_hooks_with_kwargs.pop(hook.id, None)


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """Forward, forward-pre, backward and backward-pre hooks."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def is_compiled(module: nn.Module) -> bool:
    """Whether it is compiled by itself: by torch.compile or by its own method."""
    return isinstance(module, OptimizedModule) or getattr(module, COMPILED_CALL) is not None


def is_in_checkpoint() -> bool:
    """Whether torch.utils.checkpoint, not reentrant, will compute what runs now again, or does so."""
    return _saves_by("_checkpoint_hook", "_recomputation_hook")


def is_recomputing() -> bool:
    """Whether it does so."""
    return _saves_by("_recomputation_hook")


def _saves_by(*hooks: str) -> bool:
    """Whether one of these keeps what autograd saves now."""
    top = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return top is not None and top[0].__qualname__.startswith(hooks)


def is_in_backward() -> bool:
    """Whether autograd runs a backward, which a reentrant checkpoint computes within."""
    return running_backward() != -1


def running_backward() -> int:
    """A number of the backward that runs, of which no other has it."""
    return torch._C._current_graph_task_id()


def when_backward_ends(function: Callable[[], None]) -> None:
    """Runs it when the backward that runs has ended, and what others have put off till then before."""
    queue = torch.autograd.Variable._execution_engine.queue_callback
    queue(lambda: queue(function))


def has_kernel(operator: str, device: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, device.upper())


# Softmax, but zero in a row of -inf alone, as scaled_dot_product_attention has it.
safe_softmax = torch._safe_softmax

# What torch.optim.Adam(fused=True) calls, without its 0.1 ms of bookkeeping.
fused_adam_ = torch.ops.aten._fused_adam_


def graph_break(why: str) -> None:
    """Ends a compiler's graph, so that what follows runs in Python."""
    torch._dynamo.graph_break(msg=why)


def backward_node_of(function: type[torch.autograd.Function]) -> type:
    """The class of the nodes that a function in Python leaves in a graph."""
    node: type = function._backward_cls
    return node


def running_data_parallel() -> DistributedDataParallel | None:
    """That whose forward runs, which no argument of the module within tells."""
    running: DistributedDataParallel | None = DistributedDataParallel._active_ddp_module
    return running


def is_in_join(outer: DistributedDataParallel) -> bool:
    """Whether processes that have no batch left only accompany the others."""
    return bool(outer._join_config.enable)


def mesh_of(module: nn.Module) -> Any:
    """The processes over which fully_shard divides the module's own parameters; None if it does not."""
    from torch.distributed.fsdp import FSDPModule  # which a torch without processes lacks

    if not isinstance(module, FSDPModule):
        return None
    group = module._get_fsdp_state()._fsdp_param_group
    return None if group is None else group.mesh_info.mesh
