"""The ways to train a net of blocks: the paper's methods, and the base classes for new ones.

A `BlockMethod` says in a few lines of matrix algebra what error a block gets, and how its feedback
learns if it has one; passes, noise, memory orders and autograd are taken care of.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import UninitializedParameter, is_lazy
from torch.utils._pytree import tree_leaves

from fdfa_ext._ops import fused
from fdfa_ext._torch_internals import fused_adam_, graph_break, traced_make_dual, traced_unpack_dual
from fdfa_ext.duals import forward_mode
from fdfa_ext.functional import BlockRecord, DualPass, rows, unrows
from fdfa_ext.jvp import function_rules
from fdfa_ext.reference import through_activation

if TYPE_CHECKING:
    from fdfa_ext.wrapper import FDFA


class Method:
    """What a training forward of the wrapper does, and so what the backward of its result will do."""

    tangents = "none"
    feedback = "none"  # "none", "fixed" or "learned": whether blocks have a matrix B
    reads_output = False

    @property
    def keeps_output(self) -> bool:
        """Whether no later module may change the outputs of blocks in place."""
        return self.reads_output

    def declare(self, model: "FDFA") -> None:
        """Gives the model the parameters that `prepare` will know the shapes of, so that an optimizer
        made before it can have them."""

    def prepare(self, model: "FDFA", *args: Any, **kwargs: Any) -> None:
        """Checks the module on an input, and makes what the method needs beside its parameters."""

    def forward(self, model: "FDFA", *args: Any, **kwargs: Any) -> Tensor:
        """The module's output [N, K]."""
        raise NotImplementedError

    def initialize(self, feedback: Tensor) -> None:
        """Fills a new matrix B [K, *features], which is zero."""


class Backpropagation(Method):
    """Exact gradients by torch's autograd, for comparison."""

    def forward(self, model: "FDFA", *args: Any, **kwargs: Any) -> Tensor:
        with function_rules():
            output: Tensor = model.module(*args, **kwargs)
        return output


class WeightPerturbation(Method):
    """FG-W: every parameter W is perturbed by V, and gets (∂L/∂V) V  (eq. 2, 3; Algorithm 2).

    V has unit variance and is one for the batch. Exact forward-mode derivatives; unbiased. V is made
    again in the backward rather than kept.
    """

    def forward(self, model: "FDFA", *args: Any, **kwargs: Any) -> Tensor:
        named = [(name, p) for name, p in model.module.named_parameters() if p.requires_grad]
        if not named:
            raise RuntimeError("FDFA: fg-w perturbs parameters, but all of the module's are frozen")
        if any(isinstance(t, Tensor) and t.grad_fn is not None for t in tree_leaves((args, kwargs))):
            raise RuntimeError(
                "FDFA: the input depends on parameters outside the module: fg-w gives them no "
                "gradient. Put what they belong to into the module"
            )
        compiling = torch.compiler.is_compiling()
        # A compiler may read the state again in the backward, so there it moves first.
        state = fused.next_noise(model.noise_state) if compiling else model.noise_state
        used = F.pad(state[:2], (0, 1))  # V is one for the batch, whichever sample is its first
        direction = partial(_direction, model.backend_operators, model.noise)
        with forward_mode(), function_rules(), torch.no_grad():
            duals = {
                name: traced_make_dual(parameter.detach(), direction(used, index, parameter))
                for index, (name, parameter) in enumerate(named)
            }
            output = functional_call(model.module, duals, args, kwargs)
            output, tangent = traced_unpack_dual(output)
            if tangent is None:
                raise RuntimeError(
                    "FDFA: the output has no tangent: a module detached it or is not differentiable in "
                    "torch's forward mode"
                )
            model.check_output(output)
            output, tangent = output.detach(), tangent.detach()
        if not compiling:
            fused.next_noise(model.noise_state)
        parameters = [parameter for _, parameter in named]
        result: Tensor = _WeightNode.apply(output, tangent, used, direction, *parameters)
        return result


def _direction(
    operators: Any, noise: str, noise_state: Tensor, index: int, parameter: Tensor
) -> Tensor:
    """V of a parameter, a function of the noise state."""
    flat = parameter.detach().reshape(1, -1)
    v = operators.perturb(flat, None, noise_state, index, noise)
    return torch.empty_like(parameter).copy_(v.view(parameter.shape))


class _WeightNode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        tangent: Tensor,
        noise_state: Tensor,
        direction: Callable[[Tensor, int, Tensor], Tensor],
        *parameters: Tensor,
    ) -> Tensor:
        # The state with the tangent, so that a checkpoint makes both again or neither.
        ctx.save_for_backward(tangent, noise_state, *parameters)
        ctx.direction = direction
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (error,) = grads
        tangent, noise_state, *parameters = ctx.saved_tensors
        slope = (error * tangent).sum()
        directions = (ctx.direction(noise_state, index, p) for index, p in enumerate(parameters))
        return None, None, None, None, *[v.mul_(slope) for v in directions]


