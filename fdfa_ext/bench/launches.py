"""How many kernels and memory operations a training step launches on CUDA, reckoned without a GPU.

That is the number of nodes of its CUDA graph. A table says for each operator what it launches; the
operators are those of a step on the CPU, which calls the same ones. Print the counts of the nets with
``python -m fdfa_ext.bench.launches``.

Launches of this package's operators are those of csrc/ops. Those of torch's were read in its sources
and not seen on a GPU. Libraries choose their kernels by shape: where they may take several for one
call, as cuDNN and cuBLAS do for a sum in parts, one is counted, for all methods alike. float32 alone.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fdfa_ext.bench.implementations import Case, training_step

NETS = ("mlp2", "mlp4", "cnn", "alexnet")
METHODS = ("fdfa", "bp")

_Arguments = Mapping[str, Any]  # by the names of the operator's schema
_Count = int | Callable[[_Arguments], int]

# Of csrc/cuda/feedback_step.cu: blocks of one launch, and columns of a thread block that has wide ones.
_FEEDBACK_BLOCKS = 16
_WIDE_COLUMNS = 32
_MULTIPROCESSORS = 132  # of an H100 or H200


def count_launches(step: Callable[[], None]) -> Counter[str]:
    """Launches of one step on CUDA by operator, for a step on the CPU.

    Raises:
        LookupError: the table lacks an operator of the step.
    """
    counter = _Counter()
    with operators_of_cuda(), counter:
        step()
    return counter.launches


@contextmanager
def operators_of_cuda() -> Iterator[None]:
    """Has a step on the CPU call them: without oneDNN its products are cuBLAS's on CUDA."""
    onednn: Any = torch.backends.mkldnn
    enabled = onednn.enabled
    onednn.enabled = False
    try:
        yield
    finally:
        onednn.enabled = enabled


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.launches[func.name()] += launches_of(func, args, kwargs)
        return func(*args, **kwargs)


