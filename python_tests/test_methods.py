"""Every method of the paper against its definition, written out with plain autograd."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import slow_but
from nets import NETS, batch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.utils.checkpoint import checkpoint

from fdfa_ext import FDFA, FDFALinear, reference
from fdfa_ext.dual_pass import BACKENDS
from fdfa_ext.layers import Block
from fdfa_ext.methods import (
    METHODS,
    BlockMethod,
    BlockStep,
    DirectFeedback,
    ForwardFeedback,
    KolenPollack,
)
from fdfa_ext.noise import flatten_features, unflatten_features

Gradients = dict[str, Tensor]


def make(name: str, method: Any, device: Any = "cpu", **options: Any) -> tuple[FDFA, Tensor, Tensor]:
    torch.manual_seed(1)
    net = NETS[name][0]().to(device)
    # Running statistics: a sample's Jacobian does not depend on the others.
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.eval()
    x, y = batch(name, device, n=4)
    model = FDFA(net, method=method, example_input=x, **options)
    net.eval()
    model.training = True
    return model, x, y


def gradients(model: FDFA) -> Gradients:
    return {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}


def loss_of(model: FDFA, x: Tensor, y: Tensor) -> Tensor:
    output = model(x)
    return sum(F.cross_entropy(o, y) for o in (output, *model.local_outputs))


class Literal:
    """The forward pass of a net of blocks, module by module, with what a method may need of it."""

    def __init__(self, model: FDFA, x: Tensor, target: Tensor, tangents: str = "none") -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.noise: dict[str, Tensor] = {}
        self.net = model.module
        y, t = x, torch.zeros_like(x)
        for name, module in self.net.named_children():
            if isinstance(module, Block) and tangents == "block":
                t = torch.zeros_like(t)
            before = y
            y, t = jvp(module, (y,), (t,))
            y = y.detach()
            if isinstance(module, Block):
                index = len(self.inputs)
                u = reference.perturbation(
                    model.noise_state, index, model.noise, y.shape, channels_last=y.dim() == 4
                )
                t = t + u
                self.inputs[name], self.outputs[name], self.noise[name] = before, y, u
        self.tangent = t
        output = y.detach().requires_grad_()
        F.cross_entropy(output, target).backward()
        self.error = output.grad

    def block_gradients(self, name: str, delta: Tensor) -> Gradients:
        """Of the block's own parameters, from the error at its output."""
        block = self.net.get_submodule(name)
        parameters = dict(block.named_parameters())
        y = functional_call(block, parameters, self.inputs[name])
        found = torch.autograd.grad(y, list(parameters.values()), delta.view_as(y))
        return {f"{name}.{key}": g for key, g in zip(parameters, found, strict=True)}


def check(model: FDFA, literal: Literal, delta: Callable[[str], Tensor]) -> None:
    actual = gradients(model)
    for name in literal.inputs:
        for key, expected in literal.block_gradients(name, delta(name)).items():
            torch.testing.assert_close(actual[key], expected, rtol=1e-4, atol=1e-6, msg=key)
    # The output layer has its exact gradient.
    last = list(model.module.children())[-1]
    torch.testing.assert_close(last.bias.grad, literal.error.sum(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NETS)
def test_dfa_projects_the_error_by_its_fixed_matrix(
    device: torch.device, name: str, backend: str
) -> None:
    model, x, y = make(name, "dfa", device, backend=backend)
    before = {key: b.clone() for key, b in model.feedback.items()}
    literal = Literal(model, x, y)
    loss_of(model, x, y).backward()
    check(model, literal, lambda n: literal.error @ before[n].flatten(1))
    for key, matrix in model.feedback.items():
        assert torch.equal(matrix, before[key])
        bound = (6 / matrix[0].numel()) ** 0.5
        assert 0.8 * bound < matrix.abs().max() <= bound
    assert model.noise_state[1] == 0


@pytest.mark.parametrize("rule", ["adam", "ema", "grad"])
@pytest.mark.parametrize("name", NETS)
def test_dkp_learns_from_error_times_activation_with_decay(
    device: torch.device, name: str, rule: str
) -> None:
    method = KolenPollack(weight_decay=0.1, initialize=nn.init.normal_)
    model, x, y = make(name, method, device, feedback=rule, feedback_lr=0.02)
    before = {key: b.detach().clone() for key, b in model.feedback.items()}
    literal = Literal(model, x, y)
    loss_of(model, x, y).backward()
    model.give_feedback_gradients()
    for key, b in before.items():
        gradient = torch.einsum("nk,n...->k...", literal.error, literal.outputs[key]) + 0.1 * b
        if rule == "grad":
            torch.testing.assert_close(model.feedback[key].grad, gradient)
            expected = b
        else:
            parameter = nn.Parameter(b.clone())
            parameter.grad = gradient
            kind = torch.optim.Adam if rule == "adam" else torch.optim.SGD
            kind([parameter], lr=0.02).step()
            expected = parameter.detach()
        torch.testing.assert_close(model.feedback[key].detach(), expected, rtol=1e-4, atol=1e-6)
    check(model, literal, lambda n: literal.error @ model.feedback[n].detach().flatten(1))
    assert model.updates == (1 if rule == "adam" else 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NETS)
def test_fg_a_is_algorithm_3(device: torch.device, name: str, backend: str) -> None:
    model, x, y = make(name, "fg-a", device, backend=backend)
    literal = Literal(model, x, y, tangents="network")
    loss_of(model, x, y).backward()
    slopes = (literal.error * literal.tangent).sum(1)
    check(model, literal, lambda n: torch.einsum("n,n...->n...", slopes, literal.noise[n]))
    assert model.noise_state[1] == 1
    assert len(model.feedback) == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NETS)
