"""FDFA: wraps a torch model, runs its passes in training and owns feedback and noise."""

import copy
import inspect
import math
import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.parameter import is_lazy

from fdfa_ext._ops import fused
from fdfa_ext._torch_internals import GLOBAL_HOOKS, traced_unpack_dual
from fdfa_ext.duals import (
    forward_mode,
    has_tangent,
    refuse_unknown,
    slow_attention,
    unpack_dual,
)
from fdfa_ext.feedback import FeedbackUpdate, TensorMap, select
from fdfa_ext.functional import (
    BACKENDS,
    NOISES,
    BlockPass,
    BlockRecord,
    DualPass,
)
from fdfa_ext.jvp import forward_dual
from fdfa_ext.layers import NOT_SCRIPTABLE
from fdfa_ext.memory import keep_freed_memory
from fdfa_ext.methods import METHODS, Method, head_of
from fdfa_ext.own_code import OutputLayer, OwnCodeRules, cut_from_blocks, is_simple
from fdfa_ext.plan import BLOCKS, Plan, find_blocks, is_overridden

RULES = ("ema", "adam", "grad")


class FDFA(nn.Module):
    """Trains `module` by Forward Direct Feedback Alignment (Bacho & Chu 2024, Algorithm 1), or by
    another of the methods that the paper compares with it.

    In training mode, with gradients enabled, `forward` perturbs every block (FDFALinear, FDFAConv2d,
    FDFABlock) and carries the tangents to the output; `loss.backward()` then updates the feedback and
    fills `.grad` of the weights. What stands after the last block is trained by its exact gradient. In
    eval mode or under `torch.no_grad()` it is `module`, unperturbed.

    Each backward updates the feedback once, so N accumulated batches are N updates of B. The input gets
    no gradient. One thread at a time may run a model.

    The module may be changed between two steps: each training forward runs it as it is then. A block
    that replaces another under its name trains on with that one's B; a new name gets a new B. A module
    within that is compiled by itself runs uncompiled in training.

    What cannot be trained is refused when the model is made, or in its first training forward.

    Args:
        module: a model whose output is [N, K], K outputs for each of N samples.
        method: "fdfa", "dfa", "dkp", "fg-a", "lg-fg-a", "fg-w" or "bp", or a Method of your own
            (fdfa_ext.methods, which has their equations). Arguments that a method has no use for, such
            as those of feedback where it does not learn, are ignored.
        feedback: how B follows the estimate G = dᵀu / N of the mean Jacobian. "adam": Adam on the
            gradient B - G (Appendix A, the paper's tables). "ema": B ← (1 - lr) B + lr G (eq. 8).
            "grad": B is a parameter and gets `.grad` = B - G, for any torch optimizer. The same for
            another method's ∇B in place of B - G. Since B - G does not scale with the loss, keep
            `feedback_parameters()` out of GradScaler and of gradient clipping. Or a FeedbackUpdate.
        feedback_lr: α, per step.
        betas: Adam's, for feedback="adam".
        eps: Adam's.
        noise: "gaussian" or "rademacher" perturbations, of unit variance.
        backend: "fused" (float32, bfloat16, float16) or "reference", plain torch in any dtype.
        example_input: an input of any batch size, a tuple of inputs, or a dict of keyword inputs (one
            input, where the module's forward has no such arguments). With it the feedback exists
            at once; without, from the first training forward on. Till then those of feedback="grad" and
            the heads of "lg-fg-a" are parameters without a shape, as those of torch's lazy modules: an
            optimizer may have them already.

    Attributes:
        feedback: mapping from a block's name within `module` to its B, [K, *feature_shape], float32.
        noise_state: int64 [3]: seed (drawn from torch's generator), step, and the global index of the
            batch's first sample: set it to rank * batch size, with equal seeds, to make several
            processes perturb as one. DistributedDataParallel then wants broadcast_buffers=False, or it
            sets all to the first one's, and feedback="grad", for it averages gradients, not B.
        updates: int64 [1]: number of Adam steps that B has made.
        local_outputs: method "lg-fg-a": outputs [N, K] of the local heads in the last training forward,
            each of which wants the loss too.

    Raises:
        ValueError: an option is unknown or out of range; the module has no block or is one; its output
            is not [N, K].
        TypeError: method is a class; the module returns no tensor; a dtype that the backend lacks; a
            block of a kind of its own.
        RuntimeError: no tangent, or a zero one, reaches the output; a block is unused, used twice,
            behind parameters that belong to no block, or has a forward of its own that leaves out that
            of its base class; a backward hook could not be called.
    """

    @torch.inference_mode(False)  # what is made here changes in training
    def __init__(
        self,
        module: nn.Module,
        *,
        method: str | Method = "fdfa",
        feedback: str | FeedbackUpdate = "adam",
        feedback_lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        noise: str = "gaussian",
        backend: str = "fused",
        example_input: Tensor | tuple[Any, ...] | dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        own_update = isinstance(feedback, FeedbackUpdate)
        choices: list[tuple[str, Any, Iterable[str]]] = [
            ("feedback", RULES[0] if own_update else feedback, RULES),
            ("noise", noise, NOISES),
            ("backend", backend, BACKENDS),
        ]
        for argument, value, known in choices:
            if value not in known:
                raise ValueError(f"FDFA: {argument} must be one of {', '.join(known)}; got {value!r}")
        if feedback == "ema" and not 0 < feedback_lr < 1:
            raise ValueError(
                f'FDFA: feedback_lr must be in (0, 1) for feedback="ema"; got {feedback_lr}'
            )
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"FDFA: betas must be two numbers in [0, 1); got {betas}")
        if not 0 <= eps < math.inf:
            raise ValueError(f"FDFA: eps must be finite and not negative; got {eps}")
        if isinstance(method, str):
            if method not in METHODS:
                raise ValueError(
                    f"FDFA: method must be one of {', '.join(METHODS)}, or a Method; got {method!r}"
                )
            method = METHODS[method]()
        if not isinstance(method, Method):
            raise TypeError(f"FDFA: method must be a name or a Method, not its class; got {method!r}")
        self.module = module
        self.method = method
        self.rule = "own" if isinstance(feedback, FeedbackUpdate) else feedback
        self.feedback_update = feedback if isinstance(feedback, FeedbackUpdate) else None
        self.feedback_lr = feedback_lr
        self.betas = betas
        self.eps = eps
        self.noise = noise
        self.backend = backend
        self.feedback = TensorMap(as_parameters=feedback == "grad" and method.feedback == "learned")
        self.exp_avg = TensorMap()
        self.exp_avg_sq = TensorMap()
        self.heads = nn.ModuleDict()
        self.local_outputs: list[Tensor] = []
        self._copies: weakref.WeakSet[FDFA] = weakref.WeakSet([self])
        self._overriding: dict[str, Any] = {}
        self._plan: Plan | None = None
        self._blocks: dict[str, Any] = {}
        self._passes: list[BlockPass] = []
        self._checked = False
        self._current_plan()

        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        if device.type == "cpu":
            keep_freed_memory()
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
        self.register_buffer("noise_state", torch.tensor([seed, 0, 0], device=device))
        self.register_buffer("updates", torch.zeros(1, dtype=torch.int64, device=device))
        self.noise_state: Tensor
        self.updates: Tensor
        if example_input is None:
            self.method.declare(self)
        elif isinstance(example_input, dict) and _takes_keywords(module, example_input):
            self._prepare(**example_input)
        else:
            self._prepare(*(example_input if isinstance(example_input, tuple) else (example_input,)))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("method", "rule") and name in self.__dict__:
            raise AttributeError(
                f"FDFA: {name} cannot be changed, since what the model keeps was made for it; wrap the "
                "module again"
            )
        super().__setattr__(name, value)

    @property
    def feedback_lr(self) -> float:
        """α; may be set at any time, by a schedule say."""
        return self.learning_rate.item()

    @feedback_lr.setter
    def feedback_lr(self, value: float) -> None:
        if not 0 <= value < math.inf:
            raise ValueError(f"FDFA: feedback_lr must be finite and not negative; got {value}")
        if self.rule == "ema" and value > 1:  # 1 takes the estimate itself, as the first of a mean
            raise ValueError(f'FDFA: feedback_lr must be at most 1 for feedback="ema"; got {value}')
        # A tensor, to which a compiled program does not specialise; a new one, since a forward pass
        # leaves the one it found to its backward. On the CPU, where the operators read it.
        self.learning_rate = torch.tensor(float(value), dtype=torch.float64, device="cpu")

    @property
    def prepared(self) -> bool:
        """Whether all that the method keeps beside the module, such as its feedback, exists."""
        self._current_plan()
        return self._checked

    @property
    def block_names(self) -> list[str]:
        """In the order in which the module defines them."""
        return list(self._blocks)

    @property
    def backend_operators(self) -> Any:
        return BACKENDS[self.backend]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's output [N, K]; in training its backward does the whole step of the method."""
        if self.local_outputs:
            self.local_outputs = []
        if not (self.training and torch.is_grad_enabled()):
            return self.module(*args, **kwargs)
        if not self._checked:
            self._prepare(*args, **kwargs)
        return self.method.forward(self, *args, **kwargs)

    def forward_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the module, weights and biases, and of local heads."""
        yield from self.module.parameters()
        yield from self.heads.parameters()

    def feedback_parameters(self) -> Iterator[nn.Parameter]:
        """The feedback matrices of feedback="grad"; none for the rules that FDFA applies itself."""
        return self.feedback.parameters()

    def extra_repr(self) -> str:
        options = {
            "method": type(self.method).__name__,
            "feedback": self.rule,
            "feedback_lr": self.feedback_lr,
            "noise": self.noise,
            "backend": self.backend,
        }
        return ", ".join(f"{key}={value}" for key, value in options.items())

    def run_blocks(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], takes_output_layer: bool = False
    ) -> tuple[DualPass, Tensor, Tensor | None]:
        """The pass of a BlockMethod: its records, the output and its tangent.

        For a method that takes the output layer these may be what goes into it, if it is in the pass.
        """
        dual = self._dual_pass(self._buffers["noise_state"])  # type: ignore[arg-type]
        dual.takes_output_layer = takes_output_layer
        if dual.compiling:
            self._check_places()
            if self._plan is not None and self._plan.keeps_activations:
                raise RuntimeError(
                    "FDFA: the module keeps hidden activations, on which a loss has no gradient in a "
                    "compiled step; run it without torch.compile, or keep none"
                )
            output, tangent = self._run(dual, *args, **kwargs)
        else:
            plan = self._current_plan()
            if not self._checked:  # other blocks have come
                self._prepare(*args, **kwargs)
                plan = self._current_plan()
            # Whether activations are kept is seen by their tangents.
            dual.exposes = plan.exposes if dual.perturbs else bool(plan.own_code)
            dual.takes_biases = takes_output_layer and dual.backend is fused and not dual.exposes
            # A pass may be made anew, but buffers, as running statistics, move once.
            buffers = plan.save_buffers() if plan.own_code else []
            try:
                output, tangent = self._run(dual, *args, **kwargs)
            except _StrayedError:  # as seldom as the code of the net changes its course
                plan.restore_buffers(buffers)
                return self.run_blocks(args, kwargs, takes_output_layer)
        if tangent is None and dual.tangents != "none":
            raise self._no_tangent(self._find_droppers(*args, **kwargs))
        if dual.output_layer is not None:
            return dual, output, tangent
        self.check_output(output)
        # A model whose weights are all frozen can still learn its feedback.
        if not output.requires_grad and not any(r.handle.requires_grad for r in dual.records):
            output = output.detach().requires_grad_()
        return dual, output, tangent

    def feedback_state(self, names: Sequence[str]) -> list[list[Tensor]]:
        """B of these blocks and, for feedback="adam", its moments."""
        # From the dictionary: nn.Module's attributes cost half a microsecond each.
        modules: dict[str, Any] = self._modules
        if self.rule != "adam" or self.method.feedback != "learned":
            return [*select(names, modules["feedback"]), [], []]
        return select(names, modules["feedback"], modules["exp_avg"], modules["exp_avg_sq"])

    def _dual_pass(self, noise_state: Tensor) -> DualPass:
        compiling = torch.compiler.is_compiling()
        tangents = self.method.tangents
        if compiling and tangents != "none":
            # A compiler may put off what only the backward needs, and perturb once the state has moved.
            noise_state = fused.next_noise(noise_state)
        noise = "none" if tangents == "none" else self.noise
        return DualPass(
            noise_state, noise, BACKENDS[self.backend], compiling, tangents, noise != "none"
        )

    def _current_plan(self) -> Plan:
        """The plan of the module as it is, made again where something has changed since."""
        module: Any = self._modules.get("module")
        if self._plan is not None and self._plan.holds(module):
            return self._plan
        if not isinstance(module, nn.Module):
            raise TypeError(f"FDFA: module must be a torch.nn.Module; got {type(self.module).__name__}")
        if any(isinstance(inner, FDFA) for inner in module.modules()):
            raise ValueError("FDFA: the module has an FDFA within it; wrap it once, as a whole")
        plan = Plan(module)
        if plan.blocks != self._blocks or plan.overriding != self._overriding:
            self._checked = False
        self._overriding = plan.overriding
        self._use(plan)
        return plan

    def _use(self, plan: Plan) -> None:
        self._blocks, self._passes, self._plan = plan.blocks, plan.passes, plan

    def _run(self, dual: DualPass, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Primal and tangent of the output; the blocks met on the way are in dual.records."""
        args = tuple(map(_without_grad, args))
        if kwargs:
            kwargs = {name: _without_grad(value) for name, value in kwargs.items()}
        for block, block_pass in zip(self._blocks.values(), self._passes, strict=True):
            block_pass.dual = dual
            if block.block_pass is not block_pass:
                block.block_pass = block_pass
        plan = self._plan
        ruled = [] if plan is None or dual.compiling else plan.ruled
        for module, by_rule in ruled:
            module.__dict__["forward"] = by_rule
        try:
            if dual.compiling:
                result = self._on_dual_tensors(dual, args, kwargs)
                self._check_overridden(dual)
                return result
            assert plan is not None, "forward and the dry run have made it"
            if plan.backward_hooked or plan.has_global_hooks:
                self._refuse_backward_hooks(plan.backward_hooked, dual)
            if plan.steps is None or len(args) != 1 or kwargs or dual.exposes:
                # A module compiled by itself has no forward mode, and its blocks do not see the pass.
                eager = torch.compiler.set_stance("force_eager") if plan.is_compiled else nullcontext()
                with eager:
                    result = self._on_dual_tensors(dual, args, kwargs)
                self._check_overridden(dual)
                return result
            output, tangent = args[0], None
            for step in plan.steps:
                output, tangent = step(output, tangent)
            self._check_overridden(dual)
            layer = plan.output_layer
            if layer is not None:
                complete = tangent is not None or not dual.perturbs
                if dual.takes_output_layer and complete and is_simple(output, layer.weight):
                    dual.output_layer = OutputLayer(layer.weight, layer.bias)
                else:
                    output, tangent = forward_dual(layer, output, tangent)
            if dual.rules is not None:
                self._look_for_activations(plan, dual.rules, output)
            return self._tensor(output), tangent
        finally:
            for block_pass in self._passes:
                block_pass.dual = None
            for module, _ in ruled:
                del module.__dict__["forward"]

    def _on_dual_tensors(
        self, dual: DualPass, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        level = forward_mode() if dual.perturbs else nullcontext()
        plan = self._plan
        if dual.compiling or plan is None:
            with level:
                output = self._tensor(self.module(*args, **kwargs))
                if not dual.perturbs:
                    return output, None
                output, tangent = traced_unpack_dual(output)
                return output, None if tangent is None else tangent.detach()
        weight = plan.output_weight if dual.takes_output_layer else None
        dual.rules = rules = OwnCodeRules(weight, dual.perturbs, dual.exposes)
        with level:
            with rules:
                try:
                    output = self._tensor(self.module(*args, **kwargs))
                except NotImplementedError as error:
                    refuse_unknown("a function in the module's forward", error)
                    raise
            # It has one holder more than `rules`, rules.last, unless the net's code keeps it too. The
            # pass holds `rules` as well.
            kept = sys.getrefcount(output) - sys.getrefcount(rules) > 0
            last, rules.last = rules.last, None
            weight = None if last is None or last[0] is not output or kept else last[1]
            del last
            if rules.layer is not None and (rules.strayed or weight is None):
                plan.output_weight, plan.takes_output_weight = None, False
                raise _StrayedError
            rules.watch_attributes(plan.own_code)
            self._look_for_activations(plan, rules, output, kept)
            dual.output_layer = rules.layer
            if plan.takes_output_weight:
                plan.output_weight = weight
            result, tangent = unpack_dual(output)
        if dual.exposes and rules.layer is None:
            result = cut_from_blocks(result, [t for t in dual.exposed if t.requires_grad])
        return result, None if tangent is None else tangent.detach()

    @staticmethod
    def _look_for_activations(
        plan: Plan, rules: OwnCodeRules, output: Any, keeps_output: bool = False
    ) -> None:
        """Whether the net's code keeps some, for which they need a graph."""
        rules.last = None  # which would keep one itself
        if not plan.exposes and rules.perturbs and (keeps_output or rules.keeps_activations(output)):
            plan.exposes = True
            if torch.is_grad_enabled():
                raise _StrayedError
            plan.keeps_activations = True  # in a dry run

    def _check_places(self) -> None:
        """For a compiler, which cannot plan: a block that came later would learn by backpropagation."""
        if dict(find_blocks(self.module)) != self._blocks:
            raise RuntimeError(
                "FDFA: blocks were exchanged since the last training forward; run one without "
                "torch.compile, or wrap the module again"
            )

    def _check_overridden(self, dual: DualPass) -> None:
        """A block may be left out of a forward, but not run by another function than perturbs it."""
        if len(dual.records) == len(self._blocks):
            return
        run = [record.name for record in dual.records]
        for name, block in self._blocks.items():
            if name not in run and is_overridden(block):
                base = next(kind for kind in BLOCKS if isinstance(block, kind))
                raise RuntimeError(
                    f"FDFA: block '{name}' ({type(block).__name__}) has a forward of its own that has "
                    f"not called {base.__name__}.forward, so it was not perturbed; call it, or put the "
                    "module into an FDFABlock"
                )

    def _refuse_backward_hooks(self, names: list[str], dual: DualPass) -> None:
        """A block's output gets no gradient from autograd, and backward hooks have no forward mode."""
        hooked = [name for name in names if dual.perturbs or name in self._blocks]
        if any(GLOBAL_HOOKS[2:]):
            whose = "there is a global backward hook"
        elif hooked:
            whose = f"module '{hooked[0]}' has a backward hook"
        else:
            return
        raise RuntimeError(
            f"FDFA: {whose}, which cannot be called: no gradient passes between blocks. Remove it, or "
            "register a hook on parameters"
        )

    def __prepare_scriptable__(self) -> "FDFA":
        raise RuntimeError(NOT_SCRIPTABLE)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: without the last outputs of local heads, which hold a graph, and the plan."""
        state = self.__dict__ | {"local_outputs": [], "_plan": None}
        del state["_copies"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._copies = weakref.WeakSet([self])

    def __deepcopy__(self, memo: dict[int, Any]) -> "FDFA":
        twin = self.__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin._copies = self._copies
        twin._copies.add(twin)
        return twin

    @staticmethod
    def _tensor(output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise TypeError(f"FDFA: the module must return one tensor; got {type(output).__name__}")
        return output

    @staticmethod
    def check_output(output: Tensor) -> None:
        if output.dim() != 2:
            raise ValueError(
                "FDFA: the output must be [N, K], one row of K values a sample; got "
                f"{list(output.shape)}. Flatten it within the module"
            )

    def check_blocks(self, dual: DualPass, n: int, outputs: int) -> None:
        """Whether the blocks of a pass, of n samples, have what the backward needs, and fit their B."""
        for record in dual.records:
            gates = record.activation != "identity" and record.gate is record.output
            needed = gates or self.method.keeps_output
            if needed and not dual.compiling and record.output._version != record.version:
                raise RuntimeError(
                    f"FDFA: the output of block '{record.name}' was changed in place by a module "
                    "after it, but is needed later; use the module without inplace"
                )
            shape = record.gate.shape
            if shape[0] != n:
                raise ValueError(
                    f"FDFA: block '{record.name}' must keep the batch first: expected [{n}, *features] "
                    f"as the output has, got {list(shape)}"
                )
            if self.method.feedback == "none":
                continue
            feedback = self.feedback[record.name]
            if feedback.shape != (outputs, *shape[1:]):
                raise ValueError(
                    f"FDFA: block '{record.name}': its feedback has shape {list(feedback.shape)}, but "
                    f"{outputs} outputs and features {list(shape[1:])} came; both are fixed, "
                    "so wrap the module again after changing them"
                )
            if not feedback.is_contiguous(memory_format=record.order):
                raise ValueError(
                    f"FDFA: block '{record.name}': its feedback must lie in {record.order}, the order "
                    f"of the noise; got strides {feedback.stride()}"
                )

    @torch.no_grad()
    def _probe(self, *args: Any, **kwargs: Any) -> tuple[DualPass, Tensor, Tensor | None]:
        """A dual pass that leaves no trace: noise and buffers stay as they are."""
        modes = {module: module.training for module in self.module.modules()}
        dual = self._dual_pass(self.noise_state.clone())
        plan = self._current_plan()
        buffers = plan.save_buffers()
        try:
            self.module.eval()
            with slow_attention():
                output, tangent = self._run(dual, *args, **kwargs)
        finally:
            for module, mode in modes.items():
                module.training = mode
            plan.restore_buffers(buffers)
        return dual, output, tangent

    def _find_droppers(self, *args: Any, **kwargs: Any) -> list[str]:
        """Names of the modules that are given a tangent and return none, with their types."""
        droppers: list[str] = []
        names = {module: name for name, module in self.module.named_modules() if name}

        def watch(module: nn.Module, inputs: tuple[Any, ...], result: Any) -> None:
            if module in names and _any_tangent(inputs) and not _any_tangent(result):
                droppers.append(f"'{names[module]}' ({type(module).__name__})")

        # For all modules at once, so that no error can leave one on the user's.
        plan = self._current_plan()
        hook = register_module_forward_hook(watch)
        try:
            self._probe(*args, **kwargs)
        finally:
            hook.remove()
            self._use(plan)  # with what it has learned
        return droppers

    @staticmethod
    def _no_tangent(droppers: list[str]) -> RuntimeError:
        why = (
            f"Module {droppers[0]} dropped it: it is not differentiable in torch's forward mode"
            if droppers
            else "No module dropped it: the output depends on no block, or a function detached it on "
            "the way"
        )
        return RuntimeError(f"FDFA: the output has no tangent. {why}")

    def _prepare(self, *args: Any, **kwargs: Any) -> None:
        for name, parameter in self.module.named_parameters():
            if torch.compiler.is_compiling() or is_lazy(parameter):
                continue
            if parameter.is_inference():
                raise RuntimeError(
                    f"FDFA: '{name}' of the module was made under torch.inference_mode, so that it "
                    "cannot be trained; make the module outside"
                )
        self.method.prepare(self, *args, **kwargs)
        for tensors in (self.feedback, self.exp_avg, self.exp_avg_sq):
            tensors.keep(self._blocks)
        self._checked = True
        self._share()

    def _share(self) -> None:
        """Copies of this net that were made before the feedback and heads existed get them with it.

        What averages models goes through the tensors of a model and its copy side by side.
        """
        shapes = [*map(_shape, self.module.parameters())]
        for other in self._copies:
            if other._checked or [*map(_shape, other.module.parameters())] != shapes:
                continue
            for mine, theirs in (
                (self.feedback, other.feedback),
                (self.exp_avg, other.exp_avg),
                (self.exp_avg_sq, other.exp_avg_sq),
            ):
                for name, tensor in mine.items():
                    if name not in theirs:
                        theirs.put(name, tensor.detach().clone())
                        other._keep_for(theirs, name)
            heads: Any = self.heads.items()
            for key, head in heads:
                if head.has_shape and head_of(other, key).take_shape(head.weight.shape, head.weight):
                    other.heads[key].load_state_dict(head.state_dict())

    def prepare_blocks(self, *args: Any, **kwargs: Any) -> tuple[list[BlockRecord], int]:
        """Checks the module on one input and creates the feedback matrices that do not exist yet.

        Returns a record of each block for that input, and K.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "FDFA: give example_input, or run one training forward, before torch.compile: the "
                "feedback matrices must exist"
            )
        dual, output, tangent = self._probe(*args, **kwargs)
        droppers = self._find_droppers(*args, **kwargs) if dual.perturbs else []
        if tangent is None and dual.tangents != "none":
            raise self._no_tangent(droppers)
        self.check_output(output)
        if tangent is not None and output.shape[0] > 0 and not bool((tangent != 0).any()):
            raise RuntimeError(
                "FDFA: the tangent of the output is zero, so no block can learn its feedback. Do all "
                "weights of the output layer start at zero?"
            )
        if droppers:
            warnings.warn(
                f"FDFA: module {droppers[0]} drops the tangent; blocks whose only way to the output "
                "leads through it learn no feedback",
                stacklevel=3,
            )
        unused = [name for name in self._blocks if name not in {record.name for record in dual.records}]
        if unused:
            raise RuntimeError(f"FDFA: block '{unused[0]}' was not used by the forward pass")
        if self.method.feedback != "none":
            new = self.feedback.undeclared(self._blocks)
            if new and self.rule == "grad":
                raise RuntimeError(
                    f"FDFA: block '{new[0]}' came after wrapping, and no optimizer has its feedback "
                    "matrix; wrap the module again and make the optimizer anew"
                )
            for record in dual.records:
                self._create(record, output)
            self.check_blocks(dual, *output.shape)
        return dual.records, output.shape[1]

    def _create(self, record: BlockRecord, output: Tensor) -> None:
        shape = [output.shape[1], *record.gate.shape[1:]]
        maps = [self.feedback]
        if self.method.feedback == "learned" and self.rule == "adam":
            maps += [self.exp_avg, self.exp_avg_sq]
        for tensors in maps:
            if record.name not in tensors:
                matrix = torch.zeros(shape, dtype=torch.float32, device=record.gate.device)
                if tensors is self.feedback:
                    self.method.initialize(matrix)
                tensors.put(record.name, matrix)
                self._keep_for(tensors, record.name)

    def _keep_for(self, tensors: TensorMap, name: str) -> None:
        """Has an own FeedbackUpdate make what it keeps for a new B."""
        if tensors is self.feedback and self.feedback_update is not None:
            self.feedback_update.create(TensorMap.key(name), tensors[name])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Makes room for feedback and heads that a saved model has and this one has not yet."""
        self._current_plan()
        for tensors, name in (
            (self.feedback, "feedback"),
            (self.exp_avg, "exp_avg"),
            (self.exp_avg_sq, "exp_avg_sq"),
        ):
            tensors.keep(self._blocks)
            for block in self._blocks:
                saved = state_dict.get(f"{prefix}{name}.{TensorMap.key(block)}")
                if saved is not None and block not in tensors:
                    tensors.put(block, torch.zeros_like(saved, device=self.noise_state.device))
                    self._keep_for(tensors, block)
        for key in map(TensorMap.key, self._blocks):
            saved = state_dict.get(f"{prefix}heads.{key}.weight")
            if saved is not None:
                head_of(self, key).take_shape(saved.shape, saved.to(self.noise_state.device))
        for name in ("noise_state", "updates"):
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and saved.is_floating_point():
                args[-1].append(
                    f"FDFA: {prefix}{name} must hold whole numbers, int64, which {saved.dtype} cannot "
                    "hold exactly; convert only what is_floating_point()"
                )
                state_dict[prefix + name] = getattr(self, name)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _StrayedError(Exception):
    """The code of the net did otherwise than in the pass before; this one is void."""


def _without_grad(value: Any) -> Any:
    """An input of the whole model gets no gradient; a parameter, which would want one, is refused by
    the block that it reaches."""
    if isinstance(value, Tensor) and value.requires_grad and value.is_leaf:
        return value if isinstance(value, nn.Parameter) else value.detach()
    return value


def _shape(parameter: Tensor) -> torch.Size | None:
    return None if is_lazy(parameter) else parameter.shape


def _takes_keywords(module: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether they are its forward's arguments; else the dict is one."""
    try:
        inspect.signature(module.forward).bind(**inputs)
    except TypeError:
        return False
    return True


def _any_tangent(value: Any) -> bool:
    if isinstance(value, Tensor):
        return has_tangent(value)
    if isinstance(value, (tuple, list)):
        return any(_any_tangent(item) for item in value)
    if isinstance(value, dict):
        return any(_any_tangent(item) for item in value.values())
    return False
