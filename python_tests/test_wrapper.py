"""FDFA as a user meets it: training steps, state, rules and errors."""

import copy
import os
import platform
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import NETS, Residue, batch, block_net, conv_net, mlp, step
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fdfa_ext import FDFA, FDFABlock, FDFAConv2d, FDFALinear, reference
from fdfa_ext.chains import find_end
from fdfa_ext.functional import BACKENDS
from fdfa_ext.methods import ForwardFeedback


def make(name: str = "mlp", device: torch.device | str = "cpu", **options: Any) -> FDFA:
    torch.manual_seed(1)
    net = NETS[name][0]().to(device)
    return FDFA(net, example_input=batch(name, device)[0], **options)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("rule", ["adam", "ema", "grad"])
def test_fused_and_reference_train_alike(device: torch.device, name: str, rule: str) -> None:
    options = {"feedback": rule, "feedback_lr": 0.05}
    x, y = batch(name, device, n=9)
    models = [make(name, device, backend=backend, **options) for backend in BACKENDS]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in models]
    for _ in range(3):
        losses = [
            step(model, optimizer, x, y) for model, optimizer in zip(models, optimizers, strict=True)
        ]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    for key, value in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[key], value, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("rule", ["adam", "ema", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("between", [(), (4,)])
def test_biases_get_the_sum_of_the_error_whoever_takes_it(
    device: torch.device, rule: str, dtype: torch.dtype, between: tuple[int, ...]
) -> None:
    """Blocks of rows, a frozen weight, and each backward of a graph that is kept."""
    net = nn.Sequential(
        FDFALinear(6, 8, activation="tanh"),  # which has no kink to round across
        FDFABlock(nn.Linear(8, 7), nn.Tanh()),
        nn.Flatten(),
        FDFALinear(7 * (4 if between else 1), 9, activation="gelu"),
        nn.Linear(9, 3),
    ).to(device, dtype)
    net[0].weight.requires_grad_(False)
    x = torch.randn(5, *between, 6, device=device, dtype=dtype)
    models = [FDFA(copy.deepcopy(net), feedback=rule, backend=b, example_input=x) for b in BACKENDS]
    for feedback in models[0].feedback.values():
        nn.init.normal_(feedback)
    models[1].load_state_dict(models[0].state_dict())
    y = torch.tensor([0, 1, 2, 0, 1], device=device)
    for model in models:
        for _ in range(2):
            loss = F.cross_entropy(model(x).float(), y)
            loss.backward(retain_graph=True)
            loss.backward()
    close = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    for mine, reference_s in zip(*(m.module.named_parameters() for m in models), strict=True):
        name, parameter = mine
        if not parameter.requires_grad:
            continue
        assert parameter.grad.dtype == dtype
        assert parameter.grad.abs().sum() > 0, name
        torch.testing.assert_close(
            parameter.grad, reference_s[1].grad, msg=lambda m, n=name: n + m, **close
        )


def test_one_step_is_algorithm_1_line_by_line() -> None:
    """The algorithm written out for an MLP, with the wrapper's noise; no code of the package but that."""
    model = make(feedback="ema", feedback_lr=0.3)
    layers = [model.module[0], model.module[1], model.module[2]]
    weights = [layer.weight.detach().clone() for layer in layers]
    biases = [layer.bias.detach().clone() for layer in layers]
    state = model.noise_state.clone()
    x, target = batch("mlp", n=4)
    F.cross_entropy(model(x), target).backward()

    y, d, ys, primes, noises = x, torch.zeros_like(x), [x], [], []
    for layer in range(3):
        a = y @ weights[layer].t() + biases[layer]
        if layer < 2:
            y, prime = a.relu(), (a > 0).float()
            v = reference.perturbation(state, layer, "gaussian", a.shape)
            d = (d @ weights[layer].t()) * prime + v
            noises.append(v)
            primes.append(prime)
        else:
            y, d = a, d @ weights[layer].t()
        ys.append(y)
    one_hot = F.one_hot(target, 3).float()
    e = (y.softmax(1) - one_hot) / 4
    torch.testing.assert_close(layers[2].weight.grad, e.t() @ ys[2])
    for layer in range(2):
        # From B = 0, with the mean over the batch of d ⊗ v.
        feedback = 0.3 * torch.einsum("nk,nd->kd", d, noises[layer]) / 4
        delta = (e @ feedback) * primes[layer]
        torch.testing.assert_close(model.feedback[str(layer)], feedback)
        torch.testing.assert_close(layers[layer].weight.grad, delta.t() @ ys[layer])
        torch.testing.assert_close(layers[layer].bias.grad, delta.sum(0))


@pytest.mark.parametrize("name", NETS)
def test_outside_training_the_wrapper_is_its_module(name: str) -> None:
    model = make(name).eval()
    x, _ = batch(name)
    assert torch.equal(model(x), model.module(x))
    model.train()
    model.module.eval()
    with torch.no_grad():
        assert torch.equal(model(x), model.module(x))
    assert model.noise_state[1] == 0


@pytest.mark.parametrize("name", NETS)
def test_training_output_is_the_primal(name: str) -> None:
    model = make(name)
    x, _ = batch(name)
    expected = copy.deepcopy(model.module)(x)
    torch.testing.assert_close(model(x), expected)


def test_no_gradient_passes_from_block_to_block() -> None:
    """δ of the first block is e B f' whatever the second one's weights are, once B and e are given."""
    gradients = []
    for scale in (1.0, -3.0):
        model = make(feedback="ema", feedback_lr=1e-12)
        model.feedback["0"].copy_(torch.randn(3, 8, generator=torch.Generator().manual_seed(2)))
        model.module[1].weight.data.mul_(scale)
        x = torch.ones(2, 6)
        model(x).backward(torch.ones(2, 3))
        gradients.append(model.module[0].weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().sum() > 0


def test_batch_norm_moves_its_statistics_once_and_from_the_primal_only() -> None:
    model = make("block_net")
    plain = copy.deepcopy(model.module)
    x, _ = batch("block_net")
    model(x)
    plain(x)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.module.state_dict()[key], value, msg=key)
    assert model.module[0][1].num_batches_tracked == 1


@pytest.mark.parametrize(
    "end",
    [
        lambda: [nn.BatchNorm2d(4), nn.ReLU(inplace=True)],
        lambda: [nn.BatchNorm2d(4, affine=False), nn.GELU()],
        lambda: [nn.BatchNorm2d(4, track_running_stats=False, momentum=0.3)],
        # No fused pass: each has something that it does not do.
        lambda: [nn.BatchNorm2d(4, momentum=None), nn.ReLU()],
        lambda: [nn.BatchNorm2d(4), nn.LeakyReLU(0.3)],
        lambda: [nn.BatchNorm2d(4), nn.GELU("tanh")],
        lambda: [nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)],
    ],
)
def test_a_block_with_batch_norm_trains_as_the_reference(end: Any) -> None:
    """Three steps: loss, gradients, feedback and every buffer."""

    def run(backend: str) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(
            FDFABlock(nn.Conv2d(2, 4, 3, bias=False), *end()),
            FDFABlock(nn.Conv2d(4, 4, 3), *end()),
            nn.Flatten(),
            nn.LazyLinear(3),
        )
        x, labels = torch.randn(6, 2, 14, 14), torch.arange(6) % 3
        net(x)
        model = FDFA(net, backend=backend, feedback_lr=0.05, example_input=x)
        seen = []
        for _ in range(3):
            loss = F.cross_entropy(model(x), labels)
            model.zero_grad()
            loss.backward()
            seen += [loss.detach(), *[p.grad.clone() for p in net.parameters() if p.grad is not None]]
        return seen + [t.clone() for t in model.state_dict().values()]

    for actual, expected in zip(run("fused"), run("reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("chain", "fused_from"),
    [
        (lambda: [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2)], 0),
        (lambda: [nn.Conv2d(2, 4, 3, stride=2, bias=False), nn.Tanh(), nn.MaxPool2d(3, 2, 1)], 0),
        (lambda: [nn.Conv2d(2, 20, 3, padding=1), nn.MaxPool2d((2, 3))], 0),
        (lambda: [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(16, 8, 8)], 0),
        (lambda: [nn.Conv2d(2, 4, 3, dilation=2), nn.GELU()], 0),
        (lambda: [nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2)], 1),
        (lambda: [nn.Dropout2d(0.0), nn.BatchNorm2d(2), nn.MaxPool2d(2)], 1),
        (lambda: [nn.Flatten(), nn.Linear(288, 9), nn.BatchNorm1d(9), nn.SiLU()], 2),
        # Each has something that the operators do not do.
        (lambda: [nn.Conv2d(2, 4, 3), nn.GELU(), nn.MaxPool2d(2)], None),
        (lambda: [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)], None),
        (lambda: [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(17, 8, 8)], None),
        (lambda: [nn.Conv2d(2, 4, 3, padding_mode="circular", padding=1), nn.ReLU()], None),
        (lambda: [nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU()], None),
        (lambda: [nn.MaxPool2d(2)], None),
    ],
)
def test_a_chain_trains_as_the_reference(chain: Any, fused_from: int | None) -> None:
    """Two such blocks, the first of which gets no tangent, over three steps."""
    end = find_end(chain())
    assert fused_from == (None if end is None else end.start)

    def run(backend: str) -> list[Tensor]:
        torch.manual_seed(0)
        first = chain()
        x, labels = torch.randn(6, 2, 12, 12), torch.arange(6) % 3
        net = nn.Sequential(
            FDFABlock(nn.Conv2d(2, 2, 3, padding=1)),
            FDFABlock(*first),
            nn.Flatten(),
            nn.LazyLinear(3),
        )
        net = nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (12, 12)), *net)
        net(x)
        model = FDFA(net, backend=backend, feedback_lr=0.05, example_input=x)
        alone = nn.Sequential(FDFABlock(*copy.deepcopy(first)), nn.Flatten(), nn.LazyLinear(3))
        alone(x)
        single = FDFA(alone, backend=backend, feedback_lr=0.05, example_input=x)
        seen = []
        for _ in range(3):
            for each in (model, single):
                loss = F.cross_entropy(each(x), labels)
                each.zero_grad()
                loss.backward()
                gradients = [p.grad.clone() for p in each.parameters() if p.grad is not None]
                seen += [loss.detach(), *gradients]
        return seen + [t.clone() for each in (model, single) for t in each.state_dict().values()]

    for actual, expected in zip(run("fused"), run("reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("normalizes", [False, True])
def test_a_pooled_block_keeps_winners_in_the_place_of_what_it_pooled(normalizes: bool) -> None:
    """A byte for each element of the pooled image, and none of the activation before the pool."""
    x = torch.randn(4, 1, 12, 12)
    norm = [nn.BatchNorm2d(5)] if normalizes else []
    block = FDFABlock(nn.Conv2d(1, 5, 3), *norm, nn.ReLU(), nn.MaxPool2d(2))
    model = FDFA(nn.Sequential(block, nn.Flatten(), nn.Linear(125, 3)), example_input=x)
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    assert [t.shape for t in saved if t.dtype == torch.uint8] == [(4, 5, 5, 5)]
    # The normalisation keeps its input, as torch's does.
    assert sum(t.shape == (4, 5, 10, 10) for t in saved) == normalizes


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
def test_side_by_side_and_on_dual_tensors_a_step_is_the_same(
    name: str, backend: str, kind: str
) -> None:
    """A hook anywhere sends the pass to torch's dual tensors."""
    x, y = batch(name)
    models = [make(name, backend=backend, feedback_lr=0.05)]
    models.append(copy.deepcopy(models[0]))
    calls = []
    getattr(models[1].module[-1], f"register_{kind}")(lambda *_: calls.append(1))
    for model in models:
        for _ in range(2):
            F.cross_entropy(model(x), y).backward()
    assert len(calls) == 2
    results = [
        [*model.state_dict().values(), *[p.grad for p in model.parameters()]] for model in models
    ]
    for side_by_side, dual in zip(*results, strict=True):
        torch.testing.assert_close(side_by_side, dual, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("copied", [False, True])
def test_global_hooks_see_every_module(copied: bool) -> None:
    x, _ = batch("conv_net")
    model = make("conv_net")
    model = copy.deepcopy(model) if copied else model
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(x)
    finally:
        handle.remove()
    assert seen == [*model.module, model.module, model]


@pytest.mark.parametrize("place", range(4))
def test_a_forward_put_in_the_place_of_a_modules_own_is_called(place: int) -> None:
    """As libraries do that wrap single modules."""
    x, _ = batch("conv_net")
    model = make("conv_net", method="dfa")
    module = model.module[place]
    own = module.forward
    module.forward = lambda x: 3 * own(x)
    output = model(x)
    torch.testing.assert_close(output, model.eval()(x))
    del module.forward
    assert not torch.allclose(output, model(x))


def test_a_pool_changed_after_wrapping_does_as_it_is_told() -> None:
    x, pool = torch.randn(3, 1, 13, 13), nn.MaxPool2d(3, 2)
    net = nn.Sequential(
        FDFAConv2d(1, 4, 2, activation="relu"),
        pool,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    model = FDFA(net, method="dfa", example_input=x)
    before = model(x)
    pool.ceil_mode = True
    output = model(x)
    assert not torch.allclose(output, before)
    torch.testing.assert_close(output, model.eval()(x))


class WithQuery(nn.Module):
    """A parameter of its own goes into a block."""

    def __init__(self, query: Tensor) -> None:
        super().__init__()
        self.query = nn.Parameter(query)
        self.block, self.head = FDFALinear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query if self.query.shape == x.shape else self.query.expand_as(x)
        return self.head(x + self.block(query))


@pytest.mark.parametrize("method", ["fdfa", "dfa", "dkp", "fg-a", "lg-fg-a"])
def test_a_parameter_that_goes_into_a_block_is_refused_since_it_would_not_learn(method: str) -> None:
    for shape in ((5, 6), (6,)):  # a leaf, and one that was made from it
        with pytest.raises(RuntimeError, match="the input of block 'block' depends on parameters"):
            FDFA(WithQuery(torch.randn(shape)), method=method)(torch.randn(5, 6))


@pytest.mark.parametrize("between", [nn.Identity(), nn.ELU()], ids=["side by side", "dual tensors"])
@pytest.mark.parametrize("first", [[], [nn.Tanh()]], ids=["block", "module"])
def test_an_input_that_wants_a_gradient_gets_none(between: nn.Module, first: list[nn.Module]) -> None:
    x = torch.randn(5, 6, requires_grad=True)
    model = FDFA(nn.Sequential(*first, FDFALinear(6, 5), between, nn.Linear(5, 3)), example_input=x)
    model(x).sum().backward()
    assert x.grad is None
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "norm", [lambda: nn.GroupNorm(2, 4), lambda: nn.GroupNorm(4, 4, affine=False), Residue]
)
@pytest.mark.parametrize("method", ["fdfa", "fg-w"])
def test_group_normalisation_takes_images_in_any_order(norm: Any, method: str) -> None:
    """In a block and between blocks; torch's forward mode takes rows of contiguous images alone."""
    torch.manual_seed(0)
    net = nn.Sequential(
        FDFAConv2d(2, 4, 3, activation="tanh"),
        FDFABlock(nn.Conv2d(4, 4, 3), norm(), nn.SiLU()),
        nn.GroupNorm(2, 4, affine=False),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    x = torch.randn(5, 2, 8, 8)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = FDFA(copy.deepcopy(net), method=method, feedback="ema", feedback_lr=0.5)
        model.noise_state.copy_(torch.tensor([7, 0, 0]))
        model(x.contiguous(memory_format=memory_format)).square().sum().backward()
        results.append([*model.feedback.values(), *[p.grad for p in model.parameters()]])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_a_block_may_return_an_expanded_tensor() -> None:
    class Repeat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1, keepdim=True).expand(-1, 4, -1)

    net = nn.Sequential(FDFABlock(nn.Linear(6, 6), Repeat()), nn.Flatten(), nn.Linear(24, 3))
    x, y = torch.randn(16, 5, 6), torch.randint(3, (16,))
    model = FDFA(net, feedback="ema", feedback_lr=0.05, example_input=x)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = [step(model, optimizer, x, y) for _ in range(100)]
    assert losses[-1] < 0.8 * losses[0]
    torch.testing.assert_close(model(x), model.eval()(x))


def test_a_net_that_was_never_wrapped_can_be_traced() -> None:
    """torch.jit looks at every property of a module."""
    net, (x, _) = NETS["conv_net"][0]().eval(), batch("conv_net")
    torch.testing.assert_close(torch.jit.trace(net, x)(x), net(x))


def test_a_model_is_made_and_moved_without_memory() -> None:
    x, _ = batch("conv_net")
    trained = make("conv_net")
    trained(x).sum().backward()
    empty = make("conv_net").to("meta")
    assert all(b.is_meta for b in empty.feedback.values())
    empty.to_empty(device="cpu").load_state_dict(trained.state_dict())
    for key, value in empty.state_dict().items():
        assert torch.equal(value, trained.state_dict()[key])
    with torch.device("meta"):
        assert all(p.is_meta for p in FDFA(NETS["conv_net"][0]()).parameters())


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_retained_graph_can_be_walked_twice(activation: str) -> None:
    """Where no graph is retained, δ takes the memory of a block's output that a pool follows."""
    x, y = torch.randn(4, 1, 12, 12), torch.randint(3, (4,))
    net = nn.Sequential(
        FDFAConv2d(1, 4, 3, activation=activation),
        nn.MaxPool2d(2),
        FDFAConv2d(4, 6, 3, activation=activation),
        nn.Flatten(),
        nn.Linear(54, 3),
    )
    gradients = []
    for retain_graph in (False, True):
        model = FDFA(copy.deepcopy(net), feedback="ema", feedback_lr=0.05, example_input=x)
        model.noise_state.copy_(torch.tensor([5, 0, 0]))
        for t in model.feedback.values():
            t.fill_(0.1)
        loss = F.cross_entropy(model(x), y)
        loss.backward(retain_graph=retain_graph)
        gradients.append([p.grad.clone() for p in model.module.parameters()])
        if retain_graph:
            for t in model.feedback.values():
                t.fill_(0.1)
            model.zero_grad()
            loss.backward()
            gradients.append([p.grad for p in model.module.parameters()])
    for first, second, third in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        torch.testing.assert_close(third, second, rtol=0, atol=0)


def test_a_module_may_be_exchanged_after_wrapping() -> None:
    """For one that needs dual tensors too, in a net that had none."""
    x, y = batch("mlp")
    models = [make(backend=backend, feedback_lr=0.05) for backend in BACKENDS]
    for model in models:
        model.module[2] = nn.Sequential(nn.LayerNorm(7), copy.deepcopy(models[0].module[2]))
        F.cross_entropy(model(x), y).backward()
    for name, matrix in models[0].feedback.items():
        assert matrix.any()
        torch.testing.assert_close(matrix, models[1].feedback[name], rtol=1e-4, atol=1e-6)


class _Both(nn.Module):
    """[N, 6] → [N, 3] of a block's output and of what the next block makes of it."""

    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = FDFALinear(6, 8, activation="tanh"), second
        self.output = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.output(torch.cat([self.second(y), y], dim=1))


@pytest.mark.parametrize("chain", [[nn.BatchNorm1d(8)], [nn.Flatten(), nn.BatchNorm1d(8), nn.ReLU()]])
def test_a_block_leaves_the_tangent_of_its_input_to_others(chain: list[nn.Module]) -> None:
    """Batch-norm may write its tangent over the one that it was given, but not over another block's."""
    x = torch.randn(5, 6)
    torch.manual_seed(2)
    models = [FDFA(_Both(FDFABlock(*chain)), feedback_lr=0.1, example_input=x)]
    models.append(copy.deepcopy(models[0]))
    models[1].backend = "reference"
    for model in models:
        model(x).square().sum().backward()
    for name, matrix in models[0].feedback.items():
        torch.testing.assert_close(matrix, models[1].feedback[name], rtol=1e-4, atol=1e-5)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Attention(nn.Module):
    """[N, T, E] → [N, T, E]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "attention",
    [Attention(8), nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)],
    ids=["own", "torch"],
)
def test_residual_and_attention_blocks_learn(attention: nn.Module, backend: str) -> None:
    attention = copy.deepcopy(attention)
    net = nn.Sequential(
        FDFALinear(6, 8, activation="gelu"),
        FDFABlock(attention, nn.LayerNorm(8)),
        nn.Flatten(),
        FDFABlock(Residual(32)),
        nn.Linear(32, 3),
    )
    x, y = torch.randn(16, 4, 6), torch.randint(3, (16,))
    model = FDFA(net, feedback="ema", feedback_lr=0.05, example_input=x, backend=backend)
    assert {name: tuple(b.shape) for name, b in model.feedback.items()} == {
        "0": (3, 4, 8),
        "1": (3, 4, 8),
        "3": (3, 32),
    }
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = [step(model, optimizer, x, y) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
    for parameter in model.forward_parameters():
        assert parameter.grad is not None


def test_attention_alone_does_without_fused_kernels_and_leaves_them_as_they_are() -> None:
    """They have no forward mode, so a tangent shows that they gave way."""
    cuda = torch.backends.cuda
    enabled = [cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.cudnn_sdp_enabled]
    within = []

    class Attends(nn.Module):
        features = 8

        def forward(self, x: Tensor) -> Tensor:
            within.append([ask() for ask in enabled])
            key = x[..., : self.features]
            return F.scaled_dot_product_attention(x, key, x)

    attends = Attends()
    net = nn.Sequential(FDFALinear(6, 8), attends, nn.Flatten(), nn.Linear(40, 3))
    x = torch.randn(4, 5, 6)
    cuda.enable_cudnn_sdp(False)  # the user's own choice
    try:
        model = FDFA(net, feedback="ema", feedback_lr=0.5, example_input=x)
        model(x).sum().backward()
        within.append([ask() for ask in enabled])
        attends.features = 7
        with pytest.raises(RuntimeError, match="size"):
            model(x)
        within.append([ask() for ask in enabled])
    finally:
        cuda.enable_cudnn_sdp(True)
    assert model.feedback["0"].abs().max() > 0
    assert within == [[True, True, False]] * 5


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_trains_with_float32_feedback(
    device: torch.device, name: str, dtype: torch.dtype
) -> None:
    model = make(name, device, feedback="ema", feedback_lr=0.1).to(dtype)
    x, y = batch(name, device)
    loss = F.cross_entropy(model(x.to(dtype)).float(), y)
    loss.backward()
    for parameter in model.forward_parameters():
        assert parameter.grad.dtype == dtype
        assert bool(parameter.grad.isfinite().all())
    for matrix in model.feedback.values():
        assert matrix.dtype == torch.float32
        assert bool((matrix != 0).any())


@pytest.mark.parametrize("name", NETS)
def test_autocast_trains(device: torch.device, name: str) -> None:
    model = make(name, device, feedback="ema", feedback_lr=0.1)
    x, y = batch(name, device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    plain = make(name, device, feedback="ema", feedback_lr=0.1)
    F.cross_entropy(plain(x), y).backward()
    gradients = []
    for trained in (model, plain):
        assert all(p.grad.dtype == torch.float32 for p in trained.forward_parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in trained.forward_parameters()]))
    assert F.cosine_similarity(*gradients, dim=0) > 0.99


def test_float64_runs_on_the_reference_and_is_refused_by_the_fused_backend() -> None:
    x, y = batch("mlp")
    model = FDFA(mlp().double(), backend="reference", example_input=x.double())
    F.cross_entropy(model(x.double()), y).backward()
    assert model.module[0].weight.grad.dtype == torch.double
    with pytest.raises(TypeError, match=r'float64 runs with FDFA\(\.\.\., backend="reference"\)'):
        FDFA(mlp().double(), example_input=x.double())


def test_frozen_weights_still_learn_their_feedback() -> None:
    model = make(feedback="ema", feedback_lr=0.1)
    model.module.requires_grad_(False)
    x, _ = batch("mlp")
    model(x).sum().backward()
    for matrix in model.feedback.values():
        assert bool((matrix != 0).any())


def test_grad_rule_is_the_ema_rule_under_sgd() -> None:
    """B - lr (B - G) = (1 - lr) B + lr G, and `.grad` is B - G (eq. 9 and 10)."""
    x, y = batch("mlp")
    ema = make(feedback="ema", feedback_lr=0.1)
    grad = make(feedback="grad")
    optimizer = torch.optim.SGD(grad.feedback_parameters(), lr=0.1)
    for _ in range(3):
        for model in (ema, grad):
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, matrix in ema.feedback.items():
        torch.testing.assert_close(grad.feedback[name].detach(), matrix)
    assert len(list(grad.feedback_parameters())) == 2
    assert len(list(grad.forward_parameters())) == 6
    assert list(ema.feedback_parameters()) == []


def test_adam_rule_is_torch_adam_on_the_grad_rule() -> None:
    x, y = batch("mlp")
    adam = make(feedback="adam", feedback_lr=1e-2)
    grad = make(feedback="grad")
    optimizer = torch.optim.Adam(grad.feedback_parameters(), lr=1e-2)
    for _ in range(5):
        for model in (adam, grad):
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, matrix in adam.feedback.items():
        torch.testing.assert_close(grad.feedback[name].detach(), matrix, rtol=1e-4, atol=1e-6)


def test_accumulated_batches_each_update_the_feedback_with_their_own_noise() -> None:
    x, y = batch("mlp")
    together, apart = make(feedback="ema", feedback_lr=0.1), make(feedback="ema", feedback_lr=0.1)
    losses = [F.cross_entropy(together(x), y) for _ in range(2)]
    for loss in losses:
        loss.backward()
    for _ in range(2):
        F.cross_entropy(apart(x), y).backward()
    for name, matrix in together.feedback.items():
        torch.testing.assert_close(apart.feedback[name], matrix)


def test_torchs_counter_sees_every_product_of_a_step(device: torch.device) -> None:
    n, inputs, first, second, k = 4, 20, 32, 16, 10
    net = nn.Sequential(
        FDFALinear(inputs, first, activation="relu"),
        FDFALinear(first, second, activation="relu"),
        nn.Linear(second, k),
    )
    model = FDFA(net.to(device), example_input=torch.randn(n, inputs, device=device))
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(n, inputs, device=device)).square().mean().backward()
    upper = first * second + second * k
    primal_and_gradients = 2 * (inputs * first + upper)
    feedback = 2 * k * (first + second)  # G and eB
    assert counter.get_total_flops() == 2 * n * (primal_and_gradients + upper + feedback)


def test_seed_comes_from_torch_and_every_step_has_new_noise() -> None:
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        models.append(FDFA(mlp(), example_input=torch.zeros(2, 6)))
    states = [model.noise_state.tolist() for model in models]
    assert states[0] == states[1] != states[2]
    models[0](torch.zeros(2, 6))
    assert models[0].noise_state[1] == models[1].noise_state[1] + 1


@pytest.mark.parametrize("rule", ["adam", "ema", "grad"])
@pytest.mark.parametrize("example", [True, False])
def test_a_fresh_model_loads_a_trained_ones_state(rule: str, example: bool) -> None:
    trained = make("conv_net", feedback=rule, feedback_lr=0.05)
    x, y = batch("conv_net")
    F.cross_entropy(trained(x), y).backward()
    fresh = FDFA(conv_net(), feedback=rule, feedback_lr=0.05, example_input=x if example else None)
    fresh.load_state_dict(trained.state_dict())
    results = []
    for model in (trained, fresh):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        results.append(
            {**model.state_dict(), **{f"grad.{k}": p.grad for k, p in model.named_parameters()}}
        )
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


RESUME = """
import sys, torch
sys.path.insert(0, {tests!r})
from nets import NETS, step
from fdfa_ext import FDFA

torch.manual_seed(0)
torch.set_num_threads(1)
make, shape = NETS[{name!r}]
data = [(torch.randn(8, *shape), torch.randint(3, (8,))) for _ in range(10)]
model = FDFA(make(), feedback={rule!r}, feedback_lr=1e-2, example_input=data[0][0])
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
first, last, load, save = {run!r}
if load:
    saved = torch.load(load)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
for x, y in data[first:last]:
    step(model, optimizer, x, y)
torch.save({{"model": model.state_dict(), "optimizer": optimizer.state_dict()}}, save)
"""


@pytest.mark.parametrize(("name", "rule"), [("conv_net", "adam"), ("block_net", "grad")])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, name: str, rule: str
) -> None:
    """5 steps, save, a fresh process, 5 more, against 10 steps in one process."""
    half, resumed, whole = (str(tmp_path / file) for file in ("half", "resumed", "whole"))
    tests = str(Path(__file__).parent)
    for run in ((0, 5, None, half), (5, 10, half, resumed), (0, 10, None, whole)):
        script = RESUME.format(tests=tests, name=name, rule=rule, run=run)
        subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(tests).parent)
    states = [torch.load(path)["model"] for path in (resumed, whole)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_feedback_keeps_dtype_and_memory_order_when_the_model_moves(device: torch.device) -> None:
    model = make("conv_net").to(device).to(torch.bfloat16).to(memory_format=torch.contiguous_format)
    for name, order in (("2", torch.channels_last), ("4", torch.contiguous_format)):
        assert model.feedback[name].dtype == torch.float32
        assert model.feedback[name].device.type == device.type
        assert model.feedback[name].is_contiguous(memory_format=order)
    x, _ = batch("conv_net", device)
    model(x.to(torch.bfloat16)).sum().backward()


def test_feedback_saved_in_another_dtype_is_float32_again() -> None:
    x, _ = batch("mlp")
    model, fresh = make("mlp"), FDFA(NETS["mlp"][0]())
    model(x).sum().backward()
    fresh.load_state_dict(
        model.half().state_dict() | {k: b.half() for k, b in _feedback(model).items()}
    )
    fresh(x).sum().backward()
    assert {t.dtype for t in _feedback(fresh).values()} == {torch.float32}


def _feedback(model: FDFA) -> dict[str, Tensor]:
    names = ("feedback.", "exp_avg.", "exp_avg_sq.")
    return {key: t for key, t in model.state_dict().items() if key.startswith(names)}


def test_feedback_saved_in_another_layout_is_put_in_order() -> None:
    trained = make("conv_net", feedback="ema", feedback_lr=0.1)
    x, _ = batch("conv_net")
    trained(x).sum().backward()
    state = {key: value.contiguous() for key, value in trained.state_dict().items()}
    fresh = FDFA(conv_net(), feedback="ema", feedback_lr=0.1)
    fresh.load_state_dict(state)
    for model in (trained, fresh):
        model(x).sum().backward()
    for key, value in trained.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[key]), key


def test_feedback_is_a_mapping_in_the_order_of_the_noise() -> None:
    model = make("conv_net")
    assert list(model.feedback) == model.feedback.keys() == ["0", "2", "4"]
    assert [tuple(b.shape) for b in model.feedback.values()] == [(3, 4, 10, 10), (3, 6, 5, 5), (3, 8)]
    assert "2" in model.feedback
    assert model.feedback.get("2") is model.feedback["2"]
    assert model.feedback.get("1") is None
    assert len(model.feedback) == 3
    assert isinstance(model.feedback, Mapping)
    assert model.feedback["2"].is_contiguous(memory_format=torch.channels_last)


def test_blocks_are_named_by_their_place_in_the_module() -> None:
    net = nn.Sequential()
    net.features = nn.Sequential(FDFALinear(6, 4), FDFABlock(FDFALinear(4, 4), nn.ReLU()))
    net.head = nn.Linear(4, 3)
    model = FDFA(net, example_input=torch.zeros(1, 6) + 1)
    # A block within a block is a part of it.
    assert list(model.feedback) == ["features.0", "features.1"]
    reloaded = FDFA(copy.deepcopy(net))
    reloaded.load_state_dict(model.state_dict())
    assert list(reloaded.feedback) == ["features.0", "features.1"]


def test_padding_that_the_operator_has_not_is_done_before_it() -> None:
    for arguments in ({"padding": "same"}, {"padding": 1, "padding_mode": "circular"}):
        net = nn.Sequential(
            FDFAConv2d(1, 2, 4, activation="relu"),
            FDFAConv2d(2, 3, 4, **arguments),
            nn.Flatten(),
            nn.LazyLinear(3),
        )
        x = torch.randn(4, 1, 9, 9)
        net(x)
        model = FDFA(net, example_input=x)
        torch.testing.assert_close(model(x), net(x))


class Drop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach() * 2


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = FDFALinear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.block(x)))


class Unused(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


@pytest.mark.parametrize(
    ("net", "error", "message"),
    [
        (
            nn.Linear(6, 3),
            ValueError,
            "FDFA: the module has no block; use FDFALinear, FDFAConv2d or FDFABlock",
        ),
        (FDFALinear(6, 3), ValueError, r"FDFA: the module is itself a block \(FDFALinear\)"),
        (
            FDFA(nn.Sequential(FDFALinear(6, 4), nn.Linear(4, 3))),
            ValueError,
            "FDFA: the module has an FDFA within it; wrap it once",
        ),
        (Twice(), RuntimeError, "FDFA: block 'block' was used twice in one forward pass"),
        (Unused(), RuntimeError, "FDFA: the output has no tangent. No module dropped it"),
        (
            nn.Sequential(FDFALinear(6, 4), Drop(), nn.Linear(4, 3)),
            RuntimeError,
            r"FDFA: the output has no tangent. Module '1' \(Drop\) dropped it",
        ),
        (
            nn.Sequential(FDFALinear(6, 4), FDFABlock(nn.ReLU(), Drop()), nn.Linear(4, 3)),
            RuntimeError,
            r"FDFA: block '1': its module 1 \(Drop\) dropped the tangent",
        ),
        (
            nn.Sequential(FDFALinear(6, 4), nn.Linear(4, 3), nn.Unflatten(1, (3, 1))),
            ValueError,
            r"FDFA: the output must be \[N, K\].*; got \[2, 3, 1\]",
        ),
        (
            nn.Sequential(FDFALinear(6, 4), nn.Linear(4, 3), nn.Hardtanh(-1e-9, 1e-9)),
            RuntimeError,
            "FDFA: the tangent of the output is zero",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(net: nn.Module, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        FDFA(net, example_input=torch.randn(2, 6))


def test_a_module_that_drops_the_tangent_of_some_blocks_is_warned_of() -> None:
    net = nn.Sequential(FDFALinear(6, 4), Drop(), FDFALinear(4, 4), nn.Linear(4, 3))
    with pytest.warns(UserWarning, match=r"FDFA: module '1' \(Drop\) drops the tangent"):
        FDFA(net, example_input=torch.randn(2, 6))


def test_parameters_between_blocks_are_refused_since_they_would_not_learn() -> None:
    net = nn.Sequential(FDFALinear(6, 4), nn.LayerNorm(4), FDFALinear(4, 4), nn.Linear(4, 3))
    model = FDFA(net, example_input=torch.randn(2, 6))
    with pytest.raises(
        RuntimeError, match=r"the input of block '2' depends on parameters .* FDFABlock"
    ):
        model(torch.randn(2, 6))


def test_a_refused_batch_changes_neither_noise_nor_feedback() -> None:
    model = make("conv_net", feedback="ema", feedback_lr=0.1)
    net = nn.Sequential(*list(model.module)[:3], nn.AdaptiveAvgPool2d(5), *list(model.module)[3:])
    model = FDFA(net, feedback="ema", example_input=torch.randn(2, 1, 12, 12))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"FDFA: block '0': its feedback has shape \[3, 4, 10, 10\]"):
        model(torch.randn(2, 1, 14, 14))
    with pytest.raises(RuntimeError, match=r"Given groups=1|expected input"):
        model(torch.randn(2, 2, 12, 12))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_an_activation_changed_in_place_behind_a_block_is_an_error_not_a_wrong_gradient() -> None:
    net = nn.Sequential(FDFALinear(6, 4, activation="relu"), nn.Dropout(inplace=True), nn.Linear(4, 3))
    model = FDFA(net, example_input=torch.randn(2, 6))
    with pytest.raises(RuntimeError, match=r"FDFA: the output of block '0' was changed in place"):
        model(torch.randn(2, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feedback": "sgd"}, "FDFA: feedback must be one of ema, adam, grad; got 'sgd'"),
        ({"noise": "cauchy"}, "FDFA: noise must be one of gaussian, rademacher; got 'cauchy'"),
        ({"backend": "triton"}, "FDFA: backend must be one of fused, reference; got 'triton'"),
        ({"feedback": "ema", "feedback_lr": 1.5}, r"FDFA: feedback_lr must be in \(0, 1\)"),
        ({"feedback_lr": -1.0}, "FDFA: feedback_lr must be finite and not negative; got -1.0"),
        ({"feedback_lr": float("nan")}, "FDFA: feedback_lr must be finite and not negative; got nan"),
        ({"betas": (1.0, 0.999)}, r"FDFA: betas must be two numbers in \[0, 1\); got \(1.0, 0.999\)"),
        ({"betas": (0.9,)}, "FDFA: betas must be two numbers"),
        ({"eps": -1.0}, "FDFA: eps must be finite and not negative; got -1.0"),
        ({"method": ForwardFeedback}, "FDFA: method must be a name or a Method, not its class"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        FDFA(mlp(), **options)


def test_feedback_is_float32_whatever_the_default_is() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model = FDFA(mlp(), backend="reference", example_input=torch.randn(2, 6))
    finally:
        torch.set_default_dtype(torch.float32)
    model(torch.randn(2, 6, dtype=torch.float64)).sum().backward()
    assert {b.dtype for b in model.feedback.values()} == {torch.float32}


@pytest.mark.parametrize("method", ["fdfa", "fg-a"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dense_block_takes_any_dimensions_between_batch_and_features(
    method: str, backend: str
) -> None:
    found = []
    for between in ((12,), (3, 4), (3, 2, 2)):
        torch.manual_seed(0)
        x = torch.randn(5, *between, 6)
        net = nn.Sequential(FDFALinear(6, 8, activation="tanh"), nn.Flatten(), nn.Linear(96, 3))
        model = FDFA(net, method=method, backend=backend, feedback_lr=0.05, example_input=x)
        F.cross_entropy(model(x), torch.arange(5) % 3).backward()
        found.append([p.grad for p in net.parameters()])
    for other in found[1:]:
        for actual, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(actual, expected)


def test_volumes_train_as_the_reference() -> None:
    x, y = torch.randn(4, 1, 3, 3, 4), torch.arange(4) % 3
    net = nn.Sequential(
        FDFABlock(nn.Conv3d(1, 6, (2, 1, 1)), nn.ReLU()), nn.Flatten(), nn.Linear(144, 3)
    )
    for method in ("fdfa", "fg-a"):
        gradients = []
        for backend in BACKENDS:
            torch.manual_seed(0)
            model = FDFA(copy.deepcopy(net), method=method, backend=backend, example_input=x)
            F.cross_entropy(model(x), y).backward()
            gradients.append([p.grad for p in model.module.parameters()])
        for actual, expected in zip(*gradients, strict=True):
            assert expected.any()
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["adam", "grad"])
def test_a_block_may_have_any_name(rule: str) -> None:
    x = torch.randn(4, 6)
    names = ["keys", "values", "put"]
    layers = [(name, FDFALinear(6, 6, activation="tanh")) for name in names]
    net = nn.Sequential(OrderedDict([*layers, ("out", nn.Linear(6, 3))]))
    model = FDFA(net, feedback=rule, example_input=x)
    model(x).sum().backward()
    assert list(model.feedback) == names
    assert FDFA(copy.deepcopy(net), feedback=rule).load_state_dict(model.state_dict())


def test_the_probe_leaves_no_trace() -> None:
    net = block_net()
    before = copy.deepcopy(net.state_dict())
    model = FDFA(net, example_input=batch("block_net")[0])
    assert model.noise_state[1] == 0
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("n", [0, 1])
def test_batches_of_none_and_one(n: int) -> None:
    model = make("conv_net", feedback="adam", feedback_lr=0.1)
    x, _ = batch("conv_net", n=n)
    before = [b.clone() for b in model.feedback.values()]
    model(x).sum().backward()
    changed = [not torch.equal(a, b) for a, b in zip(before, model.feedback.values(), strict=True)]
    assert all(changed) if n else not any(changed)


def test_missing_or_foreign_extension_says_how_to_rebuild(tmp_path: Path) -> None:
    package = Path(sys.modules["fdfa_ext"].__file__).parent
    copied = tmp_path / "fdfa_ext"
    copied.mkdir()
    for file in package.glob("*.py"):
        (copied / file.name).write_text(file.read_text())
    for built_for, message in (
        (None, "compiled extension is missing. Rebuild it"),
        ("1.13.0", "was built for torch 1.13.0, but torch"),
        (torch.__version__, "compiled extension does not load"),
    ):
        if built_for:
            (copied / "_built_for.txt").write_text(built_for)
        run = subprocess.run(
            [sys.executable, "-c", "import fdfa_ext"], cwd=tmp_path, capture_output=True, text=True
        )
        assert run.returncode != 0
        assert "ImportError" in run.stderr
        assert message in run.stderr
        assert "pip install --no-build-isolation ." in run.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's heap")
def test_a_model_on_the_cpu_ends_page_faults() -> None:
    """In a process of its own: page faults of a step that takes and frees 24 MiB, without FDFA and with."""
    program = """
import resource, torch
from torch import nn
from fdfa_ext import FDFA, FDFALinear

def step():
    pieces = [torch.zeros(3 * 2**18) for _ in range(8)]

def faults():
    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20

without = faults()
FDFA(nn.Sequential(FDFALinear(2, 2), nn.Linear(2, 2)))
print(without, faults())
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    without, with_a_model = map(float, run.stdout.split())
    assert with_a_model < 1 + without / 4