def test_lg_fg_a_estimates_each_blocks_own_loss(device: torch.device, name: str, backend: str) -> None:
    model, x, y = make(name, "lg-fg-a", device, backend=backend)
    literal = Literal(model, x, y, tangents="block")
    loss_of(model, x, y).backward()
    slopes = {list(literal.inputs)[-1]: (literal.error * literal.tangent).sum(1)}
    assert len(model.heads) == len(literal.inputs) - 1
    for key, head in model.heads.items():
        out = head(flatten_features(literal.outputs[key])).detach().requires_grad_()
        F.cross_entropy(out, y).backward()
        slopes[key] = (
            out.grad * (flatten_features(literal.noise[key]) @ head.weight.detach().t())
        ).sum(1)
        torch.testing.assert_close(
            head.weight.grad, out.grad.t() @ flatten_features(literal.outputs[key])
        )
    check(model, literal, lambda n: torch.einsum("n,n...->n...", slopes[n], literal.noise[n]))
    assert {id(p) for p in model.forward_parameters()} >= {id(p) for p in model.heads.parameters()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NETS)
def test_fg_w_is_algorithm_2(device: torch.device, name: str, backend: str) -> None:
    model, x, y = make(name, "fg-w", device, backend=backend)
    parameters = {key: p.detach() for key, p in model.module.named_parameters()}
    directions = {
        key: reference.perturbation(model.noise_state, i, "gaussian", [1, p.numel()]).view_as(p)
        for i, (key, p) in enumerate(parameters.items())
    }

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model.module, parameters, x), y)

    _, slope = jvp(loss, (parameters,), (directions,))
    loss_of(model, x, y).backward()
    for key, v in directions.items():
        torch.testing.assert_close(gradients(model)[key], slope * v, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", NETS)
def test_bp_is_autograd(name: str) -> None:
    model, x, y = make(name, "bp")
    loss_of(model, x, y).backward()
    expected = torch.autograd.grad(F.cross_entropy(model.module(x), y), list(model.module.parameters()))
    for actual, value in zip(gradients(model).values(), expected, strict=True):
        torch.testing.assert_close(actual, value)


class Definition(ForwardFeedback):
    """FDFA by its delta and feedback_gradient: a subclass does without the operator for both."""


class DirectDefinition(DirectFeedback):
    pass


class KolenPollackDefinition(KolenPollack):
    pass


@pytest.mark.parametrize("outputs", [3, 1])
@pytest.mark.parametrize("output_layer", ["plain", "no bias", "frozen weight", "frozen bias", "normed"])
@pytest.mark.parametrize(("n", "width"), [(5, 7), (64, 4500), (200, 4500)])
def test_the_output_layer_gets_its_exact_gradients(
    output_layer: str, n: int, width: int, outputs: int
) -> None:
    """Whether the operator runs it or cannot, for which a parameter between block and layer is enough.
    Products of wide layers are transposed, and those of few samples take input and tangent at once. B is
    compared by "ema": Adam's first step divides by |G|, so that where G is near zero it shows rounding."""
    torch.manual_seed(0)
    last = nn.Linear(width, outputs, bias=output_layer != "no bias")
    last.weight.requires_grad = output_layer != "frozen weight"
    if last.bias is not None:
        last.bias.requires_grad = output_layer != "frozen bias"
    between = [nn.BatchNorm1d(width)] if output_layer == "normed" else []
    net = nn.Sequential(FDFALinear(6, width, activation="tanh"), *between, last)
    x, y = torch.randn(n, 6), torch.randint(outputs, (n,))
    found = []
    for method in ("fdfa", Definition()):
        torch.manual_seed(1)
        options = {"method": method, "feedback": "ema", "feedback_lr": 0.05}
        model = FDFA(copy.deepcopy(net), example_input=x, **options)
        output = model(x)
        assert output.untyped_storage().nbytes() == output.nbytes
        assert output.is_contiguous()
        (F.cross_entropy(output, y) + output.square().mean()).backward()
        grads = [p.grad for p in model.module.parameters() if p.grad is not None]
        found.append([output.detach(), *grads, *model.feedback.values()])
    assert len(found[0]) == len(found[1])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["adam", "ema", "grad"])
