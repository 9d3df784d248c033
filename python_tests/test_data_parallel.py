"""DistributedDataParallel around FDFA: several processes, each with a part of the batch, do what one
does with all of it."""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from nets import batch, conv_net, mlp
from processes import needs_gloo, states_of
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fdfa_ext import FDFA, FDFALinear, autograd
from fdfa_ext.feedback import FeedbackUpdate
from fdfa_ext.methods import ForwardFeedback
from fdfa_ext.metrics import gradient_alignment, mean_jacobian

STEPS = 4
MOST_GATHERED = autograd._MOST_GATHERED
pytestmark = needs_gloo


class Language(nn.Module):
    """[N, T] of 7 characters → [N, T, 7], in a block that normalises first."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 7)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Pixels(nn.Module):
    """[N, 1, 8, 8] → [N, 3, 8, 8] through features of 4 x 4."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(1, 4, 3, padding=1)
        self.coarse = nn.Conv2d(4, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(6, 4, 2, 2)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x).relu()
        coarse = self.coarse(F.max_pool2d(fine, 2)).relu()
        return self.head(torch.cat([fine, self.up(coarse).relu()], 1))


class Graphs(nn.Module):
    """[V, 4] nodes, of graphs `index` [V] → [N, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes = FDFALinear(4, 8, activation="tanh")
        self.graph = FDFALinear(8, 6, activation="relu")
        self.head = nn.Linear(6, 3)

    def forward(self, nodes: Tensor, index: Tensor) -> Tensor:
        y = self.nodes(nodes)
        sums = y.new_zeros(int(index[-1]) + 1, 8).index_add(0, index, y)
        return self.head(self.graph(sums))


class Twice(nn.Module):
    """A block that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.block = FDFALinear(6, 6, activation="tanh")
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.block(x)))


class Inner(nn.Module):
    """FDFA within a model that has parameters before and behind it."""

    def __init__(self, model: FDFA) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("offset", torch.zeros(3))
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * self.scale + self.offset


class Experts(nn.Module):
    """Of two blocks each process uses its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FDFALinear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[dist.get_rank() if self.training else 0](x) + self.unused(x))

    def unused(self, x: Tensor) -> Tensor | float:
        return 0.0 if self.training else self.blocks[1](x)


class Checkpointed(nn.Module):
    def __init__(self, model: FDFA, use_reentrant: bool = False) -> None:
        super().__init__()
        self.model = model
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.model, x, use_reentrant=self.use_reentrant)
        return result


class Descent(FeedbackUpdate):
    """With momentum, which it keeps."""

    def create(self, name: str, feedback: Tensor) -> None:
        self.register_buffer(name, torch.zeros_like(feedback))

    def step(self, name: str, feedback: Tensor, gradient: Tensor) -> None:
        feedback.sub_(self.get_buffer(name).mul_(0.9).add_(gradient), alpha=0.1)


class OwnRule(ForwardFeedback):
    def deltas(self, blocks: Any) -> Any:
        return [2 * (block.error @ block.feedback) for block in blocks]


def plain_images() -> nn.Sequential:
    """[N, 1, 12, 12] → [N, 3] without blocks, in row-major order."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)
    )


def text(n: int) -> tuple[Tensor, Tensor]:
    return torch.randint(7, (n, 5)), torch.randint(7, (n, 5))


def pictures(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 1, 8, 8), torch.randint(3, (n, 8, 8))


def graphs(n: int) -> tuple[list[Tensor], Tensor]:
    """The nodes of each graph, one to three."""
    return [torch.randn(1 + i % 3, 4) for i in range(n)], torch.randint(3, (n,))