@dataclass
class BlockStep:
    """A block in the backward of one step. D features, in the memory order of the block's output."""

    name: str
    error: Tensor
    """e [N, K]: gradient of the loss at the output."""
    _tangent: Tensor | None
    _feedback: Tensor | None
    _output: Tensor | None
    _make_perturbation: Callable[[], Tensor]

    @property
    def tangent(self) -> Tensor:
        """d [N, K]: tangent of the output."""
        assert self._tangent is not None, "this method has no tangents"
        return self._tangent

    @property
    def feedback(self) -> Tensor:
        """B [K, D]."""
        assert self._feedback is not None, "this method has no feedback"
        return self._feedback

    @property
    def output(self) -> Tensor:
        """y [N, D], for methods with reads_output."""
        assert self._output is not None, "this method does not read outputs"
        return self._output

    @property
    def perturbation(self) -> Tensor:
        """u [N, D], made again from the noise state at each access: yours to change."""
        return self._make_perturbation()


class BlockMethod(Method):
    """Base of the methods that give every block its own error, straight from the output's.

    A subclass sets the attributes and defines `delta`, or `deltas` for all blocks at once.

    Attributes:
        tangents: "none": nothing is perturbed. "network": blocks are perturbed, and tangents run from
            block to block to the output (Algorithm 1). "block": blocks are perturbed, and a tangent
            ends where the next block begins.
        feedback: "none", "fixed" or "learned".
        reads_output: whether the blocks' outputs are needed in the backward.
    """

    def delta(self, block: BlockStep) -> Tensor:
        """The error of a block, an estimate of ∂L/∂y [N, D]. The activation's derivative is applied
        to what it returns."""
        raise NotImplementedError

    def feedback_gradient(self, block: BlockStep) -> Tensor:
        """∇B [K, D] for feedback = "learned". B moves by it before the errors are computed."""
        raise NotImplementedError

    def deltas(self, blocks: Sequence[BlockStep]) -> Sequence[Tensor]:
        """δ of all blocks, for a rule that needs them together; else each block's `delta`."""
        return [self.delta(block) for block in blocks]

    def feedback_gradients(self, blocks: Sequence[BlockStep]) -> Sequence[Tensor]:
        """∇B of all blocks, for a rule that needs them together; else each `feedback_gradient`."""
        return [self.feedback_gradient(block) for block in blocks]

    def declare(self, model: "FDFA") -> None:
        if self.feedback == "learned" and model.rule == "grad":
            for name in model.block_names:
                model.feedback.declare(name)

    def prepare(self, model: "FDFA", *args: Any, **kwargs: Any) -> None:
        model.prepare_blocks(*args, **kwargs)

    def forward(self, model: "FDFA", *args: Any, **kwargs: Any) -> Tensor:
        dual, output, tangent = model.run_blocks(args, kwargs)
        model.check_blocks(dual, *output.shape)
        return self.join(model, dual, output, tangent)

    def join(self, model: "FDFA", dual: DualPass, output: Tensor, tangent: Tensor | None) -> Tensor:
        """The output, tied to all blocks: its backward does the step."""
        used = dual.use_noise() if tangent is not None else None
        return self.tie(model, dual.records, output, tangent, used)

    def tie(
        self,
        model: "FDFA",
        records: Sequence[BlockRecord],
        output: Tensor,
        tangent: Tensor | None,
        noise_state: Tensor | None,
    ) -> Tensor:
        """The output, tied to these blocks by one autograd node."""
        blocks = [_BlockFacts(r.name, r.index, r.activation) for r in records]
        names = [] if self.feedback == "none" else [r.name for r in records]
        outputs = [r.output for r in records] if self.reads_output else []
        result: Tensor = _BlockNode.apply(
            output,
            tangent,
            noise_state,
            (self, model, blocks),
            *[r.handle for r in records],
            *(model.feedback_state(names)[0] if names else []),
            *[r.gate for r in records],
            *outputs,
        )
        return result


@dataclass
class _BlockFacts:
    name: str
    index: int
    activation: str


