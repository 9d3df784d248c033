"""Losses on hidden activations: their gradient reaches the block that an activation comes from, as
autograd gives it there, is added to δ, and goes no further."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdfa_ext import FDFA, FDFABlock, FDFAConv2d, FDFALinear

METHODS = ["fdfa", "dfa", "dkp", "fg-a"]


def blocks() -> dict[str, nn.Module]:
    """Of each kind: fused layers with an activation that needs its pre-activation and one that does not,
    a fused chain with a pool, and one that torch runs."""
    return {
        "first": FDFAConv2d(1, 4, 3, padding=1, activation="gelu"),
        "second": FDFABlock(
            nn.Conv2d(4, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2)
        ),
        "third": FDFABlock(nn.Flatten(), nn.Linear(5 * 9, 8), nn.Softplus()),
        "fourth": FDFALinear(8, 8, activation="relu"),
        "out": nn.Linear(8, 3),
    }


def penalty(h: Tensor) -> Tensor:
    return (h - 1).pow(4).mean()


class Keeps(nn.Module):
    """Keeps its second and fourth block's output, and something made of both others."""

    def __init__(self) -> None:
        super().__init__()
        for name, block in blocks().items():
            self.add_module(name, block)
        self.kept: list[Tensor] = []
        self.keeping = True

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = self.second(first)
        third = self.third(second)
        fourth = self.fourth(third)
        if self.keeping:
            self.kept = [second, fourth, F.silu(first.mean((2, 3)).sum(1, keepdim=True) + third)]
        return self.out(fourth + third)


def local_gradients(net: Keeps, x: Tensor) -> dict[str, Tensor]:
    """Of the penalties, with each block's input cut off."""
    net = copy.deepcopy(net)
    first = net.first(x)
    second = net.second(first.detach())
    third = net.third(second.detach())
    fourth = net.fourth(third.detach())
    mixed = F.silu(first.mean((2, 3)).sum(1, keepdim=True) + third)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    sum(map(penalty, (second, fourth, mixed))).backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def gradients(model: FDFA) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("method", METHODS)
def test_a_kept_activations_loss_is_added_to_delta(method: str, backend: str) -> None:
    x = torch.randn(6, 1, 6, 6)
    torch.manual_seed(1)
    model = FDFA(Keeps(), method=method, backend=backend, feedback="ema", feedback_lr=0.3)
    for _ in range(3):
        model(x).square().sum().backward()
    model.module.kept = []
    found = []
    for keeps in (False, True):
        twin = copy.deepcopy(model)
        twin.module.keeping = keeps
        twin.zero_grad()
        output = twin(x)
        assert all(h.requires_grad for h in twin.module.kept)
        (output.square().sum() + sum(map(penalty, twin.module.kept))).backward()
        found.append(gradients(twin))
    local = local_gradients(model.module, x)
    assert all(local[f"{name}.weight"].abs().max() > 0 for name in ("first", "fourth"))
    for name, with_penalty in found[1].items():
        rounding = 1e-5 * max(1, float(with_penalty.abs().max()))
        torch.testing.assert_close(
            with_penalty - found[0][name], local[name], rtol=1e-3, atol=rounding, msg=name
        )


@pytest.mark.parametrize("last", [nn.Hardtanh, nn.Tanh, nn.Softplus])
def test_statistics_move_once_where_a_new_module_keeps_an_activation(last: type[nn.Module]) -> None:
    """Autograd does so for one without a JVP rule, and the pass is made anew."""
    block = FDFABlock(nn.BatchNorm1d(12), nn.Linear(12, 4))
    net = nn.Sequential(block, nn.Hardtanh(), FDFALinear(4, 4), nn.Linear(4, 3), nn.Tanh())
    model = FDFA(net, example_input=torch.randn(5, 12))
    net[4] = last()
    x = torch.randn(5, 12)
    model(x).square().sum().backward()
    assert net[0][0].num_batches_tracked == 1
    torch.testing.assert_close(net[0][0].running_mean, 0.1 * x.mean(0))


