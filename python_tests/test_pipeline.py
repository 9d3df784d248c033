"""A Pipeline: stages in several processes do what one process does with the whole model."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import needs_gloo, states_of
from torch import Tensor, nn

from fdfa_ext import FDFA, FDFABlock, FDFAConv2d, FDFALinear, FeedbackUpdate, Pipeline
from fdfa_ext.dual_pass import MicroBatch
from fdfa_ext.messages import Messages
from fdfa_ext.methods import BlockStep, ForwardFeedback
from fdfa_ext.micro_batches import Batch, fingerprint

pytestmark = needs_gloo
SAMPLES = (13, 13, 8, 2, 7)  # of the batch of each step, in four micro-batches, or as many as samples
MICRO_BATCHES = 4


class Descent(FeedbackUpdate):
    """With momentum, which it keeps."""

    def create(self, name: str, feedback: Tensor) -> None:
        self.register_buffer(name, torch.zeros_like(feedback))

    def step(self, name: str, feedback: Tensor, gradient: Tensor) -> None:
        feedback.sub_(self.get_buffer(name).mul_(0.9).add_(gradient), alpha=0.1)


class OwnRule(ForwardFeedback):
    def delta(self, block: BlockStep) -> Tensor:
        return 2 * (block.error @ block.feedback) / len(block.error)


class AllBlocks(ForwardFeedback):
    def deltas(self, blocks: Any) -> Any:
        return [block.error @ block.feedback / len(blocks) for block in blocks]


class OwnStep(ForwardFeedback):
    def forward(self, step: Any) -> Any:
        return super().forward(step) / 2


class Counting(Descent):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.layers(self.norm(x))
        return y


def dense() -> nn.Sequential:
    """[N, 6] → [N, 5], with dense blocks of each way to end."""
    return nn.Sequential(
        FDFALinear(6, 10, activation="relu"),
        FDFALinear(10, 8, activation="gelu"),
        nn.ReLU(),
        FDFABlock(nn.Linear(8, 8), nn.Tanh()),
        FDFALinear(8, 7),
        nn.Linear(7, 5),
    )


def images() -> nn.Sequential:
    """[N, 2, 8, 8] → [N, 5]; the first cut parts a block from its pool."""
    return nn.Sequential(
        FDFAConv2d(2, 4, 3, padding=1, activation="relu"),
        nn.MaxPool2d(2),
        FDFAConv2d(4, 6, 3, padding=1, activation="silu"),
        FDFABlock(nn.Conv2d(6, 6, 3, padding=1), nn.LeakyReLU()),
        nn.Sequential(nn.Flatten(), FDFALinear(96, 9, activation="relu")),
        nn.Linear(9, 5),
    )


def plain() -> nn.Sequential:
    """[N, 6] → [N, 5] logarithms of shares, of torch's modules."""
    layers: list[nn.Module] = []
    for n_in, n_out in ((6, 10), (10, 8), (8, 8), (8, 7)):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(7, 5), nn.LogSoftmax(1))


def tokens() -> nn.Sequential:
    """[N, T, 6] → [N, T, 5]."""
    blocks = [Residual(8) for _ in range(3)]
    return nn.Sequential(nn.Linear(6, 8), *blocks, nn.LayerNorm(8), nn.Linear(8, 5))