class _BlockNode(torch.autograd.Function):
    """The one autograd node between the loss and the blocks. No path leads from block to block."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        tangent: Tensor | None,
        noise_state: Tensor | None,
        what: tuple[BlockMethod, "FDFA", list[_BlockFacts]],
        *tensors: Tensor,
    ) -> Tensor:
        """tensors: each block's handle, its B if it has one, its gate, its output if that is read."""
        method, _, blocks = what
        n = len(blocks)
        n_feedback = 0 if method.feedback == "none" else n
        ctx.what = what
        # B moves in place from step to step, so autograd must not watch its version.
        ctx.feedback = tensors[n : n + n_feedback]
        ctx.save_for_backward(tangent, noise_state, *tensors[n + n_feedback :])
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        method, model, blocks = ctx.what
        tangent, noise_state, *saved = ctx.saved_tensors
        n = len(blocks)
        gates, outputs = saved[:n], saved[n:]
        error = grads[0].float()
        steps = [
            BlockStep(
                blocks[i].name,
                error,
                None if tangent is None else tangent.float(),
                rows(ctx.feedback[i].detach()) if ctx.feedback else None,
                rows(outputs[i]).float() if outputs else None,
                partial(_perturbation, model, noise_state, blocks[i].index, gates[i]),
            )
            for i in range(n)
        ]
        gradients: list[Tensor | None] = [None] * len(ctx.feedback)
        if method.feedback == "learned" and len(error) > 0:
            names = [block.name for block in blocks]
            found = [
                unrows(gradient, model.feedback[name].shape)
                for gradient, name in zip(method.feedback_gradients(steps), names, strict=True)
            ]
            if model.rule == "grad":
                gradients[:] = found
            else:
                move_feedback(model, names, found)
        deltas = [
            through_activation(block.activation, gate, unrows(delta, gate.shape))
            for block, gate, delta in zip(blocks, gates, method.deltas(steps), strict=True)
        ]
        nothing = [None] * len(saved)
        return (grads[0], None, None, None, *deltas, *gradients, *nothing)


def _perturbation(model: "FDFA", noise_state: Tensor, index: int, gate: Tensor) -> Tensor:
    # The operator reads no more than a shape; u is float32 whatever the activations are.
    like = gate if gate.dtype == torch.float32 else gate.float()
    return rows(model.backend_operators.perturb(like, None, noise_state, index, model.noise))


def move_feedback(model: "FDFA", names: Sequence[str], gradients: list[Tensor]) -> None:
    """One step of B along the gradients, by the model's rule. None if a gradient is not finite."""
    if torch.compiler.is_compiling():
        graph_break("FDFA: this method moves its feedback outside the compiled graph")
    matrices, *moments = model.feedback_state(names)
    # A sum keeps what is not finite, and is far cheaper than a test of each element.
    finite = torch.stack([gradient.sum() for gradient in gradients]).isfinite().all()
    if model.feedback_update is not None:
        if finite:
            for name, matrix, gradient in zip(names, matrices, gradients, strict=True):
                model.feedback_update.step(model.feedback.key(name), matrix, gradient)
        return
    if model.rule == "ema":
        for matrix, gradient in zip(matrices, gradients, strict=True):
            matrix.sub_(torch.where(finite, model.feedback_lr * gradient, 0))
        return
    fused_adam_(
        matrices,
        gradients,
        *moments,
        [],
        [model.updates.add_(1).float()] * len(names),
        lr=model.feedback_lr,
        beta1=model.betas[0],
        beta2=model.betas[1],
        weight_decay=0.0,
        eps=model.eps,
        amsgrad=False,
        maximize=False,
        found_inf=(~finite).float(),
    )


class ActivityPerturbation(BlockMethod):
    """FG-A: δ = (e · d) u for each sample  (eq. 4, 5; Algorithm 3).

    Unbiased. The output layer, which is not perturbed, gets its exact gradient.
    """

    tangents = "network"

    def delta(self, block: BlockStep) -> Tensor:
        return block.perturbation.mul_((block.error * block.tangent).sum(1, keepdim=True))


