"""Feedback matrices and their moments: how they are kept, saved, loaded and moved."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.parameter import UninitializedParameter

from fdfa_ext._torch_internals import fused_adam_, graph_break
from fdfa_ext.data_parallel import Ranks
from fdfa_ext.feedback_gradients import keep_averaged, share, withhold
from fdfa_ext.noise import in_memory_format

RULES = ("ema", "adam", "grad")


class FeedbackBank(nn.Module):
    """Block name → tensor of shape [n_outputs, *feature_shape], saved and moved with the model.

    Feedback stays in float32 whatever the activations are, since its steps of 1e-4 would be lost in
    less, and in the order in which the noise counts the features: images in channels_last. Only its
    device may change. A state_dict holds it row-major, which is all that some file formats can hold, so
    images as copies.
    """

    def __init__(self, as_parameters: bool = False, are_withheld: bool = False) -> None:
        """are_withheld: whether loops may not scale the gradients of parameters."""
        super().__init__()
        self._as_parameters = as_parameters
        self._are_withheld = are_withheld

    @staticmethod
    def key(name: str) -> str:
        """Names of buffers may hold no dot."""
        return name.replace(".", "/")

    @staticmethod
    def name(key: str) -> str:
        return key.replace("/", ".")

    def declare(self, name: str) -> None:
        """A parameter of a shape to come, which an optimizer can hold already."""
        declared: Any = UninitializedParameter()
        self._parameters[self.key(name)] = declared

    def put(self, name: str, value: Tensor) -> None:
        # To the dictionary itself: a block may be called as one of this class's attributes is.
        key, value = self.key(name), in_memory_format(value)
        if not self._as_parameters:
            self._buffers[key] = value
            return
        declared = self._parameters.get(key)
        if isinstance(declared, UninitializedParameter):
            declared.materialize(value.shape, value.device, torch.float32)
            declared.data = value
        else:
            self._parameters[key] = nn.Parameter(value)
        self.withhold()

    @property
    def _tensors(self) -> dict[str, Any]:
        """Those that have a shape."""
        if not self._as_parameters:
            return self._buffers
        return {
            key: value
            for key, value in self._parameters.items()
            if not isinstance(value, UninitializedParameter)
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self.key(name)]

    def get(self, name: str, default: Any = None) -> Any:
        return self._tensors.get(self.key(name), default)

    def undeclared(self, names: Iterable[str]) -> list[str]:
        """Those that have come since the first ones, as parameters that no optimizer can have."""
        known = self._parameters if self._as_parameters else self._buffers
        return [name for name in names if known and self.key(name) not in known]

    def keep(self, names: Iterable[str]) -> set[str]:
        """Drops the tensors of all other blocks, and puts the rest in the order of these names.

        Returns the keys of those dropped.
        """
        store: dict[str, Any] = self._parameters if self._as_parameters else self._buffers
        kept = {key: store[key] for key in map(self.key, names) if key in store}
        dropped = store.keys() - kept.keys()
        store.clear()
        store.update(kept)
        return dropped

    def __contains__(self, name: str) -> bool:
        return self.key(name) in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self._tensors)

    def keys(self) -> list[str]:
        return [*map(self.name, self._tensors)]

    def values(self) -> list[Tensor]:
        return list(self._tensors.values())

    def items(self) -> list[tuple[str, Tensor]]:
        return list(zip(self.keys(), self.values(), strict=True))

    def withhold(self) -> None:
        """Keeps the gradients of parameters from loops, whatever tensors they are now."""
        if self._are_withheld:
            withhold(self._tensors.values())

    def share(self, are_averaged: bool) -> None:
        """Says whether processes average the gradients of parameters in the next backward."""
        share(self.parameters(), are_averaged)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.withhold()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        def move(t: Tensor) -> Tensor:
            if isinstance(t, UninitializedParameter):  # it will be made where it is needed
                return t
            device = fn(t).device
            return torch.empty_like(t, device=device) if t.is_meta else t.to(device)

        result = super()._apply(move, recurse)
        self.withhold()
        return result

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for key, value in self._tensors.items():
            destination[prefix + key] = value if keep_vars else value.detach().contiguous()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in self._tensors:
            saved = state_dict.get(prefix + key)
            if isinstance(saved, Tensor):
                state_dict[prefix + key] = in_memory_format(saved)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.withhold()
        shapeless = self._parameters.keys() - self._tensors.keys()
        missing = args[2]
        missing[:] = [key for key in missing if key.removeprefix(prefix) not in shapeless]


Mapping.register(FeedbackBank)


class FeedbackUpdate(nn.Module):
    """How feedback follows its gradient, as an argument of FDFA: feedback=MyUpdate().

    Tensors that it keeps from step to step are its buffers, which `create` makes, so that state_dict
    has them. `name` is the block's, with slashes for dots, which no name of a buffer may have.
    """

    def create(self, name: str, feedback: Tensor) -> None:
        """Makes what is kept for a new B [K, *features]."""

    def drop(self, name: str) -> None:
        """Forgets a block that has left the model: the buffer of its name, unless you keep others."""
        self._buffers.pop(name, None)

    def step(self, name: str, feedback: Tensor, gradient: Tensor) -> None:
        """Moves B [K, *features] in place along ∇B, for FDFA B - G, of the same shape and finite."""
        raise NotImplementedError


@dataclass(slots=True)
class FeedbackStep:
    """How B moves in one training step: its rule, with the state and the options of then."""

    rule: str  # of RULES, or "own"
    matrices: FeedbackBank
    exp_avg: FeedbackBank | None  # for rule "adam" alone
    exp_avg_sq: FeedbackBank | None
    updates: Tensor
    learning_rate: Tensor
    betas: tuple[float, float]
    eps: float
    own: FeedbackUpdate | None
    ranks: Ranks | None = None  # the processes that share the batch

    def select(self, names: Sequence[str]) -> list[list[Tensor]]:
        """B of these blocks, and the first and second moments, where there are any."""
        found: list[list[Tensor]] = []
        for bank in (self.matrices, self.exp_avg, self.exp_avg_sq):
            found.append([])
            if bank is not None:
                tensors: dict[str, Any] = bank._parameters if bank._as_parameters else bank._buffers
                for name in names:
                    found[-1].append(tensors[name.replace(".", "/")])  # FeedbackBank.key, uncalled
        return found

    def keep_averaged(self, names: Sequence[str]) -> None:
        """In the backward of rule "grad": keeps from loops the gradients that processes average."""
        if self.ranks is not None:
            keep_averaged(self.select(names)[0], self.ranks)

    def move(
        self, names: Sequence[str], gradients: list[Tensor], rows: int, are_common: bool = False
    ) -> None:
        """Moves the B of these blocks along their gradients, or the means of these over the processes
        unless they are common to all; none if a gradient or its square is not finite, or there are no
        rows."""
        if torch.compiler.is_compiling():
            graph_break("FDFA: this method moves its feedback outside the compiled graph")
        any_rows: Tensor | bool = rows > 0
        if self.ranks is not None and not are_common:
            gradients, any_rows = self.ranks.mean(gradients, rows, names)
        matrices, *moments = self.select(names)
        # A norm keeps what has no finite square, and is far cheaper than a test of each element.
        finite = torch.stack([vector_norm(gradient) for gradient in gradients]).isfinite().all()
        finite = finite & any_rows
        if self.own is not None:
            if finite:
                for name, matrix, gradient in zip(names, matrices, gradients, strict=True):
                    self.own.step(FeedbackBank.key(name), matrix, gradient)
        elif self.rule == "ema":
            learning_rate = float(self.learning_rate)
            for matrix, gradient in zip(matrices, gradients, strict=True):
                matrix.sub_(torch.where(finite, learning_rate * gradient, 0))
        else:
            fused_adam_(
                matrices,
                gradients,
                *moments,
                [],
                [self.updates.add_(1).float()] * len(names),
                lr=float(self.learning_rate),
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=0.0,
                eps=self.eps,
                amsgrad=False,
                maximize=False,
                found_inf=(~finite).float(),
            )
