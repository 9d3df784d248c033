"""The ways to train a net of blocks: the paper's methods, and the base classes for new ones.

A `BlockMethod` says in a few lines of matrix algebra what error a block gets, and how its feedback
learns if it has one; passes, noise, memory orders and autograd are taken care of.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from fdfa_ext._ops import fused
from fdfa_ext._torch_internals import traced_make_dual, traced_unpack_dual
from fdfa_ext.autograd import BlockStep as BlockStep
from fdfa_ext.autograd import attach, attach_fused, attach_shared, attach_weights, check_blocks
from fdfa_ext.dual_pass import DualPass
from fdfa_ext.duals import forward_mode
from fdfa_ext.feedback import FeedbackStep
from fdfa_ext.jvp import function_rules
from fdfa_ext.noise import perturbation
from fdfa_ext.positions import Cells
from fdfa_ext.step import TrainingStep, check_output

TANGENTS = ("none", "network", "block")
FEEDBACK = ("none", "fixed", "learned")
_UNDEFINED = "FDFA: {} must define {}"


class Method:
    """What a training forward does, and so what the backward of its result will do."""

    tangents = "none"  # one of TANGENTS: where they run
    feedback = "none"  # one of FEEDBACK: whether blocks have a matrix B
    reads_output = False
    local_heads = False  # whether every block but the last has one

    @property
    def keeps_output(self) -> bool:
        """Whether no later module may change the outputs of blocks in place."""
        return self.reads_output or self.local_heads

    def tangents_of_error(self) -> str:
        """Where tangents run in a step that learns no feedback."""
        return self.tangents

    def forward(self, step: TrainingStep) -> Any:
        """What the module returns: its output [N, K], or what it makes of it."""
        raise NotImplementedError(_UNDEFINED.format(type(self).__name__, "forward"))

    def initialize(self, feedback: Tensor) -> None:
        """Fills a new matrix B [K, *features], which is zero."""


class Backpropagation(Method):
    """Exact gradients by torch's autograd, for comparison."""

    def forward(self, step: TrainingStep) -> Any:
        with function_rules():
            return step.module(*step.args, **step.kwargs)


class WeightPerturbation(Method):
    """FG-W: every parameter W is perturbed by V, and gets (∂L/∂V) V  (eq. 2, 3; Algorithm 2).

    V has unit variance and is one for the batch. Exact forward-mode derivatives; unbiased. V is made
    again in the backward rather than kept.
    """

    def forward(self, step: TrainingStep) -> Tensor:
        named = [(name, p) for name, p in step.module.named_parameters() if p.requires_grad]
        if not named:
            raise RuntimeError("FDFA: fg-w perturbs parameters, but all of the module's are frozen")
        inputs = tree_leaves((step.args, step.kwargs))
        if any(isinstance(t, Tensor) and t.grad_fn is not None for t in inputs):
            raise RuntimeError(
                "FDFA: the input depends on parameters outside the module: fg-w gives them no "
                "gradient. Put what they belong to into the module"
            )
        compiling = torch.compiler.is_compiling()
        if not compiling:
            step.network.refuse_backward_hooks()
            for name, parameter in named:
                if is_lazy(parameter):
                    raise RuntimeError(
                        f"FDFA: fg-w perturbs parameters, but '{name}' has no shape yet; run the "
                        "module on an input first"
                    )
        # A compiler may read the state again in the backward, so there it moves first.
        state = fused.next_noise(step.noise_state) if compiling else step.noise_state
        if step.feedback.ranks is not None:
            state = step.feedback.ranks.noise_state(state, kind=0, rows=0)
        used = F.pad(state[:2], (0, 1))  # V is one for the batch, whichever sample is its first
        direction = partial(_direction, step.operators, step.noise)
        attention = sdpa_kernel(SDPBackend.MATH) if compiling else nullcontext()
        with forward_mode(), function_rules(), attention, torch.no_grad():
            duals = {
                name: traced_make_dual(parameter.detach(), direction(used, index, parameter))
                for index, (name, parameter) in enumerate(named)
            }
            output = functional_call(step.module, duals, step.args, step.kwargs)
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"FDFA: fg-w needs a module that returns one tensor; got {type(output).__name__}"
                )
            output, tangent = traced_unpack_dual(output)
            if tangent is None:
                raise RuntimeError(
                    "FDFA: the output has no tangent: a module detached it or is not differentiable in "
                    "torch's forward mode"
                )
            check_output(output)
            output, tangent = output.detach(), tangent.detach()
        if not compiling:
            fused.next_noise(step.noise_state)
        return attach_weights(output, tangent, used, direction, [parameter for _, parameter in named])


