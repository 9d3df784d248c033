"""Local heads: the linear classifiers of blocks in greedy learning (method "lg-fg-a")."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from fdfa_ext.dual_pass import BlockRecord
from fdfa_ext.feedback import FeedbackBank
from fdfa_ext.noise import flatten_features


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

    @torch.inference_mode(False)  # what is made here is trained
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


class LocalHeads(nn.ModuleDict):
    """Block name, as FeedbackBank.key has it → LocalHead."""

    def of(self, name: str) -> LocalHead:
        """The head of this block, made where it does not exist."""
        key = FeedbackBank.key(name)
        if key not in self:
            # To the dictionary itself: a block may be called as one of ModuleDict's attributes is.
            self._modules[key] = LocalHead()
        head: Any = self[key]
        return head

    def declare(self, names: Iterable[str]) -> None:
        for name in names:
            self.of(name)

    def prepare(self, records: Sequence[BlockRecord], outputs: int, like: Tensor) -> None:
        """Makes the heads of these blocks and drops all others. like: has the device and dtype."""
        names = [record.name for record in records]
        keys = [*map(FeedbackBank.key, names)]
        new = [name for name, key in zip(names, keys, strict=True) if len(self) > 0 and key not in self]
        if new:
            raise RuntimeError(
                f"FDFA: block '{new[0]}' needs a local head that no optimizer has: it came after "
                "wrapping, or the module calls its blocks in another order than it defines them. Wrap "
                "the module again, with example_input"
            )
        for record in records:
            self.of(record.name).take_shape((outputs, record.output.shape[1:].numel()), like)
        self.keep(names)

    def keep(self, names: Iterable[str]) -> None:
        """Drops the heads of all other blocks, and puts the rest in the order of these names."""
        kept = {key: self._modules[key] for key in map(FeedbackBank.key, names) if key in self}
        self._modules.clear()
        self._modules.update(kept)

    def check(self, records: Sequence[BlockRecord], outputs: int) -> None:
        """Raises ValueError unless the heads of these blocks fit them and the network's outputs."""
        for record in records:
            head, features = self.of(record.name), record.output.shape[1:].numel()
            if (head.out_features, head.in_features) != (outputs, features):
                raise ValueError(
                    f"FDFA: block '{record.name}': its local head makes {head.out_features} outputs of "
                    f"{head.in_features} features, but {outputs} outputs and {features} features came; "
                    "both are fixed, so wrap the module again"
                )

    def run(self, record: BlockRecord, u: Tensor) -> tuple[Tensor, Tensor]:
        """The output [N, outputs] of a block's head, and its tangent for u [N, *features]."""
        head = self.of(record.name)
        local: Tensor = head(flatten_features(record.output))
        u = flatten_features(u).to(local.dtype)
        return local, F.linear(u, head.weight.detach().to(local.dtype))
