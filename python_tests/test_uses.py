"""Blocks and points that a forward uses several times: each use has a feedback matrix of its own."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdfa_ext import FDFA, FDFALinear
from fdfa_ext.metrics import feedback_alignment, gradient_alignment, mean_jacobian

OPTIONS: dict[str, Any] = {"feedback": "ema", "feedback_lr": 0.3}


def wrapped(net: nn.Module, x: Any, seed: int = 3, **options: Any) -> FDFA:
    torch.manual_seed(seed)
    return FDFA(net, example_input=x, **{**OPTIONS, **options})


class Siamese(nn.Module):
    """Two inputs [N, 6] through one encoder, or two of the same weights, to [N, 3]."""

    def __init__(self, encoder: nn.Module, second: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        if second is not None:
            self.second = second
        self.head = nn.Linear(5, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        second = getattr(self, "second", self.encoder)
        return self.head(torch.tanh(self.encoder(a) - 2 * second(b)))


def layer(kind: str) -> nn.Module:
    return nn.Linear(6, 5) if kind == "point" else FDFALinear(6, 5, activation="tanh")


@pytest.mark.parametrize("method", ["fdfa", "dfa", "dkp", "fg-a"])
@pytest.mark.parametrize("kind", ["point", "block"])
@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_two_uses_train_as_two_modules_of_one_weight(method: str, kind: str, backend: str) -> None:
    torch.manual_seed(0)
    first, second = layer(kind), layer(kind)
    second.weight, second.bias = first.weight, first.bias
    once = Siamese(first)
    twice = copy.deepcopy(Siamese(first, second))
    twice.head.load_state_dict(once.head.state_dict())
    inputs = torch.randn(4, 6), torch.randn(4, 6)
    options = {"method": method, "backend": backend}
    at = ["encoder"] if kind == "point" else None
    mine = wrapped(once, inputs, at=at, **options)
    assert mine.block_names == ["encoder", "encoder:2"]
    theirs = wrapped(twice, inputs, at=[*at, "second"] if at else None, **options)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (mine, theirs)]
    for _ in range(3):
        inputs, y = (torch.randn(4, 6), torch.randn(4, 6)), torch.randint(3, (4,))
        for model, optimizer in zip((mine, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(*inputs), y).backward()
            optimizer.step()
    pairs = zip(once.parameters(), twice.parameters(), strict=True)
    for a, b in (*pairs, *zip(mine.feedback.values(), theirs.feedback.values(), strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_sequence_may_have_a_block_twice() -> None:
    block = FDFALinear(6, 6, activation="tanh")
    net = nn.Sequential(block, nn.ReLU(), block, nn.Linear(6, 3))
    model = wrapped(net, torch.randn(4, 6))
    model(torch.randn(4, 6)).sum().backward()
    assert model.block_names == ["0", "0:2"]
    assert all(matrix.any() for matrix in model.feedback.values())
    torch._dynamo.reset()  # or a refusal of another test would have it skip our forward
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    twin, x = copy.deepcopy(model), torch.randn(4, 6)
    for m in (compiled, twin):
        m.zero_grad()
        m(x).sum().backward()
    torch.testing.assert_close(net[0].weight.grad, twin.module[0].weight.grad)


def test_metrics_know_the_uses_apart() -> None:
    torch.manual_seed(0)
    model = wrapped(Siamese(nn.Linear(6, 5)), (torch.randn(4, 6),) * 2, at=["encoder"])
    net = model.module

    class Joined(nn.Module):  # the metrics give a model one input
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(*x.chunk(2, 1))

    model = wrapped(Joined(), torch.randn(4, 12), at=["net.encoder"], feedback_lr=0.01)
    for _ in range(800):
        model(torch.randn(64, 12)).sum().backward()
    x = torch.randn(512, 12)
    jacobians = mean_jacobian(model, x)
    cosine = F.cosine_similarity(*[j.flatten() for j in jacobians.values()], dim=0)
    torch.testing.assert_close(cosine, torch.tensor(-1.0))
    assert max(feedback_alignment(model, x).values()) < 25
    assert gradient_alignment(model, (x, torch.randint(3, (512,))))["net.encoder.weight"] < 45


class Steps(nn.Module):
    """[N, T, 6] → [N, 3] by a cell that is used at each step."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for step in x.unbind(1):
            h = torch.tanh(self.cell(h + step))
        return self.head(h)