def _direction(
    operators: Any, noise: str, noise_state: Tensor, index: int, parameter: Tensor
) -> Tensor:
    """V of a parameter, a function of the noise state."""
    flat = parameter.detach().reshape(1, -1)
    v = perturbation(operators, flat, noise_state, index, noise)
    return torch.empty_like(parameter).copy_(v.view(parameter.shape))


class BlockMethod(Method):
    """Base of the methods that give every block its own error, straight from the output's.

    A subclass sets the attributes and defines `delta`, or `deltas` for all blocks at once.

    Attributes:
        tangents: "none": nothing is perturbed. "network": blocks are perturbed, and tangents run from
            block to block to the output (Algorithm 1). "block": blocks are perturbed, and a tangent
            ends where the next block begins, so that d depends on the last block's noise alone; the
            others then want local heads.
        feedback: "none", "fixed" or "learned".
        reads_output: whether the blocks' outputs are needed in the backward.

    A method is no module: what it keeps from step to step is in no state_dict.
    """

    def delta(self, block: BlockStep) -> Tensor:
        """The error of a block, an estimate of ∂L/∂y [N, D]. The activation's derivative is applied
        to what it returns."""
        raise NotImplementedError(_UNDEFINED.format(type(self).__name__, "delta"))

    def feedback_gradient(self, block: BlockStep) -> Tensor:
        """∇B [K, D] for feedback = "learned". B moves by it before the errors are computed."""
        raise NotImplementedError(_UNDEFINED.format(type(self).__name__, "feedback_gradient"))

    def deltas(self, blocks: Sequence[BlockStep]) -> Sequence[Tensor]:
        """δ of all blocks, for a rule that needs them together; else each block's `delta`."""
        return [self.delta(block) for block in blocks]

    def feedback_gradients(self, blocks: Sequence[BlockStep]) -> Sequence[Tensor]:
        """∇B of all blocks, for a rule that needs them together; else each `feedback_gradient`."""
        return [self.feedback_gradient(block) for block in blocks]

    def forward(self, step: TrainingStep) -> Any:
        if self.feedback == "learned" and step.feedback.rule != "grad":
            step.refuse_compiled_end()
        return step.run(partial(self._attach, step))

    def _check(self, dual: DualPass, output: Tensor, feedback: FeedbackStep) -> None:
        """Raises unless the blocks of a part of the pass can be trained."""
        check_blocks(self, dual, feedback.matrices, *output.shape)

    def _attach(
        self,
        step: TrainingStep,
        dual: DualPass,
        output: Tensor,
        tangent: Tensor | None,
        feedback: FeedbackStep,
    ) -> Tensor:
        self._check(dual, output, feedback)
        used = dual.use_noise() if tangent is not None else None
        tangent = dual.weighted(tangent, feedback.rule)
        return attach(self, dual, dual.records, output, tangent, used, feedback)


class ActivityPerturbation(BlockMethod):
    """FG-A: δ = (e · d) u for each sample  (eq. 4, 5; Algorithm 3).

    Unbiased, but for what a token does to the outputs of others. The output layer, which is not
    perturbed, gets its exact gradient.
    """

    tangents = "network"

    def delta(self, block: BlockStep) -> Tensor:
        return block.perturbation.mul_((block.error * block.tangent).sum(1, keepdim=True))

    def _check(self, dual: DualPass, output: Tensor, feedback: FeedbackStep) -> None:
        # (e · d) of a cell is not the sum over its positions of theirs.
        if dual.source is not None and (self.local_heads or isinstance(dual.source, Cells)):
            raise ValueError(
                f"FDFA: {type(self).__name__} needs features of the output's own samples or positions; "
                f"block or point '{dual.records[0].name}' has {list(dual.records[0].shape)}"
            )
        super()._check(dual, output, feedback)


class LocalGreedy(ActivityPerturbation):
    """LG-FG-A: FG-A within each block, for a loss of its own (Appendix A; Ren et al. 2023).

    After every block but the last a linear head makes outputs from the block's output alone. A training
    forward leaves them in `model.local_outputs`, and the loss to minimise is
    sum(loss_fn(o, target) for o in (output, *model.local_outputs)). Heads get exact gradients. The
    blocks must follow each other in a sequence.
    """

    tangents = "block"
    local_heads = True

    def _attach(
        self,
        step: TrainingStep,
        dual: DualPass,
        output: Tensor,
        tangent: Tensor | None,
        feedback: FeedbackStep,
    ) -> Tensor:
        self._check(dual, output, feedback)
        *hidden, last = dual.records
        step.heads.check(hidden, output.shape[1])  # before the noise moves
        used = dual.use_noise()
        for record in hidden:
            u = step.perturbation(record.output, used, record.index)
            local, local_tangent = step.heads.run(record, u)
            local = attach(self, dual, [record], local, local_tangent, used, feedback)
            step.local_outputs.append(dual.of_rows(local))
        return attach(self, dual, [last], output, tangent, used, feedback)


