"""One training forward, as its method sees it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fdfa_ext._ops import fused
from fdfa_ext.dual_pass import DualPass
from fdfa_ext.feedback import FeedbackStep
from fdfa_ext.heads import LocalHeads
from fdfa_ext.network import Network, StrayedError
from fdfa_ext.noise import perturbation


@dataclass(slots=True)
class TrainingStep:
    """What a method works with.

    Attributes:
        module: the model to train, and `args` and `kwargs` its inputs.
        network: runs the module's passes.
        operators: of the backend.
        tangents: where they run, as the method has it.
        noise: "gaussian" or "rademacher".
        patch: side, in pixels, of an image's patches that have noise and feedback in common.
        noise_state: int64 [3]: seed, step, index of the batch's first sample.
        feedback: B, and how it moves.
        heads: local heads, for a method that has them; their outputs go to `local_outputs`.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    network: Network
    operators: Any
    tangents: str
    noise: str
    patch: int
    noise_state: Tensor
    feedback: FeedbackStep
    heads: LocalHeads
    local_outputs: list[Tensor]

    def run_blocks(self, takes_output_layer: bool = False) -> tuple[DualPass, Tensor, Tensor | None]:
        """A pass through the blocks: its records, the output and its tangent.

        For a method that takes the output layer these may be what goes into it, if it is in the pass.
        """
        dual = self._new_pass(self.noise_state)
        dual.takes_output_layer = takes_output_layer
        try:
            output, tangent = self.network.forward(self.module, dual, self.args, self.kwargs)
        except StrayedError:  # as seldom as user code changes its course
            return self.run_blocks(takes_output_layer)
        if tangent is None and dual.tangents != "none":
            raise no_tangent(self.find_droppers())
        if dual.output_layer is not None:
            return dual, output, tangent
        check_output(output)
        # A model whose weights are all frozen can still learn its feedback.
        if not output.requires_grad and not any(r.anchor.requires_grad for r in dual.records):
            output = output.detach().requires_grad_()
        return dual, output, tangent

    def dry_run(self) -> tuple[DualPass, Tensor, Tensor | None]:
        """The same in eval mode, leaving no trace."""
        dual = self._new_pass(self.noise_state.clone())
        return dual, *self.network.dry_run(self.module, dual, self.args, self.kwargs)

    def find_droppers(self) -> list[str]:
        """The modules that are given a tangent and return none, by name and type."""
        with self.network.watch_droppers(self.module) as droppers:
            self.dry_run()
        return droppers

    def perturbation(self, like: Tensor, state: Tensor, index: int) -> Tensor:
        """u of the block that has this place in the noise, in the shape of its output `like`."""
        return perturbation(self.operators, like, state, index, self.noise, self.patch)

    def _new_pass(self, noise_state: Tensor) -> DualPass:
        perturbs = self.tangents != "none"
        compiling = torch.compiler.is_compiling()
        if compiling and perturbs:
            # A compiler may put off what only the backward needs, and perturb once the state has moved.
            noise_state = fused.next_noise(noise_state)
        noise = self.noise if perturbs else "none"
        return DualPass(
            noise_state, noise, self.patch, self.operators, compiling, self.tangents, perturbs
        )


def no_tangent(droppers: list[str]) -> RuntimeError:
    why = (
        f"Module {droppers[0]} dropped it: it is not differentiable in torch's forward mode"
        if droppers
        else "No module dropped it: the output depends on no block, or a function detached it on "
        "the way"
    )
    return RuntimeError(f"FDFA: the output has no tangent. {why}")


def check_output(output: Tensor) -> None:
    if output.dim() != 2:
        raise ValueError(
            "FDFA: the output must be [N, K], one row of K values a sample; got "
            f"{list(output.shape)}. Flatten it within the module"
        )
