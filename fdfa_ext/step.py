"""One training forward, as its method sees it."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fdfa_ext._ops import fused
from fdfa_ext._torch_internals import graph_break
from fdfa_ext.autograd import Finish, attach_parts
from fdfa_ext.data_parallel import Ranks
from fdfa_ext.dual_pass import DualPass, NetworkEnd
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

    def run(self, finish: Finish, takes_output_layer: bool = False) -> Any:
        """What the module returns, its output by finish(pass, output, tangent, feedback).

        takes_output_layer: whether the method can run a linear one itself, as in run_blocks.
        """
        if not self.network.ends_within(self.args, self.kwargs):
            return self._finished(finish, *self.run_blocks(takes_output_layer))
        dual = self.new_pass(self.noise_state, self.feedback.ranks)
        end = dual.end = NetworkEnd(
            lambda output, tangent: self._finished(finish, dual, *self._checked(dual, output, tangent))
        )
        result, _ = self.network.forward(self.module, dual, self.args, self.kwargs)
        if not end.reached:
            raise _unused_output(self.network.output)
        return result

    def refuse_compiled_end(self) -> None:
        """For what moves B outside a compiler's graph: within the module no graph can break."""
        if torch.compiler.is_compiling() and self.network.output is not None:
            graph_break("a compiler does not raise an error: it goes on without compiling")
            raise RuntimeError(
                "FDFA: torch.compile cannot train a model with points or output= by a method or a "
                "FeedbackUpdate of your own that moves feedback; train it uncompiled"
            )

    def _finished(
        self, finish: Finish, dual: DualPass, output: Tensor, tangent: Tensor | None
    ) -> Tensor:
        output, tangent = self.rows(dual, output, tangent)
        return dual.of_rows(attach_parts(finish, dual, output, tangent, self.feedback))

    def rows(
        self, dual: DualPass, output: Tensor, tangent: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The module's output and its tangent with a row [K] for each sample, token or pixel."""
        first = None
        if dual.has_positions:
            end = dual.end
            first = self.network.channels_first(self.module) if end is None else end.channels_first
        return dual.rows(output, tangent, first)

    def run_blocks(self, takes_output_layer: bool = False) -> tuple[DualPass, Tensor, Tensor | None]:
        """A pass through the blocks: its records, the output and its tangent.

        For a method that takes the output layer these may be what goes into it, if it is in the pass.
        """
        dual = self.new_pass(self.noise_state, self.feedback.ranks)
        dual.takes_output_layer = takes_output_layer and self.network.sample_index is None
        try:
            output, tangent = self.network.forward(self.module, dual, self.args, self.kwargs)
        except StrayedError:  # as seldom as user code changes its course
            return self.run_blocks(takes_output_layer)
        if dual.output_layer is not None and (tangent is not None or dual.tangents == "none"):
            return dual, output, tangent
        return dual, *self._checked(dual, output, tangent)

    def _checked(
        self, dual: DualPass, output: Tensor, tangent: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if tangent is None and dual.tangents != "none":
            # A dry run to find them would be within this pass, where the network ends within the model.
            raise no_tangent([] if dual.end is not None else self.find_droppers())
        check_output(output)
        if output.dim() != dual.dimensions:
            raise _other_output(dual.dimensions, output.dim())
        # A model whose weights are all frozen can still learn its feedback.
        if not output.requires_grad and not any(r.anchor.requires_grad for r in dual.records):
            output = output.detach().requires_grad_()
        return output, tangent

    def dry_run(self, keeps_graph: bool = False) -> tuple[DualPass, Tensor, Tensor | None]:
        """run_blocks in eval mode, leaving no trace; the graph of a training pass if that is kept.

        It finds the output's dimensions; what it returns is rows [K], whatever these are.
        """
        dual = self.new_pass(self.noise_state.clone())
        if not self.network.checked:
            dual.unforeseen = Counter()
        found: list[tuple[Tensor, Tensor | None]] = []
        if self.network.output is not None:

            def keep(output: Tensor, tangent: Tensor | None) -> Tensor:
                found.append((output, tangent))
                return output

            dual.end = NetworkEnd(keep)
        try:
            with torch.set_grad_enabled(keeps_graph):
                result = self.network.dry_run(self.module, dual, self.args, self.kwargs)
        except StrayedError:
            return self.dry_run(keeps_graph)
        if dual.unforeseen:
            self.network.count(dual.unforeseen)
            return self.dry_run(keeps_graph)
        if dual.end is not None and not found:
            raise _unused_output(self.network.output)
        if dual.end is not None:
            dual.end.returned = result[0]
        output, tangent = found[0] if found else result
        check_output(output)
        if output.dim() != dual.dimensions:
            if self.network.checked:
                raise _other_output(dual.dimensions, output.dim())
            self.network.dimensions = output.dim()
            return self.dry_run(keeps_graph)
        return dual, *self.rows(dual, output, tangent)

    def find_droppers(self) -> list[str]:
        """The modules that are given a tangent and return none, by name and type."""
        with self.network.watch_droppers(self.module) as droppers:
            self.dry_run()
        return droppers

    def perturbation(self, like: Tensor, state: Tensor, index: int) -> Tensor:
        """u of the block that has this place in the noise, in the shape of its output `like`."""
        return perturbation(self.operators, like, state, index, self.noise, self.patch)

    def new_pass(self, noise_state: Tensor, ranks: Ranks | None = None) -> DualPass:
        perturbs = self.tangents != "none"
        compiling = torch.compiler.is_compiling()
        if compiling and perturbs:
            # A compiler may put off what only the backward needs, and perturb once the state has moved.
            noise_state = fused.next_noise(noise_state)
        noise = self.noise if perturbs else "none"
        return DualPass(
            noise_state,
            noise,
            self.patch,
            self.operators,
            compiling,
            self.tangents,
            perturbs,
            self.network.dimensions,
            ranks,
        )


# By the output's dimensions, what they are.
_OUTPUTS = {1: "[N]", 2: "[N, K]", 3: "[N, T, K]"}


def _shape_of(dimensions: int) -> str:
    return _OUTPUTS.get(dimensions) or f"[N, K, {', '.join('DHW'[2 - dimensions :])}]"


def _other_output(before: int, now: int) -> ValueError:
    return ValueError(
        f"FDFA: the output was {_shape_of(before)} in the dry run, in eval mode, and is "
        f"{_shape_of(now)} now; return one of them in both modes, and wrap the module again to change "
        "it"
    )


def _unused_output(name: str | None) -> RuntimeError:
    return RuntimeError(f"FDFA: output module '{name}' was not used by the forward pass")


def no_tangent(droppers: list[str]) -> RuntimeError:
    why = (
        f"Module {droppers[0]} dropped it: it is not differentiable in torch's forward mode"
        if droppers
        else "No module dropped it: the output depends on no block, or a function detached it on "
        "the way"
    )
    return RuntimeError(f"FDFA: the output has no tangent. {why}")


def check_output(output: Tensor) -> None:
    if not 1 <= output.dim() <= 5:
        raise ValueError(
            "FDFA: the output must be [N, K], one row of K values a sample, or [N, T, K], one a token, "
            f"or [N, K, H, W], one a pixel; got {list(output.shape)}. Name the module that returns it "
            "by output="
        )