@pytest.mark.parametrize(
    ("method", "definition"),
    [("fdfa", Definition), ("dfa", DirectDefinition), ("dkp", KolenPollackDefinition)],
)
@pytest.mark.parametrize("name", NETS)
def test_a_definition_in_a_few_lines_is_its_fused_operator(
    name: str, method: str, definition: Callable[[], BlockMethod], rule: str
) -> None:
    options = {"feedback": rule, "feedback_lr": 0.05}
    models = [make(name, way, **options) for way in (method, definition())]
    for _ in range(3):
        for model, x, y in models:
            model.zero_grad()
            loss_of(model, x, y).backward()
    (fused, *_), (defined, *_) = models
    for key, value in fused.state_dict().items():
        torch.testing.assert_close(defined.state_dict()[key], value, rtol=1e-4, atol=1e-6, msg=key)
    for key, value in gradients(fused).items():
        torch.testing.assert_close(gradients(defined)[key], value, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", slow_but(["mlp", "conv_net"], "mlp"))
@pytest.mark.parametrize(
    ("method", "steps"), slow_but([("fg-a", 1500), ("fg-w", 3000)], ("fg-a", 1500))
)
def test_forward_gradients_are_unbiased(name: str, method: str, steps: int) -> None:
    """The mean over steps, projected on the true gradient, is that gradient: slope 1 within 5 sigma."""
    model, x, y = make(name, method)
    exact = torch.autograd.grad(F.cross_entropy(model.module(x), y), list(model.module.parameters()))
    n = len(exact) - (2 if method == "fg-a" else 0)  # whose output layer is exact
    keys = [key for key, _ in model.module.named_parameters()][:n]
    products, squares = torch.zeros(steps, n), torch.stack([e.square().sum() for e in exact[:n]])
    for t in range(steps):
        model.zero_grad()
        loss_of(model, x, y).backward()
        found = gradients(model)
        for i, key in enumerate(keys):
            products[t, i] = (found[key] * exact[i]).sum()
    slopes = torch.cat([products / squares, products.sum(1, keepdim=True) / squares.sum()], dim=1)
    mean, sigma = slopes.mean(0), slopes.std(0) / steps**0.5
    assert ((mean - 1).abs() < 5 * sigma).all(), (mean, sigma)
    assert sigma[-1] < 0.1, sigma  # of the whole gradient: or the line above would say nothing


@pytest.mark.parametrize("method", slow_but(METHODS, "fdfa", "dfa", "dkp", "fg-a", "lg-fg-a", "bp"))
def test_every_method_learns_a_task(method: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 10)
    teacher = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 4))
    y = teacher(x).argmax(1)
    net = nn.Sequential(
        FDFALinear(10, 32, activation="relu"), FDFALinear(32, 32, activation="relu"), nn.Linear(32, 4)
    )
    # A frozen random net below a trained output layer is what a method has to beat.
    model = FDFA(net, method=method, feedback_lr=1e-3, example_input=x)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    before = net[0].weight.detach().clone()
    for _ in range(2000 if method == "fg-w" else 400):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
    accuracy = (net(x).argmax(1) == y).float().mean()
    assert accuracy > {"fg-w": 0.7, "fg-a": 0.85, "lg-fg-a": 0.85}.get(method, 0.95), accuracy
    assert not torch.equal(before, net[0].weight)