class SharesWithTheOutput(nn.Module):
    """A weight and a norm that are the block's, and of what stands behind it."""

    def __init__(self, end: Callable[[Tensor], Tensor], keeps: bool) -> None:
        super().__init__()
        norm = nn.LayerNorm(12)
        self.hidden = FDFABlock(nn.Linear(12, 12), nn.GELU(), norm)
        self.norm, self.out = norm, nn.Linear(12, 12, bias=False)
        self.out.weight = self.hidden[0].weight
        self.end, self.keeps = end, keeps

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        self.kept = h if self.keeps else None
        return self.end(self.out(self.norm(h)))


ENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda y: y,
    "log_softmax": lambda y: y.log_softmax(1),
    "product": lambda y: y * 2,
    "slice": lambda y: y[:, :6],
}


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("method", ["fdfa", "dkp"])
def test_a_parameter_of_block_and_output_gets_the_outputs_gradient_once(
    method: str, end: str, keeps: bool
) -> None:
    """B is zero, so that the block has no error."""
    x = torch.randn(16, 12)
    net = SharesWithTheOutput(ENDS[end], keeps)
    plain = copy.deepcopy(net)
    model = FDFA(net, method=method, feedback_lr=0.0, example_input=x)
    model(x).square().sum().backward()
    plain.hidden.register_forward_hook(lambda module, inputs, output: output.detach())
    plain(x).square().sum().backward()
    for (name, p), expected in zip(net.named_parameters(), plain.parameters(), strict=True):
        wanted = torch.zeros_like(p) if expected.grad is None else expected.grad
        torch.testing.assert_close(p.grad, wanted, msg=name)


