"""Stages of a model in several processes, which learn at the same time: no backward pass goes from one
to another."""

import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fdfa_ext._torch_internals import hooks_of
from fdfa_ext.autograd import Finish
from fdfa_ext.dual_pass import DualPass, MicroBatch, NetworkEnd
from fdfa_ext.feedback import FeedbackBank
from fdfa_ext.layers import Block
from fdfa_ext.messages import Ending, Messages
from fdfa_ext.methods import BlockMethod, ProjectedError
from fdfa_ext.micro_batches import Batch, check_pass, fingerprint, joined
from fdfa_ext.model import FDFA
from fdfa_ext.network import Network, StrayedError
from fdfa_ext.points import channels_first_at, place_of
from fdfa_ext.step import TrainingStep, check_output, no_tangent
from fdfa_ext.warning import warn


class Pipeline:
    """Trains a model in stages, one in each process of a group, as one process trains the whole.

    A batch goes through the stages in micro-batches, primal and tangent. The last stage sends d and e
    of the batch to all, and all learn by them at once. Weights and B are those of one process but for
    rounding, where modules treat each sample by itself: dropout draws other masks, and BatchNorm has
    the statistics of a micro-batch.

    A stage keeps the activations of the whole batch until it has learned, and no tangents.

    Args:
        model: FDFA of a torch.nn.Sequential, made with an example_input and alike in all processes. The
            pipeline takes it over: it keeps the modules, feedback and moments of this process's stage,
            by their names in the whole, so that the stages' state_dicts together are that of the whole.
            Its parameters are those to optimize here.
        split_before: names of the modules of the sequence at which the second and later stages begin.
            Each stage has a block or point, and all but the last end behind one, with no parameters in
            between.
        n_microbatches: into how many parts a batch is divided, or as many as it has samples.
        loss_fn: of the model's result and the target, both of the whole batch. Called in the last
            stage's process alone.
        group: the processes, a stage for each; all by default.

    Attributes:
        model: of this process's stage.
        rank: of this process in the group, and of its stage.

    Raises:
        RuntimeError: torch.distributed is not initialized, or the model has not seen an input.
        TypeError: the model is no FDFA of a torch.nn.Sequential.
        ValueError: the model cannot be cut so, or by its method cannot be trained so.
    """

    def __init__(
        self,
        model: FDFA,
        split_before: Sequence[str],
        *,
        n_microbatches: int,
        loss_fn: Callable[[Any, Any], Tensor],
        group: Any = None,
    ) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "FDFA: a Pipeline needs torch.distributed's processes; call init_process_group first"
            )
        if type(n_microbatches) is not int or n_microbatches < 1:
            raise ValueError(
                f"FDFA: n_microbatches must be a whole number, 1 or more; got {n_microbatches!r}"
            )
        self.group = dist.group.WORLD if group is None else group
        self.rank: int = dist.get_rank(self.group)
        if self.rank < 0:
            raise ValueError("FDFA: this process is not in the group of the Pipeline")
        self.size: int = dist.get_world_size(self.group)
        self.n_microbatches = n_microbatches
        self.loss_fn = loss_fn
        _check_model(model)
        stages = _stages(model, split_before, self.size)
        _check_stages(model, stages)
        _check_alike(model, stages, self.group)
        _keep(model, stages[self.rank])
        self.model = model
        self._messages = Messages(self.group)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1

    def step(self, x: Tensor | None = None, target: Any = None) -> float:
        """What forward, loss and backward of a training step do. Returns the loss, in all processes.

        x: the batch [N, *], which the first stage reads. target: what loss_fn takes in the last one.
        Others may be given None.
        """
        model = self.model
        method: Any = model.method
        if not (model.training and torch.is_grad_enabled()):
            raise RuntimeError(
                "FDFA: Pipeline.step trains, so it needs gradients and a model in training mode; "
                "pipeline(x) evaluates"
            )
        _check_hooks(model)
        model.network.look_at(model.module)
        if not model.network.checked:
            raise RuntimeError(
                "FDFA: blocks or points of this stage were exchanged; make model and Pipeline anew"
            )
        passes: list[_Pass] = []
        versions = _buffer_versions(model.module)

        def run(part: MicroBatch, x: Tensor, tangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
            done, y, ty = self._run(part, x, tangent)
            passes.append(done)
            check_pass(method, done.dual, passes[0].dual, model.feedback)
            return y, ty

        self._forward(x, run, is_training=True)
        if len(passes) > 1:
            _warn_of_buffers(model.module, versions)
        if self.is_last:
            ending, output = self._end(passes, target)
            self._messages.end(ending)
        else:
            ending = self._messages.ended(model.noise_state.device)
            output = torch.zeros_like(ending.error).requires_grad_()
        self._learn([done.dual for done in passes], output, ending)
        self._messages.finish()
        return ending.loss

    @torch.no_grad()
    def __call__(self, x: Tensor | None = None) -> Any:
        """The model's result for the batch x [N, *], which the first stage reads; None in all processes
        but the last stage's. All must call it."""

        results: list[Any] = []

        def run(_: MicroBatch, x: Tensor, __: Tensor | None) -> tuple[Any, None]:
            results.append(self.model.module(x))
            return results[-1], None

        self._forward(x, run, is_training=False)
        self._messages.finish()
        return _whole(results) if self.is_last else None

    def _forward(
        self, x: Any, run: Callable[..., tuple[Any, Tensor | None]], is_training: bool
    ) -> None:
        """Has each micro-batch run, and sends the next stage the primal and tangent of it."""
        state = self.model.noise_state
        if self.is_first:
            inputs = self._divided(x, is_training)
        else:
            inputs = self._messages.receive(state, x, is_training)
        for part, batch, own, tangent in inputs:
            y, ty = run(part, own, tangent)
            if not self.is_last:
                self._messages.send(part, batch, state, y, ty)

    def _divided(
        self, x: Any, is_training: bool
    ) -> Iterator[tuple[MicroBatch, Batch, Tensor, Tensor | None]]:
        if not isinstance(x, Tensor) or x.dim() == 0:
            raise TypeError(
                f"FDFA: the first stage needs the batch, one tensor [N, *]; got {type(x).__name__}"
            )
        batch = Batch(len(x), self.n_microbatches, is_training, fingerprint(x))
        for part in batch.parts():
            own = x[part.first : part.first + part.samples]
            # Without a graph, as all inputs of a model, and with a version of its own: a module may
            # change it in place. One that depends on parameters is left to the error that it gets.
            yield part, batch, own if x.grad_fn is not None else own.data, None

    def _run(
        self, part: MicroBatch, x: Tensor, tangent: Tensor | None
    ) -> "tuple[_Pass, Tensor, Tensor | None]":
        """A training pass of one micro-batch, and what goes on to the next stage."""
        model = self.model
        step = model._step(model.module, (x,), {})
        dual = step.new_pass(model.noise_state)
        dual.micro_batch, dual.input_tangent = part, tangent
        ends: list[_End] = []

        def end(output: Tensor, tangent: Tensor | None) -> Tensor:
            ends.append(_End(output, tangent, output.detach().requires_grad_()))
            return ends[-1].leaf

        if model.network.output is not None:
            dual.end = NetworkEnd(end)
        try:
            y, ty = model.network.forward(model.module, dual, (x,), {})
        except StrayedError:
            return self._run(part, x, tangent)
        if not self.is_last:
            _check_end_of_stage(y, ty, dual)
            return _Pass(dual, None), y, ty
        if model.network.output is None:
            y = end(y, ty)
        if not ends:
            raise RuntimeError(
                f"FDFA: output module '{model.network.output}' was not used by the forward pass"
            )
        own = ends[0]
        if own.tangent is None and dual.perturbs:
            raise no_tangent([])
        check_output(own.output)
        own.result = y
        return _Pass(dual, own), y, ty

    def _end(self, passes: "list[_Pass]", target: Any) -> tuple[Ending, Tensor]:
        """Loss, d and e of the batch, and the output [N, *] with the graph of what made it."""
        ends = [done.end for done in passes if done.end is not None]
        loss = self.loss_fn(_whole([end.result for end in ends]), target)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise TypeError(
                "FDFA: loss_fn must return one number as a tensor with a graph to the model's result; "
                f"got {loss!r}"
            )
        with torch.autocast(loss.device.type, enabled=False):
            loss.backward()
        errors = [torch.zeros_like(e.leaf) if e.leaf.grad is None else e.leaf.grad for e in ends]
        tangent = None if ends[0].tangent is None else torch.cat([end.tangent for end in ends])
        output = torch.cat([end.output for end in ends])
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        first, dual = None, passes[0].dual
        if dual.has_positions:
            first = self.model.network.channels_first(self.model.module)
            first = first if dual.end is None else dual.end.channels_first
        return Ending(loss.item(), torch.cat(errors), tangent, first), output

    def _learn(self, passes: list[DualPass], output: Tensor, ending: Ending) -> None:
        """Moves B and gives this stage's parameters their gradients."""
        model, method = self.model, self.model.method
        assert isinstance(method, BlockMethod), "or it was refused"
        dual = joined(method, passes)
        if model.rule == "grad":
            model.feedback.share(False)
        whole = model._step(model.module, (), {})
        given = {field.name: getattr(whole, field.name) for field in fields(whole)}
        made = dual, output, ending.tangent
        step = _StageStep(**given, made=made, channels_first=ending.channels_first)
        attached = method.forward(step)
        with torch.autocast(attached.device.type, enabled=False):
            attached.backward(ending.error)


@dataclass(slots=True)
class _End:
    """The end of the network in one micro-batch."""

    output: Tensor  # with the graph of the output layer
    tangent: Any
    leaf: Tensor  # what the loss is made of: its gradient is e
    result: Any = None  # of the model: what it makes of the leaf, or the leaf itself


@dataclass(slots=True)
class _Pass:
    dual: DualPass
    end: _End | None  # in the last stage


@dataclass(slots=True)
class _StageStep(TrainingStep):
    """A step whose passes have been made."""

    made: tuple[DualPass, Tensor, Tensor | None]
    channels_first: bool | None  # of the output

    def run(self, finish: Finish, takes_output_layer: bool = False) -> Any:
        return self._finished(finish, *self.made)

    def rows(
        self, dual: DualPass, output: Tensor, tangent: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return dual.rows(output, tangent, self.channels_first)


def _whole(results: list[Any]) -> Tensor:
    """The model's result for a batch, of those for its micro-batches."""
    for result in results:
        if not isinstance(result, Tensor) or result.dim() == 0:
            raise TypeError(
                "FDFA: in a Pipeline the model must return one tensor [N, *]; got "
                f"{type(result).__name__}"
            )
    return torch.cat(results)


def _buffer_versions(module: nn.Module) -> dict[str, int]:
    return {name: t._version for name, t in module.named_buffers()}


def _warn_of_buffers(module: nn.Module, versions: dict[str, int]) -> None:
    for name, t in module.named_buffers():
        if t._version != versions.get(name, t._version):
            warn(
                f"FDFA: buffer '{name}' moves once for each micro-batch in a Pipeline, so that the "
                "stages do not train as one process does",
            )


def _check_hooks(model: FDFA) -> None:
    if any("forward" in vars(whole) or any(hooks_of(whole)) for whole in (model, model.module)):
        raise ValueError(
            "FDFA: the model or its sequence has a hook or a forward of its own, which no stage calls"
        )


def _check_method(model: FDFA) -> None:
    method = model.method
    if not isinstance(method, BlockMethod) or method.local_heads:
        raise ValueError(
            f"FDFA: a Pipeline needs a method whose blocks learn by the output's error alone; "
            f"{type(method).__name__} is none"
        )
    for name in ("forward", "deltas", "feedback_gradients"):
        own = getattr(type(method), name)
        if own not in (getattr(BlockMethod, name), getattr(ProjectedError, name)):
            raise ValueError(
                f"FDFA: {type(method).__name__} has a {name} of its own, for all blocks together, of "
                "which a stage has some; define delta and feedback_gradient, of one block"
            )
    update, names = model.feedback_update, {FeedbackBank.key(name) for name in model.block_names}
    for name, _ in update.named_buffers() if update is not None else ():
        if name not in names:
            raise ValueError(
                f"FDFA: {type(update).__name__} keeps buffer '{name}', which is no block's alone, so "
                "that each stage would have one; name buffers by the blocks"
            )


def _check_model(model: FDFA) -> None:
    is_model = isinstance(model, FDFA) and type(model).forward is FDFA.forward
    if not is_model or type(model.module).forward is not nn.Sequential.forward:
        got = type(model).__name__
        if isinstance(model, nn.Module) and isinstance(getattr(model, "module", None), nn.Module):
            got = f"{got} of {type(model.module).__name__}"
        raise TypeError(f"FDFA: a Pipeline cuts an FDFA of a torch.nn.Sequential; got {got}")
    network = model.network
    if not model.prepared:
        raise RuntimeError("FDFA: the model has not seen an input; make it with an example_input")
    if network.first_index is not None:
        raise ValueError("FDFA: the model is a stage of a Pipeline already; make it anew")
    _check_method(model)
    if network.sample_index is not None:
        raise ValueError("FDFA: a Pipeline divides a batch by samples, and cannot by sample_index")
    _check_hooks(model)
    if network.plan is not None and network.plan.keeps_activations:
        warn(
            "FDFA: a module keeps hidden activations, in a Pipeline those of one micro-batch alone; a "
            "loss on them does not train as in one process",
        )


def _stages(model: FDFA, split_before: Sequence[str], size: int) -> list[list[str]]:
    """The names of the sequence's modules in each stage."""
    children = [*model.module._modules]
    if isinstance(split_before, str) or len(split_before) != size - 1:
        raise ValueError(
            f"FDFA: split_before must list the names at which all stages but the first begin: expected "
            f"{size - 1} for {size} processes, got {split_before!r}"
        )
    starts = []
    for name in split_before:
        if name not in children:
            raise ValueError(f"FDFA: split_before names {name!r}, but the sequence has {children}")
        starts.append(children.index(name))
    bounds = [0, *starts, len(children)]
    if bounds != sorted(set(bounds)):
        raise ValueError(
            f"FDFA: split_before must be in the order of the sequence and leave no stage empty; got "
            f"{list(split_before)}"
        )
    return [children[a:b] for a, b in pairwise(bounds)]


def _blocks_of(model: FDFA, stage: Sequence[str]) -> list[Any]:
    """The passes of the blocks and points in these modules, in the order of the noise."""
    return [own for own in model.network.passes if own.module.partition(".")[0] in stage]


def _part(model: FDFA, stage: Sequence[str]) -> nn.Sequential:
    return nn.Sequential(OrderedDict((name, model.module.get_submodule(name)) for name in stage))


def _members(part: nn.Module, points: set[int]) -> Iterator[tuple[str, int]]:
    """By name what a stage has for itself: modules, but for those without parameters and point, and
    the memory of parameters and buffers."""
    for name, module in [*part.named_modules()][1:]:
        tensors = [*module.parameters(), *module.buffers()]
        if tensors or id(module) in points:
            yield name, id(module)
    for name, t in [*part.named_parameters(), *part.named_buffers()]:
        yield name, t.data_ptr() or id(t)


def _check_stages(model: FDFA, stages: list[list[str]]) -> None:
    """Raises where a stage cannot be trained by itself. All processes do for all stages."""
    points = {id(block) for block in model.network.blocks.values()}
    places = [place_of(model.module, own.module) for own in model.network.passes]
    ends = {id(block) for block, at_input in places if not at_input}
    owners: dict[int, tuple[int, str]] = {}
    for number, stage in enumerate(stages):
        part = _part(model, stage)
        own = _blocks_of(model, stage)
        if not own:
            raise ValueError(
                f"FDFA: stage {number}, {stage}, has no block or point; cut elsewhere, where "
                "model.summary(input) shows them"
            )
        behind: list[nn.Module] = []  # the last block or point
        for name in stage:
            child = part.get_submodule(name)
            inner = {*map(id, child.modules())}
            if inner & points:
                behind = []
            if not inner & ends:
                behind.append(child)
        if number < len(stages) - 1 and any(True for child in behind for _ in child.parameters()):
            raise ValueError(_behind(own[-1].name))
        for name, member in _members(part, points):
            first, other = owners.setdefault(member, (number, name))
            if first != number:
                raise ValueError(
                    f"FDFA: '{name}' of stage {number} is '{other}' of stage {first} too, and stages "
                    "have nothing in common; cut elsewhere"
                )
        told = [block.module for block in own]
        if stage is stages[-1]:
            told.append(model.network.output or model.network.returning)
        matters = model.network.dimensions == 3 or model.patch > 1
        for name in filter(None, told if matters else ()):
            if channels_first_at(part, name) != channels_first_at(model.module, name):
                raise ValueError(
                    f"FDFA: the layout of what '{name}' returns in stage {number} is told by a module "
                    "before the cut; cut elsewhere"
                )
    norms = (m for m in model.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    if any(norm.training or not norm.track_running_stats for norm in norms):
        warn(
            "FDFA: batch normalization has the statistics of a micro-batch in a Pipeline, so that the "
            "stages do not train as one process does",
        )


def _check_alike(model: FDFA, stages: list[list[str]], group: Any) -> None:
    """Raises unless all processes of the group have made the same model and cut it in the same way."""
    shapes = [(name, tuple(t.shape)) for name, t in model.state_dict().items()]
    told = zlib.crc32(repr((stages, model.extra_repr(), shapes, model.block_names)).encode())
    own = torch.tensor([told], device=model.noise_state.device)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    if any(int(other) != told for other in found):
        raise RuntimeError(
            "FDFA: the processes of a Pipeline must make the same model, by the same options, and cut "
            "it in the same way"
        )


def _keep(model: FDFA, stage: Sequence[str]) -> None:
    """Leaves the model one stage."""
    whole = model.network
    own = _blocks_of(model, stage)
    points = [
        block.module
        for block in own
        if block.name == block.module and not isinstance(whole.blocks[block.name], Block)
    ]
    output = whole.output
    if output is not None and output.partition(".")[0] not in stage:
        output = None
    network = Network(tuple(points) or None, output, None, first_index=own[0].index)
    network.dimensions, network.returning = whole.dimensions, whole.returning
    for name in [*model.module._modules]:
        if name not in stage:
            delattr(model.module, name)
    model.network = network
    network.look_at(model.module)
    network.count({name: n - 1 for name, n in whole.uses.items() if name.partition(".")[0] in stage})
    network.look_at(model.module)
    network.checked = True
    model._keep_blocks()


def _behind(last: str) -> str:
    return (
        f"FDFA: a stage ends with parameters behind its last block or point, '{last}', which learn by "
        "those of the next; cut right behind a block or point, where model.summary(input) shows them"
    )


def _check_end_of_stage(y: Tensor, ty: Tensor | None, dual: DualPass) -> None:
    last = dual.records[-1].name if dual.records else "none"
    if y.requires_grad:
        raise ValueError(_behind(last))
    if ty is None and dual.perturbs:
        raise RuntimeError(
            f"FDFA: no tangent leaves the stage: a module behind block or point '{last}' dropped it"
        )