def single_nodes(n: int) -> tuple[list[Tensor], Tensor]:
    """Graphs of which the last half have one node each, as many rows as samples."""
    return [torch.randn(3 if i < n // 2 else 1, 4) for i in range(n)], torch.randint(3, (n,))


def inputs(x: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Of a model, for samples."""
    if isinstance(x, list):
        index = torch.arange(len(x)).repeat_interleave(torch.tensor([len(nodes) for nodes in x]))
        return torch.cat(x).to(dtype), index
    return (x.to(dtype) if x.is_floating_point() else x,)


MakeBatch = Callable[[int], tuple[Any, Tensor]]
NETS: dict[str, tuple[Callable[[], nn.Module], MakeBatch]] = {
    "mlp": (mlp, lambda n: batch("mlp", n=n)),
    "conv_net": (conv_net, lambda n: batch("conv_net", n=n)),
    "twice": (Twice, lambda n: batch("mlp", n=n)),
    "language": (Language, text),
    "pixels": (Pixels, pictures),
    "graphs": (Graphs, graphs),
}
OTHER_NETS = {
    "single nodes": (Graphs, single_nodes),
    "plain images": (plain_images, lambda n: batch("conv_net", n=n)),
}
POINTS = {"language", "pixels", "plain images"}  # nets without blocks


@dataclass
class Run:
    """How a model is trained, and what by."""

    net: str = "mlp"
    options: dict[str, Any] = field(default_factory=dict)  # of FDFA
    data_parallel: dict[str, Any] = field(default_factory=dict)  # of DistributedDataParallel
    sharded: str = ""  # by fully_shard in its place: the "model", or its "blocks" too
    backend: str = "reference"
    empty: str = ""  # the processes that have no samples in odd steps: the "last", or "all"
    dtype: torch.dtype | None = None  # float64 for the reference backend, else float32
    lr: float = 1e-2  # of the weights
    is_lazy: bool = False  # whether the feedback is made in the first step
    around: Callable[[FDFA], nn.Module] | None = None  # a module within which the model is
    micro_batches: int = 1  # that are accumulated for one step of the optimizer
    averages: bool = False  # whether processes average ∇B of small nets too, in place of gathering d
    resumes: bool = False  # whether all is saved and loaded anew half-way
    learns_every: int = 1  # the steps of which one learns feedback

    def sizes(self, step: int, world: int) -> list[int]:
        """Samples of each process; as many for all in even steps alone."""
        if step % 2 == 0:
            return [3] * world
        if self.empty == "all":
            return [0] * world
        return [4, *[2] * (world - 2), 0 if self.empty else 1]


METHODS = ("fdfa", "dfa", "dkp", "fg-a", "lg-fg-a", "fg-w", "bp")
RUNS: dict[str, Run] = (
    {
        f"{net} {method} {rule} {backend}": Run(
            net, {"method": method, "feedback": rule, "feedback_lr": 1e-2}, backend=backend
        )
        for net in NETS
        for method in METHODS
        for rule in (("adam", "ema", "grad") if method in ("fdfa", "dkp") else ("adam",))
        for backend in ("reference", "fused")
        if net in ("mlp", "conv_net") or method in ("fdfa", "dfa", "dkp")
        if backend == "reference" or method == "fdfa"
    }
    | {
        "patches": Run("conv_net", {"patch": 4}),
        "rademacher": Run("mlp", {"noise": "rademacher"}),
        "a process without samples": Run(empty="last"),
        "a process without samples, as parameters": Run(options={"feedback": "grad"}, empty="last"),
        "processes without samples": Run(empty="all", backend="fused"),
        "processes without samples, as parameters": Run(options={"feedback": "grad"}, empty="all"),
        "processes without samples, averaged": Run(empty="all", averages=True),
        "plain images": Run("plain images", backend="fused", empty="last"),
        "plain images, averaged": Run("plain images", backend="fused", empty="last", averages=True),
        "single nodes": Run("single nodes"),
        "single nodes of Kolen and Pollack": Run("single nodes", {"method": "dkp"}),
        "bfloat16": Run(options={"feedback": "ema"}, backend="fused", dtype=torch.bfloat16, lr=0),
        "bfloat16, averaged": Run(
            options={"feedback": "ema"}, backend="fused", dtype=torch.bfloat16, lr=0, averages=True
        ),
        "feedback that a step makes": Run(is_lazy=True),
        "random feedback that a step makes": Run(options={"method": "dfa"}, is_lazy=True),
        "feedback that a step makes at points": Run("language", is_lazy=True, options={"at": ["norm"]}),
        "buffers of each process": Run(data_parallel={"broadcast_buffers": False}),
        "random feedback of each process": Run(
            options={"method": "dfa"}, data_parallel={"broadcast_buffers": False}
        ),
        "static graph": Run(data_parallel={"static_graph": True}),
        "bucket views": Run(data_parallel={"gradient_as_bucket_view": True}),
        "small buckets": Run("conv_net", data_parallel={"bucket_cap_mb": 1e-4}),
        "unused parameters": Run(data_parallel={"find_unused_parameters": True}),
        "accumulated": Run(micro_batches=2),
        "accumulated, as parameters": Run(options={"feedback": "grad"}, micro_batches=2),
        "learning feedback now and then": Run("plain images", backend="fused", learns_every=2),
        "Kolen and Pollack's now and then": Run(options={"method": "dkp"}, learns_every=2),
        "an own method's now and then": Run(options={"method": OwnRule()}, learns_every=2),
        "within a model": Run(around=Inner),
        "checkpointed": Run(around=Checkpointed),
        "an update of one's own": Run(options={"feedback": Descent()}),
        "a method of one's own": Run(options={"method": OwnRule()}),
        "sharded": Run(sharded="model"),
        "sharded and checkpointed": Run(sharded="model", around=Checkpointed),
        "sharded by blocks": Run(sharded="blocks", options={"feedback": "ema"}),
        "sharded with its feedback": Run(
            sharded="model", options={"feedback": "grad"}, backend="fused"
        ),
        "sharded, of Kolen and Pollack": Run(sharded="blocks", options={"method": "dkp"}),
    }
    | {
        f"{net}, averaged": Run(
            net, backend="fused", empty="last" if net == "mlp" else "", averages=True
        )
        for net in NETS
    }
    | {
        "patches, averaged": Run("conv_net", {"patch": 4, "feedback": "ema"}, averages=True),
        "resumed": Run("conv_net", resumes=True),
        "resumed, without moments": Run("language", {"feedback": "ema"}, resumes=True),
    }
)
OF_FOUR = (
    "mlp fdfa adam fused",
    "conv_net fdfa ema fused",
    "pixels fdfa adam fused",
    "mlp fg-w adam reference",
)


def train(run: Run, rank: int = 0, world: int = 1, processes: int = 1) -> dict[str, Tensor]:
    """The state after some steps of one of `world` processes; of one process for all if world is 1.

    processes: among which the batches are divided.
    """
    autograd._MOST_GATHERED = 0 if run.averages else MOST_GATHERED
    make, make_batch = (NETS | OTHER_NETS)[run.net]
    dtype = run.dtype or (torch.float64 if run.backend == "reference" else torch.float32)

    def new_model() -> tuple[FDFA, nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        net = make().to(dtype)
        options: dict[str, Any] = {"feedback_lr": 1e-2, "backend": run.backend} | run.options
        if run.net in POINTS:
            options = {"at": "auto"} | options
        if make is Graphs:
            options = {"sample_index": "index"} | options
        example = inputs(make_batch(2)[0], dtype)
        # Each process draws other noise and feedback, which must not matter.
        torch.manual_seed(7 + rank)
        model = FDFA(net, example_input=None if run.is_lazy else example, **options)
        whole: nn.Module = model if run.around is None else run.around(model).to(dtype)
        if world > 1 and run.sharded:
            for block in list(net)[:-1] if run.sharded == "blocks" else []:
                fully_shard(block)
            fully_shard(model)
        elif world > 1:
            whole = DistributedDataParallel(whole, **run.data_parallel)
        return model, whole, torch.optim.SGD(whole.parameters(), lr=run.lr, momentum=0.9)

    model, whole, optimizer = new_model()
    for step in range(STEPS):
        if run.resumes and step == STEPS // 2:
            saved = model.state_dict(), optimizer.state_dict()
            model, whole, optimizer = new_model()
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        torch.manual_seed(100 + step)
        sizes = run.sizes(step, processes)
        if run.learns_every > 1:
            model.learns_feedback = step % run.learns_every == 0
        optimizer.zero_grad()
        for micro_batch in range(run.micro_batches):
            x, y = make_batch(sum(sizes))
            if world > 1:
                own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
                x, y = x[own], y[own]
            is_last = micro_batch == run.micro_batches - 1
            with contextlib.nullcontext() if is_last or world == 1 else whole.no_sync():  # type: ignore[operator]
                outputs = [whole(*inputs(x, dtype)), *model.local_outputs]
                # Its mean over the processes is that over the batch.
                scale = world / (sum(sizes) * y[:1].numel() or 1)
                if run.net == "language":
                    outputs = [output.transpose(1, 2) for output in outputs]
                losses = [F.cross_entropy(output, y, reduction="sum") for output in outputs]
                (sum(losses) * scale).backward()
        # What loops scale and clip is not for those of feedback.
        if not run.sharded and run.options.get("method", "fdfa") != "dkp":
            assert not any(p.grad.any() for p in model.feedback_parameters() if p.grad is not None)
        optimizer.step()
    return {
        name: t.full_tensor() if isinstance(t, DTensor) else t.clone()
        for name, t in model.state_dict().items()
    }


def refusals(rank: int) -> dict[str, str]:
    """What is said of what cannot be right."""
    x, _ = batch("mlp")
    model = FDFA(mlp(), example_input=x)

    def in_join() -> None:
        whole = DistributedDataParallel(model)
        with whole.join():
            whole(x)

    def experts() -> None:
        whole = DistributedDataParallel(FDFA(Experts(), example_input=x), find_unused_parameters=True)
        whole(x).sum().backward()

    def reentrant() -> None:
        whole = DistributedDataParallel(Checkpointed(model, use_reentrant=True))
        whole(x.clone().requires_grad_()).sum().backward()

    def alone() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mean_jacobian(model, x)  # which is of this process
            gradient_alignment(model, (x, torch.zeros(len(x)).long()), F.cross_entropy)
            model(x)

    attempts: dict[str, Callable[[], Any]] = {
        "experts": experts,
        "reentrant": reentrant,
        "alone": alone,
        "join": in_join,
        "compiled": lambda: torch.compile(DistributedDataParallel(model), backend="eager")(x),
        "compiled within": lambda: DistributedDataParallel(torch.compile(model, backend="eager"))(x),
        "inside out": lambda: FDFA(DistributedDataParallel(mlp())),
    }
    said = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            said[name] = "nothing"
        except (RuntimeError, ValueError, UserWarning) as error:
            said[name] = str(error)
    return said


def sends(whole: Any, buffer: Tensor) -> bool:
    return any(t is buffer for t in whole.modules_buffers)


def buffers_sent(rank: int) -> dict[str, list[str]]:
    """What DistributedDataParallel copies from the first process at each step."""
    found = {}
    for name, around in (("alone", None), ("within", Inner)):
        model = FDFA(mlp())
        whole: Any = DistributedDataParallel(model if around is None else around(model))
        for _ in range(2):
            whole(batch("mlp")[0]).sum().backward()
        found[name] = [name for name, t in whole.module.named_buffers() if sends(whole, t)]
    return found


def work(rank: int, world: int, names: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    states: dict[str, Any] = {name: train(RUNS[name], rank, world, processes=world) for name in names}
    if world == 2:
        states |= {"refusals": refusals(rank), "buffers": buffers_sent(rank)}
    torch.save(states, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return states_of(work, "processes", 2, RUNS, tmp_path_factory)


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return states_of(work, "processes", 4, OF_FOUR, tmp_path_factory)


def check(run: Run, states: list[dict[str, Tensor]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = train(run, processes=len(states))
    if run.around is not None:
        expected = {name.removeprefix("model."): t for name, t in expected.items()}
    assert expected
    for name, t in expected.items():
        for state in states[1:]:  # B is no rank's own, nor is what it is made of
            assert torch.equal(state[name], states[0][name]), name
        if t.is_floating_point():
            error = (states[0][name] - t).norm() / t.norm().clamp(min=1e-20)
            assert error < (3e-6 if run.backend == "fused" else 1e-6), f"{name}: {error:.1e}"
        else:
            assert torch.equal(states[0][name], t), name


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_do_what_one_does(name: str, of_two: list[dict[str, Any]]) -> None:
    check(RUNS[name], [states[name] for states in of_two])


@pytest.mark.parametrize("name", OF_FOUR)
def test_four_processes_do_what_one_does(name: str, of_four: list[dict[str, Any]]) -> None:
    check(RUNS[name], [states[name] for states in of_four])


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        ("join", "goes on without the processes that have no batch left"),
        ("compiled", "torch.compile cannot train in several processes"),
        ("compiled within", "torch.compile cannot train in several processes"),
        ("experts", "the processes used different blocks or points in this step"),
        ("reentrant", "use torch.utils.checkpoint with use_reentrant=False"),
        ("alone", "this one learns feedback by its own batches alone"),
        ("inside out", "put FDFA into DistributedDataParallel"),
    ],
)
def test_several_processes_are_refused_what_they_cannot_do(
    attempt: str, message: str, of_two: list[dict[str, Any]]
) -> None:
    for states in of_two:
        assert message in states["refusals"][attempt]


def test_feedback_does_not_travel(of_two: list[dict[str, Any]]) -> None:
    assert of_two[0]["buffers"] == {"alone": [], "within": ["offset"]}