def sequence() -> nn.Sequential:
    members = blocks()
    members["third"] = nn.Sequential(nn.Tanh(), members["third"])
    return nn.Sequential(*members.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", ["0", "1", "2.0", "2.1", "3"])
def test_a_hook_on_a_module_of_a_sequence_sees_activations_with_a_graph(
    place: str, method: str
) -> None:
    x = torch.randn(6, 1, 6, 6)
    model = FDFA(sequence(), method=method, feedback="ema", feedback_lr=0.3)
    for _ in range(3):
        model(x).square().sum().backward()
    kept: list[Tensor] = []
    found = []
    for hooked in (False, True):
        twin = copy.deepcopy(model)
        if hooked:
            module = twin.module.get_submodule(place)
            module.register_forward_hook(lambda _, inputs, output: kept.append(output))
        twin.zero_grad()
        output = twin(x)
        loss = output.square().sum() + sum(penalty(h) for h in kept if h.requires_grad)
        loss.backward()
        found.append(gradients(twin))
    changed = {
        name.rsplit(".", 1)[0]
        for name in found[0]
        if not torch.allclose(found[0][name], found[1][name], rtol=1e-4)
    }
    source = {"0": "0", "1": "1.0", "2.0": "1.0", "2.1": "2.1.1", "3": "3"}[place]
    assert source in changed
    assert all(name.startswith(source[0]) for name in changed if source != "1.0")


class Sparsity(nn.Module):
    loss: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.loss = penalty(x)
        return x


@pytest.mark.parametrize("method", METHODS)
def test_a_module_between_blocks_may_keep_a_loss(method: str) -> None:
    torch.manual_seed(2)
    sparsity = Sparsity()
    net = nn.Sequential(
        FDFALinear(6, 5, activation="tanh"),
        nn.LeakyReLU(),
        sparsity,
        FDFALinear(5, 4, activation="tanh"),
        nn.Linear(4, 3),
    )
    x = torch.randn(7, 6)
    model = FDFA(net, method=method, example_input=x)
    first: Any = net[0]
    found = []
    for weight in (0.0, 1.0):
        model.zero_grad()
        model.noise_state.copy_(torch.tensor([5, 0, 0]))
        output = model(x)
        (output.square().sum() * 0 + weight * sparsity.loss).backward()
        found.append(gradients(model))
    first_output = torch.tanh(F.linear(x, first.weight, first.bias))
    (local,) = torch.autograd.grad(penalty(F.leaky_relu(first_output)), first.weight)
    torch.testing.assert_close(found[1]["0.weight"] - found[0]["0.weight"], local)
    torch.testing.assert_close(found[1]["3.weight"], found[0]["3.weight"])
    torch.testing.assert_close(found[1]["4.weight"], found[0]["4.weight"])


class Auxiliary(nn.Module):
    """An output part of several ways, and a head for a loss of its own."""

    def __init__(self, out: Callable[["Auxiliary", Tensor, Tensor], Tensor], keeps: bool) -> None:
        super().__init__()
        self.first, self.second = (
            FDFALinear(6, 5, activation="tanh"),
            FDFALinear(5, 3, activation="silu"),
        )
        self.head, self.last, self.scale = nn.Linear(5, 2), nn.Linear(3, 3), nn.Parameter(torch.ones(3))
        self.out, self.keeps = out, keeps
        self.local: Any = None

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        if self.keeps:
            self.local = self.head(first)
        return self.out(self, first, self.second(first))


OUTPUTS: dict[str, Callable[[Auxiliary, Tensor, Tensor], Tensor]] = {
    "layer": lambda net, first, second: net.last(second),
    "block": lambda net, first, second: second,
    "function": lambda net, first, second: second * 2 + first[:, :3],
    "skip": lambda net, first, second: net.last(second) + first[:, 1:4],
    "parameter": lambda net, first, second: second * net.scale,
    "layers": lambda net, first, second: net.last(torch.tanh(net.last(second))),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("out", OUTPUTS)
def test_the_outputs_error_reaches_blocks_by_feedback_alone(out: str, method: str) -> None:
    """Whatever activations have a graph for a loss of their own."""
    x = torch.randn(7, 6)
    found = []
    for keeps in (False, True):
        torch.manual_seed(3)
        model = FDFA(Auxiliary(OUTPUTS[out], keeps), method=method, example_input=x)
        for _ in range(3):
            model.zero_grad()
            output = model(x)
            output.square().sum().backward(retain_graph=keeps)
        found.append(gradients(model))
        found.append({name: matrix.clone() for name, matrix in model.feedback.items()})
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[2][name], msg=name)
    for name, matrix in found[1].items():
        torch.testing.assert_close(matrix, found[3][name], msg=name)
    before = {name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None}
    model.module.local.square().sum().backward()
    net = model.module
    expected = torch.autograd.grad(
        net.head(torch.tanh(F.linear(x, net.first.weight, net.first.bias))).square().sum(),
        [net.first.weight, net.head.weight],
    )
    torch.testing.assert_close(net.first.weight.grad - before["first.weight"], expected[0])
    torch.testing.assert_close(net.head.weight.grad, expected[1])
    torch.testing.assert_close(net.second.weight.grad, before["second.weight"])


@torch.jit.script
def scripted(h: Tensor) -> Tensor:
    return h.pow(2)


class Squared(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor) -> Tensor:
        return h * h

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grads[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * tangents[0]


def filled(h: Tensor) -> Tensor:
    kept = torch.zeros_like(h)
    kept[:] = h * h
    return kept


UNSEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "seen": lambda h: h * h,
    "filled": filled,
    "scripted": scripted,
    "vmap": lambda h: torch.vmap(lambda row: row.pow(2))(h),
    "function": Squared.apply,
}


class KeepsSquares(nn.Module):
    kept: Any = None

    def __init__(self, squares: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.hidden = FDFALinear(6, 8, activation="tanh")
        self.layer, self.out = nn.Linear(8, 8), nn.Linear(8, 3)
        self.squares = squares

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        self.kept = {"squares": self.squares(hidden)}
        self.logits = self.layer(hidden)
        return self.out(torch.tanh(self.logits))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", UNSEEN)
def test_attributes_hold_activations_whatever_made_them(name: str, method: str) -> None:
    """Also one on the way to the output, which autograd holds too."""
    net = KeepsSquares(UNSEEN[name])
    x = torch.randn(7, 6)
    model = FDFA(net, method=method)
    model(x)
    hidden = torch.tanh(F.linear(x, net.hidden.weight, net.hidden.bias))
    for kept, expected in [
        (net.kept["squares"].sum(), hidden.square().sum()),
        (net.logits.square().sum(), net.layer(hidden).square().sum()),
    ]:
        model.zero_grad()
        kept.backward(retain_graph=True)
        (local,) = torch.autograd.grad(expected, net.hidden.weight, retain_graph=True)
        torch.testing.assert_close(net.hidden.weight.grad, local)


class Variational(nn.Module):
    """[N, 6] → [N, 6], with the divergence of its latent variables beside it."""

    divergence: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encode = FDFALinear(6, 16, activation="relu")
        self.mean, self.log_variance = FDFALinear(16, 2), FDFALinear(16, 2)
        self.decode = FDFALinear(2, 16, activation="relu")
        self.out = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.encode(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        self.divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
        z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return self.out(self.decode(z))


@pytest.mark.parametrize("method", ["fdfa", "dfa"])
def test_the_divergence_of_a_variational_autoencoder_is_minimised(method: str) -> None:
    net = Variational()
    for layer in (net.mean, net.log_variance):
        nn.init.constant_(layer.bias, 2.0)
    model = FDFA(net, method=method)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    x = torch.randn(64, 6)
    history = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = 0.01 * F.mse_loss(model(x), x) + net.divergence
        loss.backward()
        optimizer.step()
        history.append(net.divergence.item())
    assert history[-1] < history[0] / 2


def test_nothing_has_a_graph_where_nothing_is_kept() -> None:
    net = Keeps()
    net.keeping = False
    model = FDFA(net)
    x = torch.randn(6, 1, 6, 6)
    seen: list[bool] = []
    net.fourth.register_forward_hook(lambda _, inputs, output: seen.append(output.requires_grad))
    for keeps, exposes in [(False, False), (False, False), (True, True), (True, True)]:
        net.keeping = keeps
        model(x).sum().backward()
        del net.kept[:]
        assert seen[-1] == exposes


def test_the_first_pass_moves_running_statistics_once() -> None:
    net = Keeps()
    model = FDFA(net)
    x = torch.randn(6, 1, 6, 6)
    expected = copy.deepcopy(net)
    expected(x)
    model(x).sum().backward()
    assert net.kept[0].requires_grad
    norm, twin = net.second[1], expected.second[1]
    assert int(norm.num_batches_tracked) == 1
    torch.testing.assert_close(norm.running_mean, twin.running_mean)
    torch.testing.assert_close(norm.running_var, twin.running_var)


def test_a_compiled_step_refuses_kept_activations_rather_than_lose_them() -> None:
    model = FDFA(Auxiliary(OUTPUTS["layer"], True))
    x = torch.randn(7, 6)
    model(x).sum().backward()
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match="keeps hidden activations"):
        torch.compile(model, backend="eager", fullgraph=True)(x)


class OfParameter(nn.Module):
    """A block that is given a parameter, and one that is given x; their outputs are added."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(5, 6))
        self.of_query, self.of_x = FDFALinear(6, 8), FDFALinear(6, 8, activation="relu")
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.of_x(x) + self.of_query(self.query))


@pytest.mark.parametrize("method", ["fdfa", "dfa", "dkp", "fg-a"])
def test_a_parameter_that_a_block_is_given_is_refused_whenever_it_learns(method: str) -> None:
    net = OfParameter()
    net.query.requires_grad_(False)
    x = torch.randn(5, 6)
    model = FDFA(net, method=method, example_input=x)
    model(x).sum().backward()
    net.query.requires_grad_(True)
    with pytest.raises(RuntimeError, match="the input of block 'of_query' depends on parameters"):
        model(x)


@pytest.mark.parametrize("method", METHODS)
def test_a_kept_activation_has_no_second_derivative(method: str) -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.out = FDFALinear(6, 8, activation="tanh"), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.kept = self.hidden(x)
            return self.out(self.kept)

    net = Keeps()
    model = FDFA(net, method=method, example_input=torch.randn(5, 6))
    model(torch.randn(5, 6))
    with pytest.raises(RuntimeError, match="create_graph=True is not possible"):
        torch.autograd.grad(net.kept.square().mean(), net.hidden.weight, create_graph=True)