class LocalHead(nn.Linear):
    """The linear head of a block, [N, features] → [N, outputs], of a shape to come."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.in_features = self.out_features = 0
        self.weight: Any = UninitializedParameter()
        self.bias: Any = UninitializedParameter()

    @property
    def has_shape(self) -> bool:
        return not is_lazy(self.weight)

    def take_shape(self, shape: Sequence[int], like: Tensor) -> bool:
        """Gives the weight this shape [outputs, features] unless it has one; whether it had none.

        like: has the device and dtype.
        """
        if self.has_shape:
            return False
        self.out_features, self.in_features = shape
        self.weight.materialize(shape, like.device, like.dtype)
        self.bias.materialize(shape[:1], like.device, like.dtype)
        self.reset_parameters()
        return True

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return super()._apply(fn, recurse) if self.has_shape else self

    def _save_to_state_dict(self, *args: Any) -> None:
        if self.has_shape:
            super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        if self.has_shape:
            super()._load_from_state_dict(*args)


def head_of(model: "FDFA", key: str) -> LocalHead:
    if key not in model.heads:
        # To the dictionary itself: a block may be called as one of ModuleDict's attributes is.
        model.heads._modules[key] = LocalHead()
    head: Any = model.heads[key]
    return head


class LocalGreedy(ActivityPerturbation):
    """LG-FG-A: FG-A within each block, for a loss of its own (Appendix A; Ren et al. 2023).

    After every block but the last a linear head makes outputs from the block's output alone. A training
    forward leaves them in `model.local_outputs`, and the loss to minimise is
    sum(loss_fn(o, target) for o in (output, *model.local_outputs)). Heads get exact gradients. The
    blocks must follow each other in a sequence.
    """

    tangents = "block"

    def declare(self, model: "FDFA") -> None:
        for name in model.block_names[:-1]:
            head_of(model, model.feedback.key(name))

    @property
    def keeps_output(self) -> bool:  # for the heads, which come after the pass
        return True

    def prepare(self, model: "FDFA", *args: Any, **kwargs: Any) -> None:
        records, outputs = model.prepare_blocks(*args, **kwargs)
        like = next(model.module.parameters())
        keys = [model.feedback.key(record.name) for record in records[:-1]]
        new = [key for key in keys if len(model.heads) > 0 and key not in model.heads]
        if new:
            raise RuntimeError(
                f"FDFA: block '{new[0].replace('/', '.')}' needs a local head that no optimizer has: "
                "it came after wrapping, or the module calls its blocks in another order than it "
                "defines them. Wrap the module again, with example_input"
            )
        for record, key in zip(records, keys, strict=False):
            features = record.output.shape[1:].numel()
            head_of(model, key).take_shape((outputs, features), like)
        for key in model.heads.keys() - set(keys):
            del model.heads[key]

    def join(self, model: "FDFA", dual: DualPass, output: Tensor, tangent: Tensor | None) -> Tensor:
        used = dual.use_noise()
        model.local_outputs = []
        for record in dual.records[:-1]:
            head: Any = model.heads[model.feedback.key(record.name)]
            features = rows(record.output)
            if (head.out_features, head.in_features) != (output.shape[1], features.shape[1]):
                raise ValueError(
                    f"FDFA: block '{record.name}': its local head makes {head.out_features} outputs of "
                    f"{head.in_features} features, but {output.shape[1]} outputs and "
                    f"{features.shape[1]} features came; both are fixed, so wrap the module again"
                )
            local: Tensor = head(features)
            u = _perturbation(model, used, record.index, record.gate).to(local.dtype)
            local_tangent = F.linear(u, head.weight.detach().to(local.dtype))
            model.local_outputs.append(self.tie(model, [record], local, local_tangent, used))
        return self.tie(model, dual.records[-1:], output, tangent, used)


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

    def forward(self, model: "FDFA", *args: Any, **kwargs: Any) -> Tensor:
        if type(self) not in _FUSED or model.feedback_update is not None:
            return super().forward(model, *args, **kwargs)
        dual, output, tangent = model.run_blocks(args, kwargs, takes_output_layer=True)
        layer = dual.output_layer
        weight, bias = (None, None) if layer is None else (layer.weight, layer.bias)
        blocks = dual.gather(self.reads_output)
        checks = dual.backend is fused and not dual.compiling  # the operator does
        if not checks or blocks.changed:
            model.check_blocks(dual, *_output_shape(output, weight))
        try:
            feedback, exp_avg, exp_avg_sq = model.feedback_state(blocks.names)
            result: Tensor = dual.backend.star(
                output,
                tangent,
                weight,
                bias,
                noise_state=dual.noise_state,
                handles=blocks.handles,
                biases=dual.biases,
                biased=dual.biased,
                gates=blocks.gates,
                spare_gates=blocks.spare_gates,
                outputs=blocks.outputs,
                feedback=feedback,
                exp_avg=exp_avg,
                exp_avg_sq=exp_avg_sq,
                updates=model._buffers["updates"],
                blocks=blocks.indices,
                activations=blocks.activations,
                noise=model.noise,
                rule=model.rule if self.feedback == "learned" else "fixed",
                decay=self.decay,
                lr=model.learning_rate,
                beta1=model.betas[0],
                beta2=model.betas[1],
                eps=model.eps,
                input=None if layer is None else layer.input,
            )
        except (RuntimeError, TypeError, ValueError):
            model.check_blocks(dual, *_output_shape(output, weight))  # it calls blocks by their names
            raise
        return result


def _output_shape(output: Tensor, weight: Tensor | None) -> tuple[int, int]:
    """N and K of an output, or of what goes into an output layer with this weight."""
    return output.shape[0], output.shape[1] if weight is None else weight.shape[0]


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

    def feedback_gradient(self, block: BlockStep) -> Tensor:
        return block.feedback - block.tangent.t() @ block.perturbation / len(block.error)


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
