"""Feedback matrices and their moments: how they are kept, saved, loaded and moved."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter


class TensorMap(nn.Module):
    """Block name → tensor of shape [n_outputs, *feature_shape], saved and moved with the model.

    Feedback stays in float32 whatever the activations are, since its steps of 1e-4 would be lost in
    less, and in the order in which the noise counts the features: images in channels_last. Only its
    device may change. A state_dict holds it row-major, which is all that some file formats can hold, so
    images as copies.
    """

    def __init__(self, as_parameters: bool = False) -> None:
        super().__init__()
        self._as_parameters = as_parameters

    @staticmethod
    def key(name: str) -> str:
        """Names of buffers may hold no dot."""
        return name.replace(".", "/")

    def declare(self, name: str) -> None:
        """A parameter of a shape to come, which an optimizer can hold already."""
        declared: Any = UninitializedParameter()
        self._parameters[self.key(name)] = declared

    def put(self, name: str, value: Tensor) -> None:
        # To the dictionary itself: a block may be called as one of this class's attributes is.
        key, value = self.key(name), in_noise_order(value)
        if not self._as_parameters:
            self._buffers[key] = value
            return
        declared = self._parameters.get(key)
        if isinstance(declared, UninitializedParameter):
            declared.materialize(value.shape, value.device, torch.float32)
            declared.data = value
        else:
            self._parameters[key] = nn.Parameter(value)

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

    def keep(self, names: Iterable[str]) -> None:
        """Drops the tensors of all other blocks, and puts the rest in the order of these names."""
        store: dict[str, Any] = self._parameters if self._as_parameters else self._buffers
        kept = {key: store[key] for key in map(self.key, names) if key in store}
        store.clear()
        store.update(kept)

    def __contains__(self, name: str) -> bool:
        return self.key(name) in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self._tensors)

    def keys(self) -> list[str]:
        return [key.replace("/", ".") for key in self._tensors]

    def values(self) -> list[Tensor]:
        return list(self._tensors.values())

    def items(self) -> list[tuple[str, Tensor]]:
        return list(zip(self.keys(), self.values(), strict=True))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        def move(t: Tensor) -> Tensor:
            if isinstance(t, UninitializedParameter):  # it will be made where it is needed
                return t
            device = fn(t).device
            return torch.empty_like(t, device=device) if t.is_meta else t.to(device)

        return super()._apply(move, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for key, value in self._tensors.items():
            destination[prefix + key] = value if keep_vars else value.detach().contiguous()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in self._tensors:
            saved = state_dict.get(prefix + key)
            if isinstance(saved, Tensor):
                state_dict[prefix + key] = in_noise_order(saved)
        super()._load_from_state_dict(state_dict, prefix, *args)
        shapeless = self._parameters.keys() - self._tensors.keys()
        missing = args[2]
        missing[:] = [key for key in missing if key.removeprefix(prefix) not in shapeless]


Mapping.register(TensorMap)


def select(names: Iterable[str], *maps: TensorMap) -> list[list[Tensor]]:
    """The tensors of these blocks in each map."""
    found: list[list[Tensor]] = []
    for tensors in maps:
        store: dict[str, Any] = tensors._parameters if tensors._as_parameters else tensors._buffers
        found.append([])
        for name in names:
            found[-1].append(store[name.replace(".", "/")])  # as TensorMap.key, without its call
    return found


def in_noise_order(matrix: Tensor) -> Tensor:
    """B or a moment of it, [K, *features], in float32 and in the memory order of the noise."""
    order = torch.channels_last if matrix.dim() == 4 else torch.contiguous_format
    # Not `contiguous`, which leaves strides as they are where a size of 1 gives the choice.
    like = torch.empty(matrix.shape, device="meta", memory_format=order)
    if matrix.dtype == torch.float32 and matrix.stride() == like.stride() and not matrix.is_inference():
        return matrix.detach()
    with torch.inference_mode(False):
        ordered = torch.empty_like(like, dtype=torch.float32, device=matrix.device)
        return ordered.copy_(matrix.detach())


class FeedbackUpdate(nn.Module):
    """How feedback follows its gradient, as an argument of FDFA: feedback=MyUpdate().

    Tensors that it keeps from step to step are its buffers, which `create` makes, so that state_dict
    has them. `name` is the block's, with slashes for dots, which no name of a buffer may have.
    """

    def create(self, name: str, feedback: Tensor) -> None:
        """Makes what is kept for a new B [K, *features]."""

    def step(self, name: str, feedback: Tensor, gradient: Tensor) -> None:
        """Moves B [K, *features] in place along ∇B, for FDFA B - G, of the same shape and finite."""
        raise NotImplementedError