def convolved() -> nn.Sequential:
    """[N, 3, T] → [N, 5, T]."""
    layers: list[nn.Module] = []
    for n_in, n_out in ((3, 8), (8, 6), (6, 6), (6, 8)):
        layers += [nn.Sequential(nn.Conv1d(n_in, n_out, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*layers, nn.Conv1d(8, 5, 1))


def pixels() -> nn.Sequential:
    """[N, 3, 8, 8] → [N, 5, 8, 8] through features of 4 x 4."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 6, 3, padding=1, stride=2), nn.ReLU()),
        nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()),
        nn.Upsample(scale_factor=2),
        nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()),
        nn.Conv2d(8, 5, 1),
    )


def twice() -> nn.Sequential:
    """[N, 6] → [N, 5] with a block that is used twice, in one stage."""
    block = FDFALinear(8, 8, activation="tanh")
    return nn.Sequential(
        FDFALinear(6, 8), block, block, FDFALinear(8, 7, activation="relu"), nn.Linear(7, 5)
    )


def often() -> nn.Sequential:
    """[N, 6] → [N, 5] with a point that is used twice in each stage, and a module without one in both."""
    first, last, flat = nn.Tanh(), nn.Tanh(), nn.Flatten()
    return nn.Sequential(
        *(flat, nn.Linear(6, 8), first, nn.Linear(8, 8), first),
        *(flat, nn.Linear(8, 8), last, nn.Linear(8, 7), last, nn.Linear(7, 5)),
    )


class Viewed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1)


def cubes() -> nn.Sequential:
    """[N, 2, 3, 4] → [N, 5] through features that are no images, from an input that is changed."""
    layers = FDFABlock(nn.Linear(4, 4), nn.Tanh()), FDFABlock(nn.Linear(4, 4), nn.Tanh())
    return nn.Sequential(nn.ReLU(inplace=True), *layers, Viewed(), FDFALinear(24, 7), nn.Linear(7, 5))


@dataclass
class Net:
    make: Callable[[], nn.Sequential]
    shape: tuple[int, ...]  # of a sample
    positions: tuple[int, ...]  # of a target
    cuts: list[str]
    options: dict[str, Any] = field(default_factory=dict)


NETS = {
    "dense": Net(dense, (6,), (), ["1", "3", "4"]),
    "images": Net(images, (2, 8, 8), (), ["1", "3", "4"]),
    "plain": Net(plain, (6,), (), ["2", "4", "6"], {"at": [nn.ReLU], "output": "8"}),
    "inputs": Net(
        plain, (6,), (), ["2", "4", "6"], {"at": ["1", "3.input", "5", "8.input"], "output": "8"}
    ),
    "tokens": Net(tokens, (4, 6), (4,), ["1", "2", "3"], {"at": ["0", "1", "2", "3"]}),
    # The features before the last layer are the output, as before a vocabulary.
    "tail": Net(tokens, (4, 6), (4,), ["1", "2", "3"], {"at": ["0", "1", "2", "3"], "output": "4"}),
    "convolved": Net(convolved, (3, 6), (6,), ["1", "2", "3"], {"at": "auto"}),
    "pixels": Net(pixels, (3, 8, 8), (8, 8), ["1", "2", "4"], {"at": ["0", "1", "2", "4"]}),
    "twice": Net(twice, (6,), (), ["1", "3"]),
    "often": Net(often, (6,), (), ["", "5"], {"at": ["2", "7"]}),
    "cubes": Net(cubes, (2, 3, 4), (), ["2", "3"]),
}


@dataclass
class Run:
    net: str = "dense"
    options: dict[str, Any] = field(default_factory=dict)  # of FDFA
    backend: str = "reference"
    resumes: bool = False  # whether all is saved and loaded anew half-way
    autocast: bool = False
    frozen: str = ""  # modules whose names begin so
    scale: float = 1.0  # of the loss
    accumulates: bool = False  # whether the optimizer takes a step after two batches
    learns_every: int = 1  # the steps of which one learns feedback

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.backend == "reference" else torch.float32


OF_ALL_NETS = ("fdfa", "adam"), ("dkp", "ema"), ("fg-a", "adam")
RUNS = {
    f"{net} {method} {rule} {backend}": Run(net, {"method": method, "feedback": rule}, backend)
    for net in NETS
    for method, rule in (
        ("fdfa", "adam"),
        ("fdfa", "ema"),
        ("fdfa", "grad"),
        ("dfa", "adam"),
        ("dkp", "ema"),
        ("fg-a", "adam"),
    )
    for backend in ("reference", "fused")
    if (net, method) != ("pixels", "fg-a")  # which one process refuses too
    if net in ("dense", "images") or (method, rule) in OF_ALL_NETS
    if backend == "reference" or (method, rule) == ("fdfa", "adam") or net == "dense"
} | {
    "patches": Run("images", {"patch": 3}, "fused"),
    "patches of sequences": Run("tokens", {"noise": "rademacher"}, "fused"),
    "an update of one's own": Run(options={"feedback": Descent()}),
    "a method of one's own": Run(options={"method": OwnRule()}),
    "resumed": Run("images", resumes=True),
    "resumed, as parameters": Run("plain", {"feedback": "grad"}, resumes=True),
    "autocast": Run("dense", {"feedback": "ema"}, "fused", autocast=True),
    "frozen": Run("dense", frozen="3"),
    "a frozen stage": Run("plain", frozen="2"),
    "all frozen": Run("dense", frozen=""),
    "a scaled loss": Run("dense", scale=1000.0),
    "accumulated": Run("dense", {"feedback": "grad"}, accumulates=True),
    "learning feedback now and then": Run("plain", learns_every=2),
    "an own method's now and then": Run("dense", {"method": OwnRule()}, learns_every=3),
}
RUNS["all frozen"].frozen = "module"
OF_FOUR = (
    "dense fdfa adam fused",
    "images fdfa adam fused",
    "plain dkp ema reference",
    "pixels fdfa adam reference",
    "resumed",
)


def train(run: Run, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """State, gradients, losses and result after some steps, of one stage of `world`."""
    net = NETS[run.net]
    stages = NETS[run.net].cuts if world == 4 else NETS[run.net].cuts[1:2]

    def new_model() -> tuple[Any, FDFA, torch.optim.Optimizer]:
        torch.manual_seed(1)
        example = torch.randn(2, *net.shape, dtype=run.dtype)
        options = {"feedback_lr": 1e-2, "backend": run.backend} | net.options | run.options
        model = FDFA(net.make().to(run.dtype), example_input=example, **options)
        for name, parameter in model.named_parameters():
            frozen = run.frozen and name.startswith((run.frozen, f"module.{run.frozen}"))
            parameter.requires_grad_(not frozen)
        pipeline = None
        if world > 1:
            pipeline = Pipeline(model, stages, n_microbatches=MICRO_BATCHES, loss_fn=loss_of(run))
        return pipeline, model, torch.optim.SGD(model.parameters(), lr=5e-2, momentum=0.9)

    pipeline, model, optimizer = new_model()
    losses: list[float] = []
    for step, samples in enumerate(SAMPLES):
        if run.resumes and step == 2:
            saved = model.state_dict(), optimizer.state_dict()
            pipeline, model, optimizer = new_model()
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        torch.manual_seed(100 + step)
        if run.learns_every > 1:
            model.learns_feedback = step % run.learns_every == 0
        x = torch.randn(samples, *net.shape, dtype=run.dtype)
        y = torch.randint(5, (samples, *net.positions))
        if not (run.accumulates and step % 2):
            optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=run.autocast):
            if pipeline is None:
                loss = loss_of(run)(model(x), y)
                losses.append(loss.item())
            else:
                own = x if rank == 0 else None, y if rank == world - 1 else None
                losses.append(pipeline.step(*own))
        if pipeline is None:
            loss.backward()
        if step % 2 or not run.accumulates:
            optimizer.step()
    model.eval()
    with torch.no_grad():
        result = model(x) if pipeline is None else pipeline(x if rank == 0 else None)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    gradients = {
        f"{name}.grad": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }
    return {"state": state | gradients, "losses": torch.tensor(losses), "result": result}


def loss_of(run: Run) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        if NETS[run.net].positions == (4,):
            output = output.transpose(1, 2)
        return run.scale * F.cross_entropy(output, target)

    return loss


class Pairs(nn.Module):
    """Joins samples."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, 2)).flatten(1)


class Own(nn.Module):
    """Keeps its result."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x.tanh()
        return self.kept


def refusals() -> dict[str, str]:
    """What is said of what cannot be right, at once or in a first step, in each process."""

    def pipeline(
        net: nn.Module, cuts: Any = ("2",), micro_batches: Any = 2, **options: Any
    ) -> Pipeline:
        given: dict[str, Any] = {"example_input": torch.randn(2, 6)} | options
        model = FDFA(net, **given)
        return Pipeline(model, cuts, n_microbatches=micro_batches, loss_fn=F.cross_entropy)

    def hooked() -> None:
        net = dense()
        net.register_forward_hook(lambda *_: None)
        pipeline(net)

    def exchanged() -> None:
        own = pipeline(dense())
        own.model.module.add_module("another", FDFALinear(7, 5))
        own.step(torch.randn(4, 6), torch.randint(5, (4,)))

    def hooked_model() -> None:
        own = pipeline(dense())
        own.model.register_forward_pre_hook(lambda *_: None)
        own.step()

    def shared() -> None:
        block = FDFALinear(6, 6)
        pipeline(nn.Sequential(block, FDFALinear(6, 6), block, FDFALinear(6, 6), nn.Linear(6, 5)))

    def tied() -> None:
        net = nn.Sequential(FDFALinear(6, 6), FDFALinear(6, 6), FDFALinear(6, 6), nn.Linear(6, 5))
        net[2].weight = net[0].weight
        pipeline(net)

    def evaluating() -> None:
        own = pipeline(dense())
        own.model.eval()
        own.step()

    def as_a_whole() -> None:
        own = pipeline(dense())
        own.model(torch.randn(4, 6 if own.is_first else 8))

    def evaluated() -> None:
        own = pipeline(dense())
        own.model.eval()(torch.randn(4, 6 if own.is_first else 8))

    def summarized() -> None:
        own = pipeline(dense())
        own.model.summary(torch.randn(4, 6 if own.is_first else 8))

    def again() -> None:
        own = pipeline(dense())
        Pipeline(own.model, ["2"], n_microbatches=2, loss_fn=F.cross_entropy)

    def layout() -> None:
        net = nn.Sequential(
            nn.Conv1d(6, 6, 3, padding=1), nn.ReLU(), nn.Tanh(), nn.Flatten(), nn.Linear(24, 5)
        )
        example = torch.randn(2, 6, 4)
        pipeline(net, ["2"], at=[nn.ReLU, nn.Tanh], example_input=example, patch=2)

    attempts: dict[str, Callable[[], Any]] = {
        "method": lambda: pipeline(dense(), method="lg-fg-a"),
        "backpropagation": lambda: pipeline(dense(), method="bp"),
        "no sequence": lambda: pipeline(Residual(6), at=["layers.0"]),
        "no input": lambda: pipeline(dense(), example_input=None),
        "count": lambda: pipeline(dense(), ["1", "2"]),
        "name": lambda: pipeline(dense(), [9]),
        "first": lambda: pipeline(dense(), ["0"]),
        "behind": lambda: pipeline(
            nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5)), at=["0", "2"]
        ),
        "evaluated": evaluated,
        "no block": lambda: pipeline(dense(), ["5"]),
        "micro-batches": lambda: pipeline(dense(), micro_batches=0),
        "hooked": hooked,
        "hooked model": hooked_model,
        "all blocks": lambda: pipeline(dense(), method=AllBlocks()),
        "own step": lambda: pipeline(dense(), method=OwnStep()),
        "common state": lambda: pipeline(dense(), feedback=Counting()),
        "different": lambda: pipeline(dense(), patch=1 + dist.get_rank()),
        "exchanged": exchanged,
        "shared": shared,
        "tied": tied,
        "evaluating": evaluating,
        "as a whole": as_a_whole,
        "summarized": summarized,
        "again": again,
        "layout": layout,
    }
    said = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            said[name] = "nothing"
        except (RuntimeError, TypeError, ValueError) as error:
            said[name] = str(error)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        normalized = nn.Sequential(FDFALinear(6, 6), FDFABlock(nn.Linear(6, 6), nn.BatchNorm1d(6)))
        pipeline(nn.Sequential(*normalized, nn.Linear(6, 5)), ["1"])
        said["normalized"] = str(caught[-1].message)
        pipeline(nn.Sequential(FDFALinear(6, 6), FDFALinear(6, 6), Own(), nn.Linear(6, 5)), ["1"])
        said["kept"] = str(caught[-1].message)
    return said


class Skipped(nn.Module):
    """A block that samples do without."""

    def __init__(self) -> None:
        super().__init__()
        self.block = FDFALinear(6, 6)
        self.uses = True

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x) if self.uses else x
        return y


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x


def errors_of_one(rank: int) -> dict[str, str]:
    """Of a pipeline in one process: what is wrong is told before anything has moved."""
    if rank == 1:
        return {}
    group = dist.new_group([0], use_local_synchronization=True)

    def pipeline(
        *layers: nn.Module, example: Any = None, method: str = "fdfa", loss_fn: Any = F.cross_entropy
    ) -> Pipeline:
        x = torch.randn(2, 6) if example is None else example
        model = FDFA(nn.Sequential(*layers), method=method, feedback="ema", example_input=x)
        return Pipeline(model, [], n_microbatches=2, loss_fn=loss_fn, group=group)

    dense_layers = FDFALinear(6, 8, activation="relu"), FDFALinear(8, 8), nn.Linear(8, 5)
    skipped = pipeline(Skipped(), nn.Linear(6, 5), method="dfa")
    skipped.model.module[0].uses = False
    tokens = FDFALinear(6, 8), Mean(), FDFALinear(8, 8), nn.Linear(8, 5)
    longer = pipeline(*tokens, example=torch.randn(2, 3, 6))
    attempts: dict[str, tuple[Pipeline, Any]] = {
        "batch": (pipeline(*dense_layers), None),
        "loss": (pipeline(*dense_layers, loss_fn=lambda *_: 1.0), torch.randn(4, 6)),
        "target": (pipeline(*dense_layers), torch.randn(3, 6)),
        "rows": (pipeline(Pairs(), FDFALinear(12, 6), nn.Linear(6, 5)), torch.randn(4, 6)),
        "skipped": (skipped, torch.randn(4, 6)),
        "length": (longer, torch.randn(4, 2, 6)),
    }
    said = {}
    for name, (own, x) in attempts.items():
        before = {name: t.clone() for name, t in own.model.state_dict().items()}
        try:
            own.step(x, torch.randint(5, (4,)))
            said[name] = "nothing"
        except (TypeError, ValueError, RuntimeError) as error:
            said[name] = str(error)
        assert all(torch.equal(t, before[name]) for name, t in own.model.state_dict().items()), name
        assert all(p.grad is None for p in own.model.parameters()), name
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipeline(Counter(), *dense_layers).step(torch.randn(4, 6), torch.randint(5, (4,)))
        said["moves"] = str(caught[-1].message)
    messages: Any = Messages(group)
    messages._send = lambda message: None
    state, batch = torch.zeros(3, dtype=torch.int64), Batch(4, 2, True, 0)
    messages.send(MicroBatch(0, 2), batch, state, torch.randn(2, 6), None)
    for name, y in (("shape", torch.randn(2, 5)), ("samples", torch.randn(1, 6))):
        with pytest.raises(ValueError, match="for each micro-batch of a batch") as raised:
            messages.send(MicroBatch(2, 2), batch, state, y, None)
        said[name] = str(raised.value)
    x = torch.randn(4, 6)
    for name, own in (
        ("call", Batch(4, 2, False, fingerprint(x))),
        ("order", Batch(4, 2, True, fingerprint(x.flip(0)))),
    ):

        def receive(message: Tensor, sent: Batch = own) -> Any:
            message.zero_()[3 : 3 + Batch.LENGTH] = torch.tensor(sent.numbers())
            return Mock()

        messages._receive = receive
        with pytest.raises(RuntimeError, match="all processes") as raised:
            next(messages.receive(state, x, True))
        said[name] = str(raised.value)
    return said


def work(rank: int, world: int, names: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    states: dict[str, Any] = {name: train(RUNS[name], rank, world) for name in names}
    if world == 2:
        states |= {"refusals": refusals(), "errors": errors_of_one(rank)}
    torch.save(states, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return states_of(work, "stages", 2, RUNS, tmp_path_factory)


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return states_of(work, "stages", 4, OF_FOUR, tmp_path_factory)


def check(run: Run, stages: list[dict[str, Any]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = train(run)
    together: dict[str, Tensor] = {}
    for stage in stages:
        together |= stage["state"]
    assert together.keys() == expected["state"].keys()
    assert [stage["result"] for stage in stages[:-1]] == [None] * (len(stages) - 1)
    tolerance = 1e-2 if run.autocast else 1e-10 if run.backend == "reference" else 3e-6
    found = {"result": stages[-1]["result"], "losses": stages[0]["losses"], **together}
    for stage in stages[1:]:
        assert torch.equal(stage["losses"], stages[0]["losses"])
    for name, t in (
        {"result": expected["result"], "losses": expected["losses"]} | expected["state"]
    ).items():
        if t.is_floating_point():
            error = (found[name] - t).norm() / t.norm().clamp(min=1e-20)
            assert error < tolerance, f"{name}: {error:.1e}"
        else:
            assert torch.equal(found[name], t), name


@pytest.mark.parametrize("name", RUNS)
def test_two_stages_do_what_one_process_does(name: str, of_two: list[dict[str, Any]]) -> None:
    check(RUNS[name], [states[name] for states in of_two])


@pytest.mark.parametrize("name", OF_FOUR)
def test_four_stages_do_what_one_process_does(name: str, of_four: list[dict[str, Any]]) -> None:
    check(RUNS[name], [states[name] for states in of_four])


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        ("method", "LocalGreedy is none"),
        ("backpropagation", "Backpropagation is none"),
        ("no sequence", "cuts an FDFA of a torch.nn.Sequential; got FDFA of Residual"),
        ("no input", "make it with an example_input"),
        ("count", "expected 1 for 2 processes, got ['1', '2']"),
        ("name", "split_before names 9, but the sequence has ['0', '1', '2', '3', '4', '5']"),
        ("first", "leave no stage empty"),
        ("no block", "stage 1, ['5'], has no block or point"),
        ("behind", "parameters behind its last block or point, '0'"),
        ("evaluated", "this model is one stage of a Pipeline"),
        ("micro-batches", "n_microbatches must be a whole number"),
        ("hooked", "a hook or a forward of its own"),
        ("hooked model", "a hook or a forward of its own"),
        ("all blocks", "AllBlocks has a deltas of its own"),
        ("own step", "OwnStep has a forward of its own"),
        ("common state", "Counting keeps buffer 'count', which is no block's alone"),
        ("different", "must make the same model"),
        ("exchanged", "blocks or points of this stage were exchanged"),
        ("shared", "'2' of stage 1 is '0' of stage 0 too"),
        ("tied", "'2.weight' of stage 1 is '0.weight' of stage 0 too"),
        ("evaluating", "needs gradients and a model in training mode"),
        ("as a whole", "this model is one stage of a Pipeline"),
        ("summarized", "this model is one stage of a Pipeline"),
        ("again", "is a stage of a Pipeline already"),
        ("layout", "the layout of what '2' returns in stage 1 is told by a module before the cut"),
        ("normalized", "batch normalization has the statistics of a micro-batch"),
        ("kept", "a loss on them does not train as in one process"),
    ],
)
def test_stages_are_refused_what_they_cannot_do(
    attempt: str, message: str, of_two: list[dict[str, Any]]
) -> None:
    for states in of_two:
        assert message in states["refusals"][attempt]


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        ("batch", "the first stage needs the batch, one tensor [N, *]; got NoneType"),
        ("loss", "loss_fn must return one number as a tensor"),
        ("target", "Expected input batch_size (3) to match target batch_size (4)"),
        ("rows", "as many rows for each sample; got 1 for 2 samples"),
        ("skipped", "no block or point of a stage was used in this step"),
        ("length", "its feedback has shape"),
        ("moves", "buffer '0.count' moves once for each micro-batch"),
        (
            "shape",
            "[2, 6] torch.float32 for each micro-batch of a batch, as for the first one; got [2, 5]",
        ),
        ("samples", "got [1, 6]"),
        ("call", "the stage before evaluates by a batch, and this one does not"),
        ("order", "the first stage was given another batch than this one"),
    ],
)
def test_what_is_wrong_in_a_step_is_told_and_moves_nothing(
    attempt: str, message: str, of_two: list[dict[str, Any]]
) -> None:
    assert message in of_two[0]["errors"][attempt]


def test_a_pipeline_needs_processes() -> None:
    model = FDFA(dense(), example_input=torch.randn(2, 6))
    with pytest.raises(RuntimeError, match="call init_process_group first"):
        Pipeline(model, [], n_microbatches=1, loss_fn=F.cross_entropy)