def test_a_rule_of_ones_own_is_one_class() -> None:
    """Sign-symmetric DFA: only the signs of B project."""

    class SignFeedback(DirectFeedback):
        def delta(self, block: BlockStep) -> Tensor:
            return block.error @ block.feedback.sign()

    model, x, y = make("conv_net", SignFeedback())
    literal = Literal(model, x, y)
    loss_of(model, x, y).backward()
    check(model, literal, lambda n: literal.error @ model.feedback[n].sign().flatten(1))


def test_rows_and_unrows_are_inverse() -> None:
    for shape in ((3, 4), (3, 2, 4), (3, 2, 4, 5), (3, 2, 4, 5, 2)):
        t = torch.randn(shape)
        assert torch.equal(unflatten_features(flatten_features(t), shape), t)
        assert torch.equal(unflatten_features(flatten_features(t).t().contiguous().t(), shape), t)


@pytest.mark.parametrize("rule", ["adam", "ema", "grad"])
def test_a_rule_may_return_a_transposed_matrix(rule: str) -> None:
    class Transposed(KolenPollack):
        def delta(self, block: BlockStep) -> Tensor:
            return (block.feedback.t() @ block.error.t()).t()

        def feedback_gradient(self, block: BlockStep) -> Tensor:
            return super().feedback_gradient(block).t().contiguous().t()

    found = []
    for method in (KolenPollackDefinition(), Transposed()):
        model, x, y = make("conv_net", method, feedback=rule, feedback_lr=0.05)
        loss_of(model, x, y).backward()
        found.append([*gradients(model).values(), *model.feedback.values()])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("method", "activation"),
    [("fdfa", "gelu"), ("fdfa", "identity"), ("fg-a", "silu"), ("dfa", "gelu")],
)
def test_an_output_that_no_one_needs_may_be_changed_in_place(method: str, activation: str) -> None:
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        layers = [FDFALinear(6, 8, activation=activation), nn.ReLU(inplace=inplace), nn.Linear(8, 3)]
        model = FDFA(nn.Sequential(*layers), method=method, example_input=torch.randn(4, 6))
        loss_of(model, torch.ones(4, 6), torch.tensor([0, 1, 2, 0])).backward()
        found.append(gradients(model))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value)


@pytest.mark.parametrize(("method", "activation"), [("lg-fg-a", "identity"), ("dkp", "gelu")])
def test_an_output_that_a_method_reads_may_not(method: str, activation: str) -> None:
    net = nn.Sequential(
        *(FDFALinear(6, 8, activation=activation), nn.ReLU(inplace=True)),
        *(FDFALinear(8, 8, activation="tanh"), nn.Linear(8, 3)),
    )
    with pytest.raises(RuntimeError, match="output of block '0' was changed in place"):
        FDFA(net, method=method)(torch.randn(4, 6))


@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.bfloat16, "fused"), (torch.float64, "reference")]
)
def test_local_heads_have_the_nets_dtype(dtype: torch.dtype, backend: str) -> None:
    x, y = batch("mlp")
    net = NETS["mlp"][0]().to(dtype)
    model = FDFA(net, method="lg-fg-a", backend=backend, example_input=x.to(dtype))
    loss_of(model, x.to(dtype), y).backward()
    assert all(p.dtype == p.grad.dtype == dtype for p in model.forward_parameters())


def test_local_outputs_are_those_of_the_last_training_forward_alone() -> None:
    model, x, _ = make("mlp", "lg-fg-a")
    model(x)
    assert len(model.local_outputs) == 1
    copied = copy.deepcopy(model)  # a graph cannot be copied
    assert copied.local_outputs == []
    assert len(model.local_outputs) == 1
    model.eval()(x)
    assert model.local_outputs == []