def test_uses_beyond_those_of_the_example_learn_by_the_points_before() -> None:
    model = wrapped(Steps(nn.Linear(6, 6)), torch.randn(4, 3, 6), at="auto")
    assert model.block_names == ["cell", "cell:2", "cell:3"]
    for steps in (3, 5, 2):
        model.zero_grad()
        before = {name: matrix.clone() for name, matrix in model.feedback.items()}
        model(torch.randn(4, steps, 6)).sum().backward()
        moved = [n for n, matrix in model.feedback.items() if not torch.equal(matrix, before[n])]
        assert moved == model.block_names[:steps]
        assert model.module.cell.weight.grad.any()


def test_a_use_without_a_point_gets_its_exact_gradient() -> None:
    """Beyond the known uses nothing cuts autograd: with B of zero only those learn."""
    torch.manual_seed(0)
    net, x = Steps(nn.Linear(6, 6)), torch.randn(4, 4, 6)
    model = wrapped(net, x[:, :3], at=["cell"], method="dfa")
    for matrix in model.feedback.values():
        matrix.zero_()
    model(x).sum().backward()
    found = net.cell.weight.grad
    with torch.no_grad():
        h = torch.zeros(4, 6)
        for step in range(3):
            h = torch.tanh(net.cell(h + x[:, step]))
    net.zero_grad()
    net.head(torch.tanh(net.cell(h + x[:, 3]))).sum().backward()
    torch.testing.assert_close(found, net.cell.weight.grad)


def test_a_block_that_is_used_more_often_than_in_the_dry_run_is_refused() -> None:
    model = wrapped(Steps(FDFALinear(6, 6)), torch.randn(4, 3, 6))
    feedback = {name: matrix.clone() for name, matrix in model.feedback.items()}
    with pytest.raises(
        RuntimeError, match="FDFA: block 'cell' was used more often in this forward pass"
    ):
        model(torch.randn(4, 4, 6))
    torch.testing.assert_close(dict(model.feedback.items()), feedback, rtol=0, atol=0)
    model(torch.randn(4, 2, 6)).sum().backward()


@pytest.mark.parametrize("feedback", ["adam", "grad"])
def test_checkpoints_and_copies_have_all_uses(feedback: str) -> None:
    x = torch.randn(4, 3, 6)
    model = wrapped(Steps(FDFALinear(6, 6)), x, feedback=feedback)
    model(x).sum().backward()
    loaded = FDFA(Steps(FDFALinear(6, 6)), feedback=feedback, feedback_lr=0.3)
    loaded.load_state_dict(model.state_dict())
    twins = [loaded, copy.deepcopy(model)]
    for twin in twins:
        assert twin.block_names == model.block_names
    for m in (model, *twins):
        m.zero_grad()
        m(x).sum().backward()
    for twin in twins:
        torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(twin.module.cell.weight.grad, model.module.cell.weight.grad)


def test_uses_are_counted_anew_when_blocks_are_exchanged() -> None:
    x = torch.randn(4, 6)
    block = FDFALinear(6, 6)
    net = nn.Sequential(block, block, nn.Linear(6, 3))
    model = wrapped(net, x)
    net[1] = nn.Tanh()
    net[0] = FDFALinear(6, 6)
    model(x).sum().backward()
    assert model.block_names == ["0"]
    assert model.feedback["0"].any()


class Recursive(nn.Module):
    """Calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        return self.layer(x if depth == 0 else self(x, depth - 1))


def test_uses_within_each_other_are_told_apart() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Recursive(), nn.Linear(6, 3))
    model = wrapped(net, torch.randn(4, 6), at=["0"], feedback_lr=0.01)
    assert model.block_names == ["0", "0:2", "0:3"]
    for _ in range(1500):
        model(torch.randn(64, 6)).sum().backward()
    layer, head = net[0].layer.weight.detach(), net[1].weight.detach()
    for name, expected in zip(
        model.block_names, (head @ layer @ layer, head @ layer, head), strict=True
    ):
        torch.testing.assert_close(model.feedback[name], expected, rtol=0.3, atol=0.06)


class Tied(nn.Module):
    """Layers of two that share their weights, one after the other, as ALBERT has them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(x)))


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Tied(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.body(x)
        return self.head(x)


def test_auto_finds_what_is_used_several_times() -> None:
    x = torch.randn(4, 6)
    assert wrapped(Deep(), x, at="auto").block_names == ["body", "body:2", "body:3"]
    encoder = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), nn.Tanh())
    model = wrapped(Siamese(encoder), (x, x), at="auto")
    assert model.block_names == ["encoder.1", "encoder.1:2", "head.input"]
