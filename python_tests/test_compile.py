"""torch.compile of the training step: no graph break, the eager result for the same noise."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from marks import slow_but
from nets import NETS, batch, step
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fdfa_ext import FDFA, FDFABlock, FDFALinear
from fdfa_ext.methods import METHODS, KolenPollack

# inductor compiles slowly: the README's net stands for all.
COMPILED = [(name, rule, "aot_eager") for name in NETS for rule in ("adam", "ema", "grad")]
COMPILED += [("conv_net", rule, "inductor") for rule in ("adam", "grad")]
# Each net and each rule.
EACH_ONCE = [(*pair, "aot_eager") for pair in zip(NETS, ("grad", "ema", "adam"), strict=True)]


@pytest.mark.parametrize(("name", "rule", "compiler"), slow_but(COMPILED, *EACH_ONCE))
def test_compiled_training_is_the_eager_one(
    device: torch.device, name: str, rule: str, compiler: str
) -> None:
    torch._dynamo.reset()
    x, y = batch(name, device)
    models = [FDFA(NETS[name][0]().to(device), feedback=rule, feedback_lr=0.05, example_input=x)]
    models.append(copy.deepcopy(models[0]))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in models]
    forwards = [models[0], torch.compile(models[1], fullgraph=True, backend=compiler)]
    for _ in range(3):
        losses = [step(f, opt, x, y) for f, opt in zip(forwards, optimizers, strict=True)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    for key, value in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[key], value, rtol=1e-3, atol=1e-5, msg=key)
    assert models[1].noise_state[1] == 3


class Residual(nn.Sequential):
    """x + body(x): user code, through which dual tensors go."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def image_net(norm: Callable[[int], nn.Module]) -> nn.Module:
    """A norm before the first noise, behind it, within user code, and after the last block."""
    first = FDFABlock(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 4, 3, padding=1), norm(4), nn.ReLU())
    inner = FDFABlock(nn.Conv2d(4, 4, 3, padding=1), norm(4), nn.Tanh())
    own = FDFABlock(Residual(nn.Conv2d(4, 4, 3, padding=1), norm(4), nn.ReLU()))
    return nn.Sequential(first, inner, own, norm(4), nn.Flatten(), nn.Linear(64, 3))


def dense_net(norm: Callable[[int], nn.Module]) -> nn.Module:
    first, inner = FDFABlock(nn.Linear(16, 6), norm(6)), FDFABlock(nn.Linear(6, 6), norm(6), nn.GELU())
    return nn.Sequential(
        first, inner, FDFABlock(Residual(norm(6), nn.Linear(6, 6))), norm(6), nn.Linear(6, 3)
    )


