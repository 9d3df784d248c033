"""What a model's points are, and what each of its parameters learns by."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fdfa_ext.dual_pass import NetworkEnd
from fdfa_ext.own_code import leaves_behind, nodes_behind
from fdfa_ext.patches import patch_shape
from fdfa_ext.step import TrainingStep

_FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Point:
    """One place where the model is perturbed.

    Attributes:
        name: of the module that ends there, or with ".input" of the one that begins there.
        kind: its class.
        features: shape of what is perturbed, without the samples.
        parameters: names of those that learn by its error δ.
        feedback_bytes: of B and its moments.
    """

    name: str
    kind: str
    features: tuple[int, ...]
    parameters: list[str]
    feedback_bytes: int


@dataclass(frozen=True)
class Summary:
    """A model's points, as `print` shows them.

    Attributes:
        points: in the order of the forward.
        output: name of the module whose result is the network's output; None for the model's own.
        outputs: K.
        exact: names of the parameters that the exact gradient trains, of the output or of what is made
            of it.
        untrained: those that nothing trains, though they require a gradient.
    """

    points: list[Point]
    output: str | None
    outputs: int
    exact: list[str]
    untrained: list[str]

    @property
    def feedback_bytes(self) -> int:
        """Of all B and their moments."""
        return sum(point.feedback_bytes for point in self.points)

    def __str__(self) -> str:
        rows = [("point", "module", "features", "feedback", "parameters")]
        rows += [
            (p.name, p.kind, str(list(p.features)), _readable(p.feedback_bytes), _listed(p.parameters))
            for p in self.points
        ]
        ends = (self.output or "(result)", "output", str([self.outputs]), "exact", _listed(self.exact))
        rows.append(ends)
        if self.untrained:
            rows.append(("", "", "", "not by the output", _listed(self.untrained)))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(r, widths, strict=False)), r[4]]) for r in rows
        ]
        return "\n".join(
            [*(line.rstrip() for line in lines), f"feedback {_readable(self.feedback_bytes)}"]
        )


def summarize(step: TrainingStep, matrices: int) -> Summary:
    """Of one dry run. matrices: number of tensors of B's shape that a point has."""
    dual, output, _ = step.dry_run(keeps_graph=True)
    names = {parameter: name for name, parameter in step.module.named_parameters()}
    points = []
    trained: set[str] = set()
    for record in dual.records:
        learning = _names_behind(record.anchor, names)
        trained.update(learning)
        size = output.shape[1]
        for side in patch_shape(record.output.shape, step.patch)[1:]:
            size *= side
        kind = type(step.network.blocks[record.name]).__name__
        features = tuple(record.shape[1:])
        points.append(Point(record.name, kind, features, learning, matrices * size * _FLOAT32))
    ends = [output] if dual.end is None else [output, *_made_of(dual.end)]
    found = {name for end in ends for name in _names_behind(end, names)}
    exact = [name for name in names.values() if name in found]
    trained.update(exact)
    wanting = [name for parameter, name in names.items() if parameter.requires_grad]
    untrained = [name for name in wanting if name not in trained]
    return Summary(points, step.network.output, output.shape[1], exact, untrained)


def _made_of(end: NetworkEnd) -> Iterator[Tensor]:
    """What the model returns of the network's output."""
    node = None if end.output is None else end.output.grad_fn
    for t in tree_leaves(end.returned):
        if isinstance(t, Tensor) and node is not None and node in nodes_behind(t):
            yield t


def _names_behind(end: Tensor, names: dict[nn.Parameter, str]) -> list[str]:
    """Of the parameters that its graph leads to, in the model's order."""
    leaves = {*leaves_behind(end)} if end.requires_grad else set()
    return [name for parameter, name in names.items() if parameter in leaves]


def _readable(size: int) -> str:
    return f"{size / 2**20:.2f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def _listed(names: Sequence[str]) -> str:
    if len(names) <= 4:
        return ", ".join(names) or "none"
    return f"{', '.join(names[:3])} and {len(names) - 3} more"
