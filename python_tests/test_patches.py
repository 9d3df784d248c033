"""Noise and feedback in patches of images: the algorithm with one u and one column of B for each patch."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import NETS, batch, check_compiled_steps, make, step
from operands import noise_state
from torch import Tensor, nn

from fdfa_ext import FDFA, FDFABlock, FDFAConv2d, reference
from fdfa_ext._ops import fused
from fdfa_ext.dual_pass import BACKENDS
from fdfa_ext.methods import DirectFeedback, ForwardFeedback, KolenPollack
from fdfa_ext.metrics import feedback_ceiling, gradient_alignment, mean_jacobian

METHODS = ("fdfa", "dfa", "dkp", "fg-a", "lg-fg-a")
IMAGE_NETS = [name for name, (_, shape) in NETS.items() if len(shape) == 3]


def pixels_of(patches: Tensor, size: int, height: int, width: int) -> Tensor:
    """[..., rows, columns] → [..., height, width], pixel by pixel."""
    out = patches.new_empty([*patches.shape[:-2], height, width])
    for h in range(height):
        for w in range(width):
            out[..., h, w] = patches[..., h // size, w // size]
    return out


def means_of(images: Tensor, size: int) -> Tensor:
    """[..., height, width] → [..., rows, columns], patch by patch."""
    *rest, height, width = images.shape
    rows, columns = -(-height // size), -(-width // size)
    out = images.new_empty([*rest, rows, columns])
    for i in range(rows):
        for j in range(columns):
            corner = images[..., i * size : (i + 1) * size, j * size : (j + 1) * size]
            out[..., i, j] = corner.mean((-2, -1))
    return out


def pixels_in(size: int, height: int, width: int) -> Tensor:
    """Of each patch, [rows, columns]."""
    rows, columns = -(-height // size), -(-width // size)
    return torch.tensor(
        [
            [min(size, height - i * size) * min(size, width - j * size) for j in range(columns)]
            for i in range(rows)
        ]
    )


def linear_net() -> nn.Sequential:
    """[N, 1, 7, 5] → [N, 3], whose Jacobian is its weights."""
    return nn.Sequential(
        FDFAConv2d(1, 2, 3, padding=1), FDFAConv2d(2, 3, 3), nn.Flatten(), nn.Linear(45, 3)
    )


@pytest.mark.parametrize("size", [2, 3, 9])
def test_one_step_is_the_algorithm_with_patches(size: int) -> None:
    """Written out for two convolutions, with the model's noise; no code of the package but that."""
    torch.manual_seed(0)
    net = nn.Sequential(
        FDFAConv2d(1, 4, 3, activation="relu"),
        FDFAConv2d(4, 3, 2, activation="relu"),
        nn.Flatten(),
        nn.Linear(3 * 7 * 5, 3),
    )
    x, target = torch.randn(6, 1, 10, 8), torch.randint(3, (6,))
    model = FDFA(net, feedback="ema", feedback_lr=0.3, patch=size, example_input=x)
    weights = [net[i].weight.detach().clone() for i in (0, 1, 3)]
    biases = [net[i].bias.detach().clone() for i in (0, 1, 3)]
    state = model.noise_state.clone()
    F.cross_entropy(model(x), target).backward()

    y, d, inputs, primes, noises = x, torch.zeros_like(x), [], [], []
    for layer in range(2):
        inputs.append(y)
        a = F.conv2d(y, weights[layer], biases[layer])
        y, prime = a.relu(), (a > 0).float()
        height, width = a.shape[2:]
        shape = [*a.shape[:2], -(-height // size), -(-width // size)]
        u = reference.perturbation(state, layer, "gaussian", shape, channels_last=True)
        d = F.conv2d(d, weights[layer]) * prime + pixels_of(u, size, height, width)
        noises.append(u)
        primes.append(prime)
    output = y.flatten(1) @ weights[2].t() + biases[2]
    d = d.flatten(1) @ weights[2].t()
    e = (output.softmax(1) - F.one_hot(target, 3).float()) / 6
    for layer in range(2):
        height, width = primes[layer].shape[2:]
        pixels = pixels_in(size, height, width)
        feedback = 0.3 * torch.einsum("nk,ncij->kcij", d, noises[layer]) / 6 / pixels
        torch.testing.assert_close(model.feedback[str(layer)], feedback)
        error = torch.einsum("nk,kcij->ncij", e, feedback)
        delta = pixels_of(error, size, height, width) * primes[layer]
        expected = torch.nn.grad.conv2d_weight(inputs[layer], weights[layer].shape, delta)
        torch.testing.assert_close(net[layer].weight.grad, expected)
        torch.testing.assert_close(net[layer].bias.grad, delta.sum((0, 2, 3)))


@pytest.mark.parametrize("size", [2, 3])
def test_the_estimate_is_the_mean_jacobian_of_each_patch(size: int) -> None:
    """E[d u] over the noise, for a net whose Jacobian is the same for every sample."""
    torch.manual_seed(0)
    net = linear_net()
    x = torch.randn(20000, 1, 7, 5)
    model = FDFA(net, feedback="ema", feedback_lr=0.99, patch=size, example_input=x[:2])
    model.feedback_lr = 1.0  # B becomes the estimate
    F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.int64)).backward()
    last = net[3].weight.detach().view(3, 3, 5, 3)
    first = F.conv_transpose2d(last, net[1].weight.detach())
    for name, jacobian in (("0", first), ("1", last)):
        expected = means_of(jacobian, size)
        assert (model.feedback[name] - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("name", IMAGE_NETS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [2, 3, 50])
def test_fused_and_reference_train_alike(
    device: torch.device, name: str, method: str, size: int
) -> None:
    x, y = batch(name, device, n=9)
    for rule, noise in (("adam", "gaussian"), ("ema", "rademacher"), ("grad", "gaussian")):
        states = []
        for backend in BACKENDS:
            options: dict[str, Any] = {"feedback": rule, "feedback_lr": 0.05, "noise": noise}
            model = make(name, device, method=method, patch=size, backend=backend, **options)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            for _ in range(3):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                sum((F.cross_entropy(o, y) for o in model.local_outputs), loss).backward()
                optimizer.step()
            states.append(model.state_dict())
        for key, value in states[0].items():
            torch.testing.assert_close(states[1][key], value, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("base", [ForwardFeedback, DirectFeedback, KolenPollack])
def test_a_rule_of_ones_own_sees_patches_as_the_fused_one(base: Any) -> None:
    class Own(base):  # type: ignore[misc]
        """The same equations, but not in the fused operator."""

    x, y = batch("block_net", n=9)
    results = []
    for method in (base(), Own()):
        torch.manual_seed(3)
        model = make("block_net", method=method, feedback="ema", feedback_lr=0.2, patch=3)
        for matrix in model.feedback.values():
            torch.nn.init.normal_(matrix, generator=torch.Generator().manual_seed(5))
        step(model, torch.optim.SGD(model.module.parameters(), lr=0.1), x, y)
        results.append(model.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [3, 8])
@pytest.mark.parametrize("size", [1, 2, 4, 30])
def test_every_operator_adds_the_noise_of_the_patches(
    device: torch.device, dtype: torch.dtype, channels: int, size: int
) -> None:
    torch.manual_seed(0)
    state = noise_state(device)
    order = torch.channels_last
    x = torch.randn(3, 2, 11, 9, device=device, dtype=dtype)
    weight = torch.randn(channels, 2, 3, 3, device=device, dtype=dtype)
    common = (None, [1, 1], [0, 0], [1, 1], 1, state, 1, "identity")
    y, ty, _, _ = fused.conv2d(x, None, weight, *common, "gaussian", patch=size)
    shape = [*y.shape[:2], -(-9 // size), -(-7 // size)]
    u = reference.perturbation(state, 1, "gaussian", shape, channels_last=True)
    expected = pixels_of(u, size, 9, 7)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]

    def check(actual: Tensor, expected: Tensor = expected) -> None:
        torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance)

    check(ty)
    check(fused.perturb(y, None, state, 1, "gaussian", patch=size))
    if dtype != torch.float32:
        return
    images = y.contiguous(memory_format=order)
    tangent = torch.zeros_like(images)
    fused.batch_norm(
        *(images, None, tangent, None, None, None, None, None, True, 0.1, 1e-5, state, 1),
        *("relu", "gaussian"),
        patch=size,
    )
    check(tangent)
    _, ty, _, pooled = fused.conv2d(
        x, None, weight, *common, "gaussian", pool=[2, 2, 2, 2, 0, 0], patch=size
    )
    winners = F.max_pool2d(y, 2, return_indices=True)[1].flatten(2)
    check(ty, expected.flatten(2).gather(2, winners).view_as(pooled))
    pooled, ty, _, _ = fused.max_pool2d_end(
        images, None, images, [2, 2], [2, 2], [0, 0], state, 1, "gaussian", patch=size
    )
    shape = [*y.shape[:2], -(-4 // size), -(-3 // size)]
    u = reference.perturbation(state, 1, "gaussian", shape, channels_last=True)
    check(ty, pixels_of(u, size, 4, 3))


def test_feedback_and_moments_shrink_and_dense_blocks_do_not() -> None:
    whole, in_patches = make("block_net"), make("block_net", patch=4)
    for bank in ("feedback", "exp_avg", "exp_avg_sq"):
        for name, matrix in getattr(whole, bank).items():
            expected = list(matrix.shape)
            expected[2:] = [-(-side // 4) for side in expected[2:]]
            assert list(getattr(in_patches, bank)[name].shape) == expected, name
    # All of it is one step's affair: nothing of an image's size is kept.
    assert sum(t.numel() for t in in_patches.feedback.values()) < 100


def test_one_patch_for_all_of_an_image_takes_images_of_any_size() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        FDFABlock(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    model = FDFA(net, patch=1000, feedback="ema", feedback_lr=0.1)
    optimizer = torch.optim.SGD(model.module.parameters(), lr=0.1)
    for size in (8, 13, 6):
        before = None if len(model.feedback) == 0 else model.feedback["0"].clone()
        loss = step(model, optimizer, torch.randn(5, 1, size, size + 1), torch.randint(3, (5,)))
        assert loss.isfinite()
        assert model.feedback["0"].shape == (3, 4, 1, 1)
        assert before is None or not torch.equal(before, model.feedback["0"])
    other = FDFA(copy.deepcopy(net), patch=4, example_input=torch.randn(5, 1, 8, 8))
    with pytest.raises(ValueError, match="in patches of 4"):
        other(torch.randn(5, 1, 13, 13))


@pytest.mark.parametrize("method", ["fdfa", "fg-a"])
def test_a_saved_model_goes_on_as_it_was(method: str) -> None:
    x, y = batch("block_net", n=9)
    model = make("block_net", method=method, patch=3, feedback_lr=0.01)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y)
    twin = FDFA(NETS["block_net"][0](), method=method, patch=3, feedback_lr=0.01)
    twin.load_state_dict(model.state_dict())
    for one in (model, twin):
        step(one, torch.optim.SGD(one.parameters(), lr=0.1), x, y)
    for key, value in model.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value), key


def test_feedback_of_other_patches_is_refused() -> None:
    saved = make("block_net", patch=3).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        make("block_net", patch=2).load_state_dict(saved)
    model = FDFA(NETS["block_net"][0](), patch=2)
    model.load_state_dict(saved)  # which has no shapes yet to compare with
    with pytest.raises(ValueError, match="in patches of 2"):
        model(batch("block_net")[0])
    model = make("block_net", patch=2)
    with pytest.raises(AttributeError, match="patch cannot be changed"):
        model.patch = 3


@pytest.mark.parametrize("patch", [0, -1, 2**63, 2.0, True, "2", None])
def test_patch_must_be_a_whole_number_of_pixels(patch: Any) -> None:
    with pytest.raises(ValueError, match="patch must be a whole number"):
        make("conv_net", patch=patch)


def test_operators_refuse_what_does_not_fit() -> None:
    y, state = torch.randn(2, 3, 5, 5), noise_state("cpu")
    with pytest.raises(ValueError, match="patch must be 1 or more"):
        fused.perturb(y, None, state, 0, "gaussian", patch=0)
    saved = y.contiguous(memory_format=torch.channels_last)
    error = torch.randn(2, 4)
    rest = ([saved], [], state, [0], ["relu"], "gaussian", 1.0)
    whole = torch.zeros(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match=r"feedback must have shape \[4, 3, 2, 2\]"):
        fused.feedback_gradient([whole], error, error, *rest, patch=3)
    with pytest.raises(RuntimeError, match="feedback of images in patches must be channels_last"):
        fused.feedback_gradient([torch.zeros(4, 3, 2, 2)], error, error, *rest, patch=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGE_NETS)
@pytest.mark.parametrize("method", ["fdfa", "dkp", "fg-a"])
def test_a_compiled_step_is_the_eager_one(name: str, method: str) -> None:
    x, y = batch(name, n=9)
    check_compiled_steps(lambda: make(name, method=method, patch=3, feedback_lr=0.01), x, y)


@pytest.mark.parametrize("size", [1, 2, 9])
def test_the_ceiling_is_what_the_exact_mean_jacobian_reaches(size: int) -> None:
    """A linear net has one Jacobian, so that only patches cost it anything."""
    torch.manual_seed(0)
    net = linear_net()
    x, y = torch.randn(30, 1, 7, 5), torch.randint(3, (30,))
    model = FDFA(net, patch=4, example_input=x[:1])
    jacobians = mean_jacobian(model, x)
    last = net[3].weight.detach().view(3, 3, 5, 3)
    torch.testing.assert_close(jacobians["1"], last)
    torch.testing.assert_close(jacobians["0"], F.conv_transpose2d(last, net[1].weight.detach()))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    angles = feedback_ceiling(model, (x, y), patch=size)
    if size == 1:
        assert max(angles.values()) < 1e-3
    else:
        # By hand: each pixel's error through its patch's mean.
        output = net(x)
        e = (output.softmax(1) - F.one_hot(y, 3).float()).detach() / 30
        error = torch.einsum("nk,kcij->ncij", e, means_of(last, size))
        delta = pixels_of(error, size, 5, 3)
        first = F.conv2d(x, net[0].weight, net[0].bias, padding=1).detach()
        estimate = torch.nn.grad.conv2d_weight(first, net[1].weight.shape, delta).flatten()
        F.cross_entropy(output, y).backward()
        cosine = F.cosine_similarity(estimate, net[1].weight.grad.flatten(), dim=0)
        assert abs(math.cos(math.radians(angles["1.weight"])) - float(cosine)) < 1e-4
        net.zero_grad()
    for key, value in model.state_dict().items():
        assert torch.equal(before[key], value), key


def test_the_ceiling_is_that_of_any_model() -> None:
    class Own(nn.Module):
        """It keeps a tensor with a graph, and has a block whose way to the output is cut."""

        def __init__(self) -> None:
            super().__init__()
            self.hidden = FDFAConv2d(1, 4, 3, activation="relu")
            self.dropped = FDFAConv2d(4, 2, 1, activation="tanh")
            self.output = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = F.dropout(self.hidden(x), 0.5, self.training)
            self.penalty = h.abs().mean()
            lost = self.dropped(h).argmax(1, keepdim=True)
            return self.output(h.mean((2, 3)) + 0 * lost.mean(dtype=h.dtype))

    torch.manual_seed(0)
    x, y = torch.randn(8, 1, 7, 5), torch.randint(3, (8,))
    model = FDFA(Own(), patch=2, example_input=x)
    assert not mean_jacobian(model, x)["dropped"].any()
    angles = feedback_ceiling(model, (x, y), patch=2)
    assert angles["output.weight"] < 1e-3  # exact, by the same mask
    assert angles["dropped.weight"] == 90.0
    assert 0 < angles["hidden.weight"] < 60
    assert gradient_alignment(model, (x, y))["output.weight"] < 1e-3
    assert not mean_jacobian(model, x[:0])["hidden"].any()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_rule_can_predict_the_tangent_from_the_patches(size: int) -> None:
    """Of a linear net whose B is right, Σ B u over all pixels is the tangent."""
    torch.manual_seed(0)
    seen: list[tuple[Tensor, Tensor]] = []

    class Predicts(ForwardFeedback):
        def feedback_gradients(self, blocks: Any) -> Any:
            predicted = sum((b.perturbation * b.pixels**2) @ b.feedback.t() for b in blocks)
            seen.append((predicted, blocks[0].tangent))
            return [torch.zeros_like(b.feedback) for b in blocks]

    x = torch.randn(6, 1, 7, 5)
    model = FDFA(linear_net(), method=Predicts(), patch=size, example_input=x)
    for name, jacobian in mean_jacobian(model, x).items():
        model.feedback[name].copy_(means_of(jacobian, size))
    F.cross_entropy(model(x), torch.zeros(6, dtype=torch.int64)).backward()
    torch.testing.assert_close(*seen[0], rtol=1e-4, atol=1e-4)