def transformer(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
    blocks = [FDFABlock(nn.Unflatten(1, (4, 4)), nn.Linear(4, 8)), FDFABlock(layer)]
    return nn.Sequential(*blocks, nn.LayerNorm(8), nn.Flatten(), nn.Linear(32, 3))


WITH_NORMS = {
    "BatchNorm1d": lambda: dense_net(nn.BatchNorm1d),
    "LayerNorm": lambda: dense_net(nn.LayerNorm),
    "RMSNorm": lambda: dense_net(nn.RMSNorm),
    "BatchNorm2d": lambda: image_net(nn.BatchNorm2d),
    "GroupNorm": lambda: image_net(lambda channels: nn.GroupNorm(2, channels)),
    "InstanceNorm": lambda: image_net(lambda channels: nn.InstanceNorm2d(channels, affine=True)),
    "post-norm": lambda: transformer(False),
    "pre-norm": lambda: transformer(True),
}


@pytest.mark.parametrize("name", slow_but([*WITH_NORMS], "LayerNorm", "GroupNorm", "pre-norm"))
def test_norms_and_attention_compile(device: torch.device, name: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = WITH_NORMS[name]().to(device)
    x, y = torch.randn(8, 16, device=device), torch.arange(8, device=device) % 3
    eager = FDFA(net, feedback_lr=0.05, example_input=x)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    for forward in (eager, compiled):
        optimizer = torch.optim.SGD(forward.parameters(), lr=0.05)
        for _ in range(3):
            step(forward, optimizer, x, y)
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-3, atol=1e-5, msg=key)


class Untraceable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return x * 2


def test_a_graph_break_within_the_network_is_said_and_spoils_no_later_step() -> None:
    torch._dynamo.reset()
    net = nn.Sequential(FDFALinear(6, 4), Untraceable(), nn.Linear(4, 3))
    x = torch.randn(5, 6)
    model = FDFA(net, example_input=x)
    with pytest.raises(RuntimeError, match=r"FDFA: torch\.compile broke the graph within a training"):
        torch.compile(model, backend="aot_eager")(x)
    model(x).sum().backward()
    assert all(b.any() for b in model.exp_avg.values())


class OwnRule(KolenPollack):
    """As every learned feedback but those of the fused operator, it moves by torch's fused Adam."""


@pytest.mark.parametrize(
    ("method", "compiler"),
    slow_but(
        [
            *((method, "aot_eager") for method in (*METHODS, OwnRule) if method != "fdfa"),
            *((method, "inductor") for method in ("fg-w", "fg-a", "lg-fg-a")),
        ],
        ("dkp", "aot_eager"),
        ("fg-a", "aot_eager"),
    ),
)
def test_every_method_compiles(
    device: torch.device, method: str | type[OwnRule], compiler: str
) -> None:
    """Local heads included, and noise that a compiler (inductor) would like to make in the backward alone."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    x, y = batch("block_net", device)
    net = NETS["block_net"][0]().to(device)
    way = method if isinstance(method, str) else method()
    models = [FDFA(net, method=way, feedback_lr=0.05, example_input=x)]
    models.append(copy.deepcopy(models[0]))
    fullgraph = isinstance(method, str)  # that Adam is beyond the compiler
    compiled = torch.compile(models[1], fullgraph=fullgraph, dynamic=False, backend=compiler)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in models]
    for _ in range(3):
        for model, forward, optimizer in zip(models, (models[0], compiled), optimizers, strict=True):
            optimizer.zero_grad()
            outputs = [forward(x), *model.local_outputs]
            sum(F.cross_entropy(output, y) for output in outputs).backward()
            optimizer.step()
    for key, value in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[key], value, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_compiled_step_keeps_outputs_that_a_module_changes_in_place(compiler: str) -> None:
    """Where an eager one can only say so, and the dry run has not: in eval mode dropout does nothing."""
    torch._dynamo.reset()
    x = torch.randn(4, 6)
    block = FDFALinear(6, 8, activation="tanh")
    model = FDFA(
        nn.Sequential(block, nn.Dropout(inplace=True), nn.Linear(8, 3)), method="dfa", example_input=x
    )
    output = torch.compile(model, fullgraph=True, dynamic=False, backend=compiler)(x)
    output.square().sum().backward()
    error = 2 * output.detach() @ model.feedback["0"]
    expected = (error * (1 - block(x).square())).t() @ x
    torch.testing.assert_close(block.weight.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        *(("fused", {"feedback": rule}) for rule in ("adam", "ema")),
        *slow_but([("reference", {"feedback": "adam"})]),
        ("fused", {"method": "dkp"}),  # torch cannot compile it on the reference
    ],
    ids=str,
)
def test_a_schedule_of_the_feedback_rate_needs_no_new_graph(backend: str, options: dict) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    x, y = batch("mlp")
    model = FDFA(NETS["mlp"][0](), backend=backend, example_input=x, **options)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    counts = []
    for rate in (0.1, 0.05, 0.02, 0.01, 0.0):
        for each, forward in ((eager, eager), (model, compiled)):
            each.feedback_lr = rate
            F.cross_entropy(forward(x), y).backward()
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 5
    for name, matrix in eager.feedback.items():
        torch.testing.assert_close(model.feedback[name], matrix, rtol=1e-4, atol=1e-6)


def test_compiling_without_feedback_matrices_is_refused() -> None:
    x, _ = batch("mlp")
    model = torch.compile(FDFA(NETS["mlp"][0]()), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="give example_input, or run one training forward"):
        model(x)


def test_another_batch_size_compiles_again_with_static_shapes() -> None:
    """torch's forward mode knows no symbolic sizes, hence dynamic=False."""
    torch._dynamo.reset()
    x, _ = batch("conv_net", n=6)
    model = FDFA(NETS["conv_net"][0](), example_input=x)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    for n in (6, 4):
        for forward in (eager, compiled):
            forward(x[:n]).sum().backward()
    for a, b in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
