"""FDFA: a torch model with what lives from step to step: feedback, its moments, noise, local heads."""

import copy
import functools
import inspect
import math
import numbers
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

from fdfa_ext._torch_internals import COMPILED_CALL
from fdfa_ext.auto import GRANULARITIES, auto_points, before_wide_layer, default_output
from fdfa_ext.autograd import check_blocks
from fdfa_ext.compiled import hook_points
from fdfa_ext.data_parallel import Ranks, is_measuring, ranks_of_step
from fdfa_ext.dual_pass import BACKENDS, BlockRecord, DualPass
from fdfa_ext.feedback import RULES, FeedbackBank, FeedbackStep, FeedbackUpdate
from fdfa_ext.feedback_gradients import give
from fdfa_ext.fusion import channels_of
from fdfa_ext.heads import LocalHeads
from fdfa_ext.layers import NOT_SCRIPTABLE, Block
from fdfa_ext.memory import keep_freed_memory
from fdfa_ext.methods import FEEDBACK, METHODS, TANGENTS, Backpropagation, BlockMethod, Method
from fdfa_ext.network import Network, sample_index_of
from fdfa_ext.noise import NOISES, new_state
from fdfa_ext.patches import patch_shape
from fdfa_ext.points import (
    At,
    channels_first_at,
    check_at,
    check_module,
    check_output_name,
    place_of,
)
from fdfa_ext.step import TrainingStep, no_tangent
from fdfa_ext.summary import Summary, summarize
from fdfa_ext.trace import trace
from fdfa_ext.warning import warn

_FORWARDS_TO_MOVE = 32  # by which feedback that no step has moved is said