def kaiming_feedback(feedback: Tensor) -> None:
    """Kaiming-uniform, with the features of a block as inputs (Appendix A)."""
    nn.init.kaiming_uniform_(feedback, nonlinearity="relu")


class ProjectedError(BlockMethod):
    """Base of FDFA, DFA and DKP: δ = e B.

    `delta` and `feedback_gradient` define them, and `forward` has all blocks do the same in one fused
    operator. Not so for a subclass, whose rules may be others.
    """

    decay = 1.0  # in ∇B = decay B - G

    def delta(self, block: BlockStep) -> Tensor:
        return block.error @ block.feedback

    def forward(self, step: TrainingStep) -> Any:
        feedback = step.feedback
        if type(self) not in _FUSED or feedback.own is not None:
            return super().forward(step)
        if feedback.ranks is not None and feedback.rule != "fixed":
            return step.run(self._attach_shared)
        return step.run(self._attach_fused, takes_output_layer=True)

    def _attach_fused(
        self, dual: DualPass, output: Tensor, tangent: Tensor | None, feedback: FeedbackStep
    ) -> Tensor:
        d = dual.weighted(tangent, feedback.rule)
        return attach_fused(self, dual, output, d, feedback, self.decay)

    def _attach_shared(
        self, dual: DualPass, output: Tensor, tangent: Tensor | None, feedback: FeedbackStep
    ) -> Tensor:
        self._check(dual, output, feedback)
        used = dual.use_noise() if tangent is not None else None
        return attach_shared(self, dual, output, tangent, used, feedback, self.decay)


class DirectFeedback(ProjectedError):
    """DFA: δ = e B with B random and fixed  (eq. 6; Nøkland 2016).

    Args:
        initialize: fills B [K, *features] in place.
    """

    feedback = "fixed"

    def __init__(self, initialize: Callable[[Tensor], Any] = kaiming_feedback) -> None:
        self._initialize = initialize

    def initialize(self, feedback: Tensor) -> None:
        self._initialize(feedback)


class KolenPollack(DirectFeedback):
    """DKP: DFA whose B learns from ∇B = eᵀy + λB  (Webster et al. 2021).

    That is the gradient which a weight from y to the output has, so that with decay on both sides B
    becomes what the later weights do. The same decay of the weights is up to their optimizer.

    Args:
        weight_decay: λ.
        initialize: fills B [K, *features] in place; with zeros, as the authors' code does.
    """

    feedback = "learned"
    reads_output = True

    def __init__(
        self, weight_decay: float = 1e-6, initialize: Callable[[Tensor], Any] = nn.init.zeros_
    ) -> None:
        super().__init__(initialize)
        self.decay = weight_decay

    def feedback_gradient(self, block: BlockStep) -> Tensor:
        return torch.addmm(block.feedback, block.error.t(), block.output, beta=self.decay)


class ForwardFeedback(ProjectedError):
    """FDFA: δ = e B, and B follows the mean Jacobian by ∇B = B - dᵀu / N (eq. 7 to 14, Algorithm 1)."""

    tangents = "network"
    feedback = "learned"

    def tangents_of_error(self) -> str:
        return "none" if type(self) is ForwardFeedback else self.tangents  # whose δ may want them

    def feedback_gradient(self, block: BlockStep) -> Tensor:
        return block.feedback - block.tangent.t() @ block.perturbation / max(len(block.error), 1)


_FUSED = (ForwardFeedback, DirectFeedback, KolenPollack)

METHODS: dict[str, Callable[[], Method]] = {
    "fdfa": ForwardFeedback,
    "dfa": DirectFeedback,
    "dkp": KolenPollack,
    "fg-a": ActivityPerturbation,
    "lg-fg-a": LocalGreedy,
    "fg-w": WeightPerturbation,
    "bp": Backpropagation,
}


def register_method(name: str) -> Callable[[type[Method]], type[Method]]:
    """Class decorator: FDFA(net, method=name) makes one of this class, which needs no arguments.

    Raises:
        ValueError: a method has this name already.
        TypeError: the class is no Method.
    """

    def register(kind: type[Method]) -> type[Method]:
        if name in METHODS:
            raise ValueError(f"FDFA: there is a method {name!r} already; register it by another name")
        if not (isinstance(kind, type) and issubclass(kind, Method)):
            raise TypeError(f"FDFA: a method must be a subclass of Method; got {kind!r}")
        METHODS[name] = kind
        return kind

    return register