def launches_of(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Of one call.

    Raises:
        LookupError: the table lacks the operator.
    """
    name = operator.name()
    if name not in _LAUNCHES:
        raise LookupError(
            f"launches: the table of {__name__} lacks {name}; say what it launches on CUDA"
        )
    count = _LAUNCHES[name]
    if isinstance(count, int):
        return count
    arguments = {a.name: a.default_value for a in operator._schema.arguments}
    arguments.update(zip(arguments, args, strict=False))
    arguments.update(kwargs)
    return count(arguments)


def _copies(t: Tensor | None, like: Tensor) -> int:
    """Of t to the memory order of `like`, where it has another."""
    order = torch.contiguous_format
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        order = torch.channels_last
    return 0 if t is None or t.is_contiguous(memory_format=order) else 1


def _operands(a: _Arguments) -> int:
    """Products of a layer: of its input, and of the tangent where there is one.

    They are one where `linear` made both for few samples, which the arguments do not tell.
    """
    return 1 if a["tangent"] is None else 2


def _patch_noise(a: _Arguments, images: Tensor) -> int:
    """The noise of patches, which is made beforehand."""
    return int(a["patch"] > 1 and a["noise"] != "none" and images.dim() == 4)


def _feedback_step(a: _Arguments) -> int:
    """Blocks of one dtype: those of wide columns, if these fill the device, and the others. One more
    for images in patches, and for the means of their outputs where there are any."""
    launches = 0
    features_of: dict[torch.dtype, list[int]] = {}
    for matrix, saved in zip(a["feedback"], a["saved_activations"], strict=True):
        in_patches = a["patch"] > 1 and saved.dim() == 4
        launches += in_patches * (2 if a["outputs"] else 1)
        dtype = torch.float32 if in_patches else saved.dtype
        features_of.setdefault(dtype, []).append(matrix[0].numel())
    for features in features_of.values():
        wide = [n for n in features if n % _WIDE_COLUMNS == 0]
        if sum(wide) < _MULTIPROCESSORS * _WIDE_COLUMNS:
            wide = []
        for blocks in (len(wide), len(features) - len(wide)):
            launches += -(-blocks // _FEEDBACK_BLOCKS)
    return launches


def _fused_adam(a: _Arguments) -> int:
    """Chunks of 65536 elements, 320 or the last of 36 tensors in a launch."""
    launches, chunks, tensors = 0, 0, 0
    for t in a["self"]:
        tensors += 1
        left = -(-t.numel() // 65536)
        while left > 0:
            taken = min(left, 320 - chunks)
            chunks, left = chunks + taken, left - taken
            if chunks == 320 or (tensors == 36 and left == 0):
                launches, chunks, tensors = launches + 1, 0, min(left, 1)
    return launches + (chunks > 0)


_LAUNCHES: dict[str, _Count] = {
    # This package's. An epilogue also writes the zero of a placeholder.
    "fdfa::linear": lambda a: _operands(a) + 1,  # products, epilogue
    "fdfa::conv2d": lambda a: _operands(a) + 1 + (a["pool"] is not None) + _patch_noise(a, a["x"]),
    "fdfa::batch_norm": lambda a: (  # moments, statistics, epilogue, pool
        2 + a["training"] + (a["pool"] is not None) + _patch_noise(a, a["x"])
    ),
    "fdfa::batch_norm_backward": 3,  # moments, maps, their use
    "fdfa::max_pool2d": 1,
    # It adds the noise and writes the zeros of placeholders.
    "fdfa::max_pool2d_end": lambda a: 1 + _patch_noise(a, a["x"]),
    "fdfa::max_pool2d_backward": 1,
    "fdfa::perturb": lambda a: 1 + _patch_noise(a, a["y"]),
    "fdfa::dual_activation": 1,
    "fdfa::mm": 1,
    "fdfa::next_noise": 1,  # the copy and the step counted up
    "fdfa::feedback_step": _feedback_step,  # which counts its step up, and sums δ and e for biases
    "fdfa::feedback_gradient": _feedback_step,
    # Products by cuBLAS.
    "aten::mm": 1,
    "aten::addmm": 1,  # cuBLASLt adds a vector at the end of the product
    "aten::linear": 1,  # addmm
    # cuDNN's convolutions; a bias is added to their result, its gradient is a sum.
    "aten::convolution": lambda a: 1 + (a["bias"] is not None),
    "aten::convolution_backward": lambda a: sum(a["output_mask"]),
    # cudnn_batch_norm, which takes images in float32.
    "aten::native_batch_norm": 1,
    "aten::native_batch_norm_backward": 1,
    "aten::max_pool2d_with_indices": 1,
    # Its result is zeroed first.
    "aten::max_pool2d_with_indices_backward": lambda a: 2 + _copies(a["grad_output"], a["self"]),
    "aten::_adaptive_avg_pool2d": 1,
    "aten::_adaptive_avg_pool2d_backward": 2,  # zeros_like, and the kernel, which takes any strides
    "aten::relu": 1,
    "aten::threshold_backward": 1,
    "aten::_log_softmax": 1,
    "aten::_log_softmax_backward_data": 1,
    "aten::nll_loss_forward": 1,
    "aten::nll_loss_backward": 2,  # its result is zeroed first
    "aten::ones_like": 1,  # the gradient of the loss itself
    # Over so many samples one kernel without semaphores, which would be zeroed first.
    "aten::sum.dim_IntList": 1,
    "aten::add_.Tensor": 1,
    "aten::clone": 1,
    "aten::_foreach_add_.Scalar": lambda a: -(-len(a["self"]) // 110),  # the optimizer's steps
    "aten::_fused_adam_": _fused_adam,
    # Memory and views of it.
    "aten::detach": 0,
    "aten::empty.memory_format": 0,
    "aten::empty_like": 0,
    "aten::t": 0,
    "aten::view": 0,
    "aten::_unsafe_view": 0,
    # Marks for profilers.
    "profiler::_record_function_enter_new": 0,
    "profiler::_record_function_exit._RecordFunction": 0,
}


def launch_counts(net: str) -> dict[str, Counter[str]]:
    """Launches of a step by method and operator, images in channels_last, whatever the batch size."""
    case = Case.of(net, "mnist", 2, None)
    counts = {}
    for method in METHODS:
        in_order = "bp-channels-last" if method == "bp" and not case.is_mlp else method
        counts[method] = count_launches(
            training_step(case, in_order, torch.device("cpu"), "float32").run
        )
    return counts


def main() -> None:
    print("| net | " + " | ".join(METHODS) + " |\n" + "|---" * (1 + len(METHODS)) + "|")
    for net in NETS:
        counts = launch_counts(net)
        print(f"| {net} | " + " | ".join(str(counts[m].total()) for m in METHODS) + " |")


if __name__ == "__main__":
    main()