class _with_signature_of_module:
    """A forward whose signature, as `inspect` tells, is that of the module within: trainers read it to
    know which inputs to give. That of the class, by which they know targets, has the name for targets
    that these have in transformers."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        signature = inspect.signature(function)
        labels = inspect.Parameter("labels", inspect.Parameter.KEYWORD_ONLY, default=None)
        first, args, kwargs = signature.parameters.values()
        self.function.__dict__["__signature__"] = signature.replace(
            parameters=[first, args, labels, kwargs]
        )

    def __get__(self, model: Any, kind: type | None = None) -> Any:
        if model is None:
            return self.function
        if torch.compiler.is_compiling():  # torch 2.15 does not trace a _Forward's making
            return functools.partial(self.function, model)
        return _Forward(self.function, model)


class _Forward:
    __slots__ = ("__func__", "__self__")

    def __init__(self, function: Callable[..., Any], model: "FDFA") -> None:
        self.__func__ = function
        self.__self__ = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Forward) and other.__self__ is self.__self__

    def __hash__(self) -> int:
        return hash((self.__func__, id(self.__self__)))

    @property
    def __code__(self) -> Any:  # which torch.jit.trace reads
        return self.__func__.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__self__.module.forward)


class FDFA(nn.Module):
    """Trains `module` by Forward Direct Feedback Alignment (Bacho & Chu 2024, Algorithm 1), or by
    another of the methods that the paper compares with it.

    In training mode, with gradients enabled, `forward` perturbs every block (FDFALinear, FDFAConv2d,
    FDFABlock, or a module that `at` means) and carries the tangents to the output; `loss.backward()`
    then updates the feedback and fills `.grad` of the weights. What stands after the last block is
    trained by its exact gradient. In eval mode or under `torch.no_grad()` it is `module`, unperturbed.

    Each backward updates the feedback once, so N accumulated batches are N updates of B. The input gets
    no gradient. One thread at a time may train a model. Within DistributedDataParallel or fully_shard
    all processes train as one does with the whole batch.

    The module may be changed between two steps: each training forward runs it as it is then. A block
    that replaces another under its name trains on with that one's B; a new name gets a new B. A module
    within that is compiled by itself runs uncompiled in training.

    What cannot be trained is refused when the model is made, or in its first training forward.

    Args:
        module: a model whose output is [N, K], K outputs for each of N samples, or [N], one for each.
            Or [N, T, K], K outputs for each of T tokens, or [N, K, H, W] and [N, K, D, H, W], for each
            of an image's pixels: a token or pixel is a sample then, blocks have features of each, and
            B is that of one of them.
        at: which modules of any kind are perturbed at their output beside the blocks, so that a model
            trains as it comes: names, classes, a function of name and module, or "auto". Each has the
            features [N, *features] that it returns, alone or first in a tuple; by "name.input" those
            that it is given in its first argument. What made them since the points before learns by
            their error, and what stands behind the last ones by exact gradients. "auto" finds them in a
            forward of example_input: after each layer, or each of a class of blocks that repeats, or
            the norms in those that normalise first, or at the input of the layer that reads what
            functions make of it; none after a layer that leads to no other, as the output's.
        granularity: of "auto": "block", or "layer" for a point after each layer even within blocks that
            repeat.
        output: name of the module whose result is the network's output, where the model returns
            something else: a dict, a loss of its own. What it makes of it is plain autograd. With `at`
            the layer that returns the model's result, or that of which it is the softmax or sigmoid; or
            that leads to it where it is no tensor. "auto" takes the norm whose features [N, T, D] that
            layer reads where it has more than 4 D outputs, and B is then [D, D].
        sample_index: name of the argument of the model's forward that says of which sample each row of
            features is, int64 [V] for features [V, *]: the graph of each node, where the nodes of N
            graphs are concatenated and the output is that of the graphs. A row then has B in common
            with all others, and the error of its sample.
        method: "fdfa", "dfa", "dkp", "fg-a", "lg-fg-a", "fg-w" or "bp", or a Method of your own
            (fdfa_ext.methods, which has their equations). Arguments that a method has no use for, such
            as those of feedback where it does not learn, are ignored.
        feedback: how B follows the estimate G = dᵀu / N of the mean Jacobian. "adam": Adam on the
            gradient B - G (Appendix A, the paper's tables). "ema": B ← (1 - lr) B + lr G (eq. 8).
            "grad": B is a parameter and gets `.grad` = B - G, for any torch optimizer, when that takes
            a step: the mean over the backwards since zero_grad. Before the step it is zero, since B - G
            does not scale with the loss, as gradients do that loops clip and unscale. With "dkp", whose
            ∇B does, it is set in the backward. The same for another method's ∇B in place of B - G. Or a
            FeedbackUpdate, which uses none of the next three arguments.
        feedback_lr: α, per step.
        betas: Adam's, for feedback="adam".
        eps: Adam's.
        noise: "gaussian" or "rademacher" perturbations, of unit variance.
        patch: side in pixels of the patches in which blocks of images [N, C, H, W] are perturbed and
            get their error: one u and one column of B for each channel of a patch, so that B is [K, C,
            ⌈H/patch⌉, ⌈W/patch⌉] and the estimate of it far less noisy. 1 is the paper's; a patch no
            smaller than the image leaves one for each channel. A sequence [N, T, D], or [N, D, T] as
            Conv1d returns it, counts as an image of height 1: B is [K, D, 1, ⌈T/patch⌉], and T may vary
            up to a `patch` that leaves one.
        backend: "fused" (float32, bfloat16, float16) or "reference", plain torch in any dtype.
        example_input: an input of any batch size, a tuple of inputs, or a dict of keyword inputs (one
            input, where the module's forward has no such arguments). With it the feedback exists
            at once; without, from the first training forward on. Till then those of feedback="grad" and
            the heads of "lg-fg-a" are parameters without a shape, as those of torch's lazy modules: an
            optimizer may have them already.

    Attributes:
        feedback: mapping from a block's name within `module` to its B, [K, *feature_shape] or in
            patches, float32; "name:2" is that of its second use in a forward.
        noise_state: int64 [3]: seed (drawn from torch's generator), step, and the global index of the
            batch's first sample, or first token. In several processes the first one's counts, and the
            samples of the processes before this one are added.
        updates: int64 [1]: number of Adam steps that B has made.
        learns_feedback: whether training steps learn B, True at first; may be set before any of them,
            as by `model.learns_feedback = step % 4 == 0`. A step of FDFA that does not has neither
            noise nor tangent, and takes DFA's time. No part of a saved state.
        local_outputs: method "lg-fg-a": outputs [N, K] of the local heads in the last training forward,
            each of which wants the loss too.

    Raises:
        ValueError: an option is unknown or out of range; the module has no block or is one; its output
            has no row of K values for each sample, token or pixel.
        TypeError: method is a class; the module returns no tensor; a dtype that the backend lacks; a
            block of a kind of its own.
        RuntimeError: no tangent reaches the output; a block is unused, used more often than in the dry
            run, behind parameters that belong to no block, or has a forward of its own that leaves out
            that of its base class; a backward hook could not be called.
    """

    @torch.inference_mode(False)  # what is made here changes in training
    def __init__(
        self,
        module: nn.Module,
        *,
        at: str | At = None,
        granularity: str = "block",
        output: str | None = None,
        sample_index: str | None = None,
        method: str | Method = "fdfa",
        feedback: str | FeedbackUpdate = "adam",
        feedback_lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        noise: str = "gaussian",
        patch: int = 1,
        backend: str = "fused",
        example_input: Tensor | tuple[Any, ...] | dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_module(module)
        own_update = isinstance(feedback, FeedbackUpdate)
        choices: list[tuple[str, Any, Iterable[str]]] = [
            ("feedback", RULES[0] if own_update else feedback, RULES),
            ("noise", noise, NOISES),
            ("backend", backend, BACKENDS),
            ("granularity", granularity, GRANULARITIES),
        ]
        for argument, value, known in choices:
            if value not in known:
                others = ", or a FeedbackUpdate, not its class" if argument == "feedback" else ""
                raise ValueError(
                    f"FDFA: {argument} must be one of {', '.join(known)}{others}; got {value!r}"
                )
        for name, number in (("feedback_lr", feedback_lr), ("eps", eps)):
            _check_number(name, number)
        for beta in betas:
            _check_number("betas", beta)
        if feedback == "ema" and not 0 < feedback_lr < 1:
            raise ValueError(
                f'FDFA: feedback_lr must be in (0, 1) for feedback="ema"; got {feedback_lr}'
            )
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"FDFA: betas must be two numbers in [0, 1); got {betas}")
        if not 0 <= eps < math.inf:
            raise ValueError(f"FDFA: eps must be finite and not negative; got {eps}")
        if not isinstance(patch, int) or isinstance(patch, bool) or not 1 <= patch < 2**63:
            raise ValueError(f"FDFA: patch must be a whole number of pixels, 1 or more; got {patch!r}")
        method = _method_of(method)
        for attribute, known in (("tangents", TANGENTS), ("feedback", FEEDBACK)):
            value = getattr(method, attribute)
            if value not in known:
                raise ValueError(
                    f"FDFA: {attribute} of {type(method).__name__} must be one of {', '.join(known)}; "
                    f"got {value!r}"
                )
        if at == "auto" and example_input is None:
            raise ValueError('FDFA: at="auto" finds the points on an example; give example_input')
        if at != "auto":
            check_at(at)
        if output is not None:
            check_output_name(module, output)
        self.module = module
        self.method = method
        self.rule = "own" if isinstance(feedback, FeedbackUpdate) else feedback
        self.feedback_update = feedback if isinstance(feedback, FeedbackUpdate) else None
        self.feedback_lr = feedback_lr
        self.betas = betas
        self.eps = eps
        self._learns_feedback = method.feedback == "learned"
        self.noise = noise
        self.patch = patch
        self.backend = backend
        learns_as_parameters = feedback == "grad" and method.feedback == "learned"
        # What a method makes of the error alone, as dkp does, scales with the loss.
        self.feedback = FeedbackBank(
            learns_as_parameters, learns_as_parameters and method.tangents != "none"
        )
        self.exp_avg = FeedbackBank()
        self.exp_avg_sq = FeedbackBank()
        self.heads = LocalHeads()
        self.local_outputs: list[Tensor] = []
        args, kwargs = inputs_of(module, example_input)
        if example_input is not None:
            options = (granularity, output, sample_index, patch, method.feedback != "none")
            at, output = _found_points(module, at, *options, args, kwargs)
        # A list of the user's may change, and the plan would not know.
        self.network = Network(tuple(at) if isinstance(at, Sequence) else at, output, sample_index)
        self._copies: weakref.WeakSet[FDFA] = weakref.WeakSet([self])
        self.network.look_at(module)
        # What trains in several processes, where these have the same feedback.
        self._in_step_by: Callable[[], Any] = _nothing

        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        if device.type == "cpu":
            keep_freed_memory()
        self.register_buffer("noise_state", new_state(device))
        self.register_buffer("updates", torch.zeros(1, dtype=torch.int64, device=device))
        self.noise_state: Tensor
        self.updates: Tensor
        if example_input is None:
            self._declare()
        else:
            with _naming_example():
                self._prepare(args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        kept = ("method", "rule", "feedback_update", "patch")
        if name in kept and (name in self.__dict__ or name in self._modules):
            raise AttributeError(
                f"FDFA: {name} cannot be changed, since what the model keeps was made for it; wrap the "
                "module again"
            )
        if self._is_of_module(name):
            setattr(self.module, name, value)
            return
        super().__setattr__(name, value)

    @property
    def feedback_lr(self) -> float:
        """α; may be set at any time, by a schedule say. A FeedbackUpdate has a rate of its own."""
        return self.learning_rate.item()

    @feedback_lr.setter
    def feedback_lr(self, value: float) -> None:
        _check_number("feedback_lr", value)
        if not 0 <= value < math.inf:
            raise ValueError(f"FDFA: feedback_lr must be finite and not negative; got {value}")
        if self.rule == "ema" and value > 1:  # 1 takes the estimate itself, as the first of a mean
            raise ValueError(f'FDFA: feedback_lr must be at most 1 for feedback="ema"; got {value}')
        if self.rule == "own" and "learning_rate" in self.__dict__:
            raise ValueError(
                f"FDFA: feedback_lr has no effect on {type(self.feedback_update).__name__}; "
                "set its own rate"
            )
        # A tensor, to which a compiled program does not specialise; a new one, since a forward pass
        # leaves the one it found to its backward. On the CPU, where the operators read it.
        self.learning_rate = torch.tensor(float(value), dtype=torch.float64, device="cpu")

    @property
    def learns_feedback(self) -> bool:
        """Whether training steps learn B."""
        return self._learns_feedback

    @learns_feedback.setter
    def learns_feedback(self, value: bool) -> None:
        if self.method.feedback != "learned":
            raise ValueError(
                f"FDFA: learns_feedback is no choice for {type(self.method).__name__}, whose feedback "
                "does not learn"
            )
        if self.rule == "grad":
            raise ValueError(
                'FDFA: learns_feedback is no choice for feedback="grad", whose B moves when its '
                "optimizer takes a step; take none"
            )
        item = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if not isinstance(item, (bool, np.bool_)):
            raise TypeError(f"FDFA: learns_feedback must be True or False; got {value!r}")
        self._learns_feedback = bool(item)

    @property
    def prepared(self) -> bool:
        """Whether all that the method keeps beside the module, such as its feedback, exists."""
        self.network.look_at(self.module)
        return self.network.checked

    @property
    def block_names(self) -> list[str]:
        """In the order in which the module defines them."""
        return list(self.network.blocks)

    @_with_signature_of_module
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns; in training its backward does the whole step of the method."""
        if self.local_outputs:
            self.local_outputs = []
        if self.network.first_index is not None:
            self.network.refuse_stage()
        # From the dictionary: nn.Module's attributes cost half a microsecond each.
        modules: dict[str, Any] = self._modules
        module = modules["module"]
        if not (self.training and torch.is_grad_enabled()):
            return module(*args, **kwargs)
        ranks = None
        if not isinstance(self.method, Backpropagation):
            ranks = ranks_of_step(self, self._in_step_by(), torch.compiler.is_compiling())
        step = self._step(module, args, kwargs, ranks)
        if torch.compiler.is_compiling():
            self._hook_points()
        else:
            self.network.look_at(module)
            if self._learns_feedback and not is_measuring():  # which puts feedback back
                self.network.forwards += 1
                if self.network.forwards in (1, _FORWARDS_TO_MOVE):
                    self._look_for_still_feedback()
        if not self.network.checked:
            self._prepare(args, kwargs)
            self._in_step_by = _nothing
        if self.rule == "grad" and not torch.compiler.is_compiling():
            modules["feedback"].share(ranks is not None)
        if ranks is None:
            if self._in_step_by is not _nothing and not is_measuring():
                self._in_step_by = _nothing
        elif self._in_step_by() is not ranks.trainer:
            self._take_state_from_first(ranks)
        return self.method.forward(step)

    @torch.compiler.assume_constant_result
    def _hook_points(self) -> bool:
        """Called, by no arguments, while a compiler traces, which follows no change of a module."""
        hook_points(self.network, self.module)
        return True

    def _take_state_from_first(self, ranks: Ranks) -> None:
        """Gives all processes that train this model the noise and the feedback of the first. From then
        on all learn the same feedback."""
        banks = self.feedback, self.exp_avg, self.exp_avg_sq
        learned = [t for bank in banks for t in bank.values()]
        if self.feedback_update is not None:
            learned += self.feedback_update.buffers()
        state = [self.noise_state, self.updates, *learned]
        ranks.take_from_first(state)
        ranks.leave_out(state)
        self._in_step_by = weakref.ref(ranks.trainer)

    def _step(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        ranks: Ranks | None = None,
        learns: bool | None = None,
    ) -> TrainingStep:
        """learns: whether it learns feedback; as the model is set, by default."""
        learns = self._learns_feedback if learns is None else learns
        modules: dict[str, Any] = self._modules
        buffers: dict[str, Any] = self._buffers
        rule = self.rule if learns else "fixed"
        has_moments = rule == "adam"
        return TrainingStep(
            module,
            args,
            kwargs,
            self.network,
            BACKENDS[self.backend],
            self.method.tangents if learns else self.method.tangents_of_error(),
            self.noise,
            self.patch,
            buffers["noise_state"],
            FeedbackStep(
                rule,
                modules["feedback"],
                modules["exp_avg"] if has_moments else None,
                modules["exp_avg_sq"] if has_moments else None,
                buffers["updates"],
                self.learning_rate,
                self.betas,
                self.eps,
                self.feedback_update if learns else None,
                ranks,
            ),
            modules["heads"],
            self.local_outputs,
        )

    @torch.inference_mode(False)
    def summary(self, *args: Any, **kwargs: Any) -> Summary:
        """The points with their features and bytes of feedback, and what each parameter learns by, from
        one forward in eval mode on these inputs, or on one argument that stands for them as an
        example_input does.

        Raises:
            TypeError: there are no inputs, and the forward takes some.
        """
        if len(args) == 1 and not kwargs:
            args, kwargs = inputs_of(self.module, args[0])
        if not (args or kwargs or _takes_keywords(self.module, {})):
            raise TypeError(
                f"FDFA: summary takes the inputs of {type(self.module).__name__}.forward, as "
                "model.summary(x), for one forward in eval mode; got none"
            )
        if not isinstance(self.method, BlockMethod):
            raise ValueError(f"FDFA: {type(self.method).__name__} has no points")
        self.network.look_at(self.module)
        matrices = 0 if self.method.feedback == "none" else 1
        if self.method.feedback == "learned" and self.rule == "adam":
            matrices = 3
        return summarize(self._step(self.module, args, kwargs), matrices)

    def forward_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the module, weights and biases, and of local heads."""
        yield from self.module.parameters()
        yield from self.heads.parameters()

    def feedback_parameters(self) -> Iterator[nn.Parameter]:
        """The feedback matrices of feedback="grad"; none for the rules that FDFA applies itself."""
        return self.feedback.parameters()

    def give_feedback_gradients(self) -> None:
        """Sets `.grad` of the feedback_parameters() to the mean of ∇B over the backwards since it was
        last set, as the step of any torch.optim optimizer does that has them."""
        give(self.feedback_parameters())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            value = self._of_module(name)
            if value is None:
                raise
            if isinstance(value, nn.Module | Tensor):
                # Called or trained by itself it would be unperturbed.
                error.add_note(f"The module within has one: model.module.{name}")
                raise
            return self._method_of_module(name, value) if callable(value) else value

    def _method_of_module(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, which may not run the module where a step of FDFA should."""

        def refuse(inner: nn.Module, inputs: Any) -> None:
            if inner in inside:
                raise RuntimeError(
                    f"FDFA: {name} of {type(self.module).__name__} runs the module, which would train "
                    "by backpropagation; call the model itself, or call it under torch.no_grad() or in "
                    "eval mode"
                )

        inside = {*self.module.modules()}

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not (self.training and torch.is_grad_enabled()):
                return method(*args, **kwargs)
            hook = register_module_forward_pre_hook(refuse)
            try:
                return method(*args, **kwargs)
            finally:
                hook.remove()

        return call

    def _is_of_module(self, name: str) -> bool:
        """Whether it is data of the module within, which is read and written as the model's."""
        if "_copies" not in self.__dict__ or name in self.__dict__ or hasattr(type(self), name):
            return False  # while the model is made, all names are its own
        value = self._of_module(name)
        is_own = name in self._parameters or name in self._buffers or name in self._modules
        return not (is_own or value is None or callable(value) or isinstance(value, Tensor))

    def _of_module(self, name: str) -> Any:
        """A public attribute of the module within; None for none."""
        module = self.__dict__.get("_modules", {}).get("module")
        return None if module is None or name.startswith("_") else getattr(module, name, None)

    def _get_name(self) -> str:
        """That of the module's class, by which transformers' Trainer knows how its labels lie."""
        return self.module._get_name()

    def __repr__(self) -> str:
        return type(self).__name__ + super().__repr__().removeprefix(self._get_name())

    def extra_repr(self) -> str:
        options = {
            "method": type(self.method).__name__,
            "feedback": type(self.feedback_update).__name__ if self.rule == "own" else self.rule,
            **({} if self.rule == "own" else {"feedback_lr": self.feedback_lr}),
            "noise": self.noise,
            **({} if self.patch == 1 else {"patch": self.patch}),
            "backend": self.backend,
        }
        return ", ".join(f"{key}={value}" for key, value in options.items())

    def __prepare_scriptable__(self) -> "FDFA":
        raise RuntimeError(NOT_SCRIPTABLE)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: without the last outputs of local heads, which hold a graph, and without the
        processes that train this model."""
        state = self.__dict__ | {"local_outputs": [], "_in_step_by": _nothing}
        del state["_copies"]
        state.pop(COMPILED_CALL, None)  # a copy would run this model
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

    def _declare(self) -> None:
        """Makes parameters of shapes to come, so that an optimizer made before them can have them."""
        names = self.block_names
        if self.method.feedback == "learned" and self.rule == "grad":
            for name in names:
                self.feedback.declare(name)
        if self.method.local_heads:
            self.heads.declare(names[:-1])

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Checks the module on an input, and makes what the method needs beside its parameters."""
        for name, parameter in self.module.named_parameters():
            if torch.compiler.is_compiling() or is_lazy(parameter):
                continue
            if parameter.is_inference():
                raise RuntimeError(
                    f"FDFA: '{name}' of the module was made under torch.inference_mode, so that it "
                    "cannot be trained; make the module outside"
                )
        if isinstance(self.method, BlockMethod):
            learns = self.method.feedback == "learned"  # as a later step will
            self._prepare_blocks(self.method, self._step(self.module, args, kwargs, learns=learns))
        self._keep_blocks()
        self.network.checked = True
        self._share()

    def _prepare_blocks(self, method: BlockMethod, step: TrainingStep) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "FDFA: give example_input, or run one training forward, before torch.compile: the "
                "feedback matrices must exist"
            )
        dual, output, tangent = step.dry_run()
        droppers = step.find_droppers() if dual.perturbs else []
        if tangent is None and dual.perturbs:
            raise no_tangent(droppers)
        if tangent is not None and output.shape[0] > 0 and not bool((tangent != 0).any()):
            warn(
                "FDFA: the tangent of the output is zero, so no block learns before it is not. Do all "
                "weights of the output layer start at zero? Those learn by the first steps",
            )
        if droppers:
            warn(
                f"FDFA: module {droppers[0]} drops the tangent; blocks whose only way to the output "
                "leads through it learn no feedback",
            )
        self._warn_of_layouts(dual)
        summary = summarize(step, 0)
        untrained = summary.untrained
        idle = [p.name for p in summary.points if not p.parameters]
        idle = [name for name in idle if not isinstance(self.network.blocks[name], Block)]
        if idle:
            warn(
                f"FDFA: no parameter learns by point '{idle[0]}', since none that learns stands "
                "between it and the points before it; let `at` leave it out",
            )
        for record in dual.records:
            is_output = output.numel() > 0 and record.output.data_ptr() == output.data_ptr()
            if is_output and not isinstance(self.network.blocks[record.name], Block):
                warn(
                    "FDFA: no parameter learns by the output's exact gradient, since point "
                    f"'{record.name}' stands at the output itself; let `at` leave it out",
                )
        if untrained:
            others = f" and {len(untrained) - 1} more" if len(untrained) > 1 else ""
            end = self.network.output
            named = "" if end is None else f"; the output is that of '{end}': output= names another"
            warn(
                f"FDFA: no gradient of the output reaches parameter '{untrained[0]}'{others} in eval "
                f"mode; model.summary(input) lists what each learns by{named}",
            )
        blocks = self.network.blocks
        unused = [name for name in blocks if name not in {record.name for record in dual.records}]
        if unused:
            raise RuntimeError(f"FDFA: block '{unused[0]}' was not used by the forward pass")
        if method.feedback != "none":
            new = self.feedback.undeclared(blocks)
            if new and self.rule == "grad":
                raise RuntimeError(
                    f"FDFA: block '{new[0]}' came after wrapping, and no optimizer has its feedback "
                    "matrix; wrap the module again and make the optimizer anew"
                )
            for record in dual.records:
                self._create(record, output.shape[1])
            samples, outputs = output.shape
            for part in dual.parts(samples):
                rows = samples if part.source is None else part.source.rows
                check_blocks(method, part, self.feedback, rows, outputs)
        if method.local_heads:
            like = next(self.module.parameters())
            self.heads.prepare(dual.records[:-1], output.shape[1], like)

    def _warn_of_layouts(self, dual: DualPass) -> None:
        """Of what would be taken otherwise than it may be meant."""
        if self.patch > 1 and dual.has_positions:
            warn(
                f"FDFA: patch={self.patch} has no effect, since the output has K values for each token "
                "or pixel, which all have one B; leave it out",
            )
        modules = {own.name: own.module for own in self.network.passes}
        for record in dual.records:
            name, shape = modules[record.name], record.shape
            is_sequence = len(shape) == 3 and (dual.has_positions or self.patch > 1)
            if not is_sequence or channels_first_at(self.module, name) is not None:
                continue
            _, tokens, features = shape
            module, at_input = place_of(self.module, name)
            channels = None if at_input else channels_of(module)
            if channels == tokens or (channels is None and tokens == features):
                warn(
                    f"FDFA: block or point '{record.name}' returns {list(shape)}, which counts as "
                    "[N, T, D], since a module of your own does not tell; if it is [N, D, T], give at= "
                    "the last of torch's layers within it instead",
                )

    def _look_for_still_feedback(self) -> None:
        """Warns of B that no step has moved, where steps have been taken since the first forward."""
        parameters = self.module.named_parameters()
        versions = {n: p._version for n, p in parameters if not (is_lazy(p) or p.is_inference())}
        if self.network.forwards == 1:
            self._versions_before = versions
            return
        before = self.__dict__.pop("_versions_before", {})
        if self.noise_state.is_meta:
            return
        if self.noise_state.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        changes = max((versions[n] - v for n, v in before.items() if n in versions), default=0)
        if max(changes, int(self.updates)) < _FORWARDS_TO_MOVE // 2:
            return  # most steps are still to come
        # The first moments of "adam" tell also of B that a saved model had.
        moved = self.exp_avg if self.rule == "adam" else self.feedback
        still = [name for name, tensor in moved.items() if not tensor.any()]
        if still:
            more = f" and {len(still) - 1} more" if len(still) > 1 else ""
            is_parameter = self.rule == "grad"
            remedy = ", or give the optimizer model.feedback_parameters()" if is_parameter else ""
            warn(
                f"FDFA: feedback has not moved in {_FORWARDS_TO_MOVE - 1} training forwards; it is "
                f"that of block or point '{still[0]}'{more}, and what it learns from was zero or not "
                "finite. Look for a module that multiplies by zero, drops the tangent, or "
                f"overflows{remedy}"
            )

    def _create(self, record: BlockRecord, outputs: int) -> None:
        """Makes B and its moments, where a block has none yet."""
        shape = [outputs, *patch_shape(record.output.shape, self.patch)[1:]]
        banks = [self.feedback]
        if self.method.feedback == "learned" and self.rule == "adam":
            banks += [self.exp_avg, self.exp_avg_sq]
        for bank in banks:
            if record.name not in bank:
                matrix = torch.zeros(shape, dtype=torch.float32, device=record.output.device)
                if bank is self.feedback:
                    self.method.initialize(matrix)
                bank.put(record.name, matrix)
                self._keep_for(bank, record.name)

    def _keep_blocks(self) -> None:
        """Drops what belongs to blocks that have left, and puts the rest in the order of the blocks.

        An optimizer saves its state by the order of the parameters, whichever came first.
        """
        for key in self.feedback.keep(self.network.blocks):
            if self.feedback_update is not None:
                self.feedback_update.drop(key)
        for moments in (self.exp_avg, self.exp_avg_sq):
            moments.keep(self.network.blocks)
        self.heads.keep(self.network.blocks)

    def _keep_for(self, bank: FeedbackBank, name: str) -> None:
        """Has an own FeedbackUpdate make what it keeps for a new B."""
        if bank is self.feedback and self.feedback_update is not None:
            self.feedback_update.create(FeedbackBank.key(name), bank[name])

    def _share(self) -> None:
        """Copies of this net that were made before the feedback and heads existed get them with it.

        What averages models goes through the tensors of a model and its copy side by side.
        """
        shapes = [*map(_shape, self.module.parameters())]
        for other in self._copies:
            if other.network.checked or [*map(_shape, other.module.parameters())] != shapes:
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
                if head.has_shape and other.heads.of(key).take_shape(head.weight.shape, head.weight):
                    other.heads.of(key).load_state_dict(head.state_dict())

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's, with copies of B of images and of all but the first of tied parameters: some
        file formats hold no tensor twice."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        if not kwargs.get("keep_vars", len(args) > 2 and args[2]):
            for _, name in self._tied(prefix.removesuffix(".")):
                if name in state:
                    state[name] = state[name].clone()
        return state

    def _tied(self, prefix: str) -> Iterator[tuple[str, str]]:
        """The first and another name of each parameter that has several."""
        names: dict[int, str] = {}
        for name, parameter in self.named_parameters(prefix, remove_duplicate=False):
            first = names.setdefault(id(parameter), name)
            if first != name:
                yield first, name

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's. A state of the module alone is for `model.module.load_state_dict`."""
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)
        except RuntimeError as error:
            banks = {key.partition(".")[0] for key in state_dict}
            is_adam = "exp_avg" in banks
            if "module" not in banks:
                error.add_note(
                    "FDFA: no key begins with 'module.'; a state of the module alone is loaded by "
                    "model.module.load_state_dict"
                )
            elif self.method.feedback == "learned" and is_adam != (self.rule == "adam"):
                theirs = "Adam" if is_adam else "another rule"
                error.add_note(
                    f"FDFA: the feedback of this state moves by {theirs}, "
                    f"and that of the model by {self.rule!r}; wrap with the same feedback=, or give "
                    "strict=False to take B alone"
                )
            raise

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Makes room for feedback and heads that a saved model has and this one has not yet."""
        self.network.look_at(self.module)
        feedback, heads = f"{prefix}feedback.", f"{prefix}heads."
        keys = [key.removeprefix(feedback) for key in state_dict if key.startswith(feedback)]
        keys += [
            key.removeprefix(heads).removesuffix(".weight")
            for key in state_dict
            if key.startswith(heads) and key.endswith(".weight")
        ]
        self.network.count_saved(map(FeedbackBank.name, keys))
        self.network.look_at(self.module)
        blocks = self.network.blocks
        banks = [(self.feedback, "feedback")]
        if self.rule == "adam":
            banks += [(self.exp_avg, "exp_avg"), (self.exp_avg_sq, "exp_avg_sq")]
        for tensors, name in banks:
            for block in blocks:
                saved = state_dict.get(f"{prefix}{name}.{FeedbackBank.key(block)}")
                if saved is not None and block not in tensors:
                    tensors.put(block, torch.zeros_like(saved, device=self.noise_state.device))
                    self._keep_for(tensors, block)
        with_head = [
            block for block in blocks if f"{heads}{FeedbackBank.key(block)}.weight" in state_dict
        ]
        for block in with_head:
            saved = state_dict[f"{heads}{FeedbackBank.key(block)}.weight"]
            self.heads.of(block).take_shape(saved.shape, saved.to(self.noise_state.device))
        self._keep_blocks()
        if with_head:
            self.heads.keep(with_head)
        for first, name in self._tied(prefix.removesuffix(".")):
            if first in state_dict and name in state_dict:  # or assign=True would untie them
                state_dict[name] = state_dict[first]
        for name in ("noise_state", "updates"):
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and saved.is_floating_point():
                args[-1].append(
                    f"FDFA: {prefix}{name} must hold whole numbers, int64, which {saved.dtype} cannot "
                    "hold exactly; convert only what is_floating_point()"
                )
                state_dict[prefix + name] = getattr(self, name)
        super()._load_from_state_dict(state_dict, prefix, *args)


@contextmanager
def _naming_example() -> Iterator[None]:
    """Errors say that a forward on example_input raised them."""
    try:
        yield
    except Exception as error:
        if not str(error).startswith("FDFA: "):
            error.add_note(
                "FDFA: raised by the forward on example_input, which is one input, a tuple of the "
                "forward's arguments, or a dict of them by name, without targets"
            )
        raise


def _nothing() -> None:
    """What no model has, as a reference to it."""


def _shape(parameter: Tensor) -> torch.Size | None:
    return None if is_lazy(parameter) else parameter.shape


def _found_points(
    module: nn.Module,
    at: Any,
    granularity: str,
    output: str | None,
    sample_index: str | None,
    patch: int,
    has_feedback: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[At, str | None]:
    """`at` and `output` as a forward on an example tells them. has_feedback: whether the method has."""
    if at is None:
        return at, output
    with _naming_example(), trace(module, args, kwargs) as traced:
        named, output = output, output or default_output(traced)
        if at != "auto":
            return at, output
        index = None if sample_index is None else sample_index_of(module, sample_index, args, kwargs)
        rows = None if index is None else len(index)
        points = auto_points(traced, granularity, output, rows, patch)
        if has_feedback and output is not None and named is None:
            return before_wide_layer(traced, points, output)
        return points, output


@torch.inference_mode(False)
def check(
    module: nn.Module,
    example_input: Any,
    *,
    at: str | At = "auto",
    granularity: str = "block",
    output: str | None = None,
    sample_index: str | None = None,
    **options: Any,
) -> Summary:
    """What FDFA(module, ...) would perturb and train, before it makes anything.

    Arguments are FDFA's, and so are the errors. at=None counts the blocks alone.
    """
    check_module(module)
    args, kwargs = inputs_of(module, example_input)
    has_feedback = _method_of(options.get("method", "fdfa")).feedback != "none"
    named = (granularity, output, sample_index, options.get("patch", 1), has_feedback)
    found = _found_points(module, at, *named, args, kwargs)
    with torch.random.fork_rng(devices=[]):  # the model draws a seed
        model = FDFA(module, at=found[0], output=found[1], sample_index=sample_index, **options)
    return model.summary(*args, **kwargs)


def inputs_of(module: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that an example_input stands for."""
    if isinstance(example, dict) and _takes_keywords(module, example):
        return (), example
    return example if isinstance(example, tuple) else (example,), {}


def _takes_keywords(module: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether they are its forward's arguments; else the dict is one."""
    try:
        inspect.signature(module.forward).bind(**inputs)
    except TypeError:
        return False
    return True


def _method_of(method: Any) -> Method:
    """The one of this name, or the method itself."""
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(
                f"FDFA: method must be one of {', '.join(METHODS)}, or a Method; got {method!r}"
            )
        return METHODS[method]()
    if not isinstance(method, Method):
        raise TypeError(f"FDFA: method must be a name or a Method, not its class; got {method!r}")
    return method


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, numbers.Real | Tensor):
        raise TypeError(f"FDFA: {name} must be a number; got {value!r}")