def test_a_fresh_model_makes_room_for_the_heads_of_a_saved_one() -> None:
    model, x, _ = make("mlp", "lg-fg-a")
    fresh = FDFA(NETS["mlp"][0](), method="lg-fg-a")
    fresh.load_state_dict(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value)
    fresh(x)
    assert torch.equal(fresh.heads["0"].weight, model.heads["0"].weight)


@pytest.mark.parametrize("method", METHODS)
def test_a_refused_batch_leaves_the_noise_alone(method: str) -> None:
    model, _, _ = make("mlp", method)
    before = model.noise_state.clone()
    with pytest.raises(RuntimeError):
        model(torch.randn(4, 5))
    assert torch.equal(model.noise_state, before)


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_model_goes_on_as_the_uninterrupted_one(method: str) -> None:
    (first, x, y), (second, *_) = (make("mlp", method) for _ in range(2))
    loss_of(first, x, y).backward()
    second.load_state_dict(first.state_dict())
    for model in (first, second):
        model.zero_grad()
        loss_of(model, x, y).backward()
    for key, value in gradients(first).items():
        assert torch.equal(gradients(second)[key], value)
    for key, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[key], value)


class OwnKolenPollack(KolenPollack):
    """A subclass does not take the fused operator."""


@pytest.mark.parametrize("method", [KolenPollack, OwnKolenPollack])
@pytest.mark.parametrize("rule", ["adam", "ema"])
def test_an_error_that_is_not_finite_leaves_the_feedback_alone(rule: str, method: Any) -> None:
    model, x, y = make("mlp", method(), feedback=rule)
    loss_of(model, x, y).backward()
    before = [b.clone() for b in (*model.feedback.values(), *model.exp_avg.values())]
    (loss_of(model, x, y) * float("inf")).backward()
    after = [*model.feedback.values(), *model.exp_avg.values()]
    for a, b in zip(after, before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", [ForwardFeedback, KolenPollack, OwnKolenPollack])
def test_adam_outlives_an_error_whose_square_is_infinite(method: Any) -> None:
    """The step is finite, and what Adam keeps of it would not be."""
    model, x, y = make("mlp", method(), feedback_lr=1e-2)
    for scale in (1.0, 1e25, 1.0, 1.0):
        model.zero_grad()
        (loss_of(model, x, y) * scale).backward()
    for matrix in (*model.feedback.values(), *model.exp_avg.values(), *model.exp_avg_sq.values()):
        assert matrix.isfinite().all()
        assert matrix.abs().max() < 1e4


@pytest.mark.parametrize("method", [ForwardFeedback, KolenPollack, OwnKolenPollack])
def test_adam_of_the_feedback_takes_its_betas_and_eps(method: Any) -> None:
    numbers = {"betas": (0.5, 0.8), "eps": 1e-2}
    adam, x, y = make("mlp", method(), feedback_lr=1e-2, **numbers)
    grad, *_ = make("mlp", method(), feedback="grad")
    grad.noise_state.copy_(adam.noise_state)
    optimizer = torch.optim.Adam(grad.feedback_parameters(), lr=1e-2, **numbers)
    for _ in range(5):
        for model in (adam, grad):
            loss_of(model, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, matrix in adam.feedback.items():
        torch.testing.assert_close(grad.feedback[name].detach(), matrix, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["fg-a", "fg-w"])
def test_rademacher_estimates_of_one_sample_differ_in_sign_alone(method: str) -> None:
    net = nn.Sequential(FDFALinear(6, 8), nn.Linear(8, 3))
    x = torch.randn(1, 6)
    model = FDFA(net, method=method, noise="rademacher", example_input=x)
    model(x).square().sum().backward()
    sizes = net[0].bias.grad.abs()
    torch.testing.assert_close(sizes, sizes[:1].expand_as(sizes))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["fdfa", "fg-a"])
def test_two_processes_with_a_first_sample_each_perturb_as_one(backend: str, method: str) -> None:
    """What the docstring of FDFA says of data-parallel training."""
    models = [make("conv_net", method, feedback="grad", backend=backend)[0] for _ in range(3)]
    x, _ = batch("conv_net", n=6)
    for model, first in zip(models, (0, 0, 3), strict=True):
        model.noise_state.copy_(torch.tensor([7, 0, first]))
    for model, part in zip(models, (x, x[:3], x[3:]), strict=True):
        model(part).square().mean().backward()
        model.give_feedback_gradients()
    whole, *halves = [[p.grad for p in model.parameters()] for model in models]
    for expected, first_half, second_half in zip(whole, *halves, strict=True):
        torch.testing.assert_close((first_half + second_half) / 2, expected, rtol=1e-4, atol=1e-5)


def test_weight_perturbation_has_one_direction_in_all_processes() -> None:
    models = [make("mlp", "fg-w")[0] for _ in range(2)]
    x, _ = batch("mlp")
    for model, first in zip(models, (0, 5), strict=True):
        model.noise_state.copy_(torch.tensor([7, 0, first]))
        model(x).sum().backward()
        assert model.noise_state.tolist() == [7, 1, first]
    for name, gradient in gradients(models[0]).items():
        assert torch.equal(gradients(models[1])[name], gradient)


def test_a_checkpointed_weight_perturbation_is_along_its_own_directions() -> None:
    """The tangent made again in the backward is of new noise, and so must the directions be."""
    net = nn.Sequential(nn.Linear(3, 1, bias=False), FDFALinear(1, 1, bias=False))
    model = FDFA(net, method="fg-w")
    x = torch.randn(1, 3)
    slope = [net[1].weight[0, 0] * x[0], (net[0].weight @ x[0])]
    weights = list(net.parameters())
    for _ in range(20):
        model.zero_grad()
        checkpoint(model, x, use_reentrant=False).sum().backward()
        directional = sum((s * p.grad.flatten()).sum() for s, p in zip(slope, weights, strict=True))
        # (s·V) V projected on s is (s·V)², never negative.
        assert directional > 0


class OwnRule(ForwardFeedback):
    """FDFA by the autograd node of own rules."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["fdfa", "dfa", "dkp", "fg-a", "lg-fg-a", "fg-w", OwnRule()])
def test_a_step_has_no_second_derivative(method: Any, backend: str) -> None:
    model, x, y = make("mlp", method, backend=backend)
    before = {name: b.clone() for name, b in model.feedback.items()}
    with pytest.raises(RuntimeError, match="create_graph=True is not possible"):
        loss_of(model, x, y).backward(create_graph=True)
    for name, b in model.feedback.items():
        assert torch.equal(b, before[name])
        assert not b.requires_grad


def test_fg_w_finds_a_graph_within_a_nested_input() -> None:
    class OfDictionary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = NETS["mlp"][0]()

        def forward(self, inputs: dict[str, list[torch.Tensor]]) -> torch.Tensor:
            return self.net(inputs["x"][0])

    model = FDFA(OfDictionary(), method="fg-w")
    x, _ = batch("mlp")
    model({"x": [x]}).sum().backward()
    with pytest.raises(RuntimeError, match="input depends on parameters outside the module: fg-w"):
        model({"x": [nn.Linear(6, 6)(x)]})


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_batch_may_come_first(method: str) -> None:
    x, y = batch("mlp")
    model = FDFA(NETS["mlp"][0](), method=method, example_input=x[:0])
    loss_of(model, x, y).backward()
    assert all(p.grad is not None for p in model.module.parameters())


def test_what_the_user_gets_wrong_is_said() -> None:
    with pytest.raises(ValueError, match=r"method must be one of fdfa, dfa, .* got 'sgd'"):
        FDFA(NETS["mlp"][0](), method="sgd")
    with pytest.raises(RuntimeError, match="input depends on parameters outside the module: fg-w"):
        FDFA(NETS["mlp"][0](), method="fg-w")(nn.Linear(2, 6)(torch.randn(2, 2)))
    frozen = NETS["mlp"][0]().requires_grad_(False)
    with pytest.raises(RuntimeError, match="frozen"):
        FDFA(frozen, method="fg-w")(torch.randn(2, 6))
    inplace = nn.Sequential(FDFALinear(6, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    with pytest.raises(RuntimeError, match="output of block '0' was changed in place"):
        FDFA(inplace, method="dkp")(torch.randn(2, 6))
    cut = nn.Sequential(FDFALinear(6, 4), nn.Linear(4, 4), FDFALinear(4, 2), nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="depends on parameters of a module before it"):
        FDFA(cut, method="dfa")(torch.randn(2, 6))
