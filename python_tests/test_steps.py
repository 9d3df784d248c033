"""A training step: outputs, gradients and feedback are those of the algorithm, by every rule and backend."""

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import NETS, batch, make, mlp, step
from torch import nn

from fdfa_ext import FDFA, FDFABlock, FDFAConv2d, FDFALinear, reference
from fdfa_ext.dual_pass import BACKENDS


def test_one_step_is_algorithm_1_line_by_line() -> None:
    """The algorithm written out for an MLP, with the model's noise; no code of the package but that."""
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


@pytest.mark.parametrize("between", [nn.Identity(), nn.ELU()], ids=["side by side", "dual tensors"])
@pytest.mark.parametrize("first", [[], [nn.Tanh()]], ids=["block", "module"])
def test_an_input_that_wants_a_gradient_gets_none(between: nn.Module, first: list[nn.Module]) -> None:
    x = torch.randn(5, 6, requires_grad=True)
    model = FDFA(nn.Sequential(*first, FDFALinear(6, 5), between, nn.Linear(5, 3)), example_input=x)
    model(x).sum().backward()
    assert x.grad is None
    assert all(p.grad is not None for p in model.parameters())


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


def test_seed_comes_from_torch_and_every_step_has_new_noise() -> None:
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        models.append(FDFA(mlp(), example_input=torch.zeros(2, 6)))
    states = [model.noise_state.tolist() for model in models]
    assert states[0] == states[1] != states[2]
    models[0](torch.zeros(2, 6))
    assert models[0].noise_state[1] == models[1].noise_state[1] + 1


@pytest.mark.parametrize("n", [0, 1])
def test_batches_of_none_and_one(n: int) -> None:
    model = make("conv_net", feedback="adam", feedback_lr=0.1)
    x, _ = batch("conv_net", n=n)
    before = [b.clone() for b in model.feedback.values()]
    model(x).sum().backward()
    changed = [not torch.equal(a, b) for a, b in zip(before, model.feedback.values(), strict=True)]
    assert all(changed) if n else not any(changed)


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
