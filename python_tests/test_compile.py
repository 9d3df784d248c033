"""torch.compile of the training step: no graph break, the eager result for the same noise."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import slow_but
from nets import NETS, batch, step
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fdfa_ext import FDFA, FDFABlock, FDFALinear
from fdfa_ext.feedback import FeedbackUpdate
from fdfa_ext.methods import KolenPollack

# Each net and each rule.
EACH_ONCE = [(*pair, "aot_eager") for pair in zip(NETS, ("grad", "ema", "adam"), strict=True)]
# inductor compiles slowly: the README's net stands for all.
COMPILED = [*EACH_ONCE, *(("conv_net", rule, "inductor") for rule in ("adam", "grad"))]


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


class Tower(nn.Module):
    """Residual blocks as user code has them, with a norm first."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Linear(16, width)
        bodies = [(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU()) for _ in range(2)]
        self.bodies = nn.ModuleList(nn.Sequential(*body) for body in bodies)
        self.head = nn.Linear(width, 3)

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for body in self.bodies:
            x = x + body(x)
        return x

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x))


class OwnLoss(Tower):
    """Returns a dict of a loss of its own, of logits and of a hidden layer, on which the loss is too."""

    def forward(self, x: Tensor) -> Any:
        hidden = self.features(x)
        logits = self.head(hidden)
        loss = F.cross_entropy(logits, torch.arange(len(x), device=x.device) % 3)
        return {"loss": loss + hidden.square().mean(), "logits": logits, "hidden": hidden}


class Siamese(Tower):
    """Uses each layer twice."""

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x) * self.features(x.flip(0)).tanh())


class Tokens(Tower):
    """Has an output for each of four tokens."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.unsqueeze(1) * torch.arange(1.0, 5.0, device=x.device).view(1, 4, 1))


class Pixels(nn.Module):
    """Has an output for each pixel, and hidden layers of fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 2, 2)
        self.up, self.head = nn.ConvTranspose2d(6, 4, 2, 2), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.first(x.view(-1, 1, 4, 4)))
        return self.head(torch.cat([x, torch.relu(self.up(torch.relu(self.down(x))))], 1))


def its_loss(result: Any) -> Tensor:
    if isinstance(result, dict):
        loss: Tensor = result["loss"]
        return loss
    classes = result.shape[1:2] + result.shape[2:] if result.dim() == 4 else result.shape[-1:]
    rows = result if result.dim() == 4 else result.view(-1, *classes)
    return F.cross_entropy(
        rows, torch.arange(rows[:, 0].numel(), device=rows.device).view_as(rows[:, 0]) % 3
    )


def train(forward: Any, model: FDFA, x: Tensor, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        its_loss(forward(x)).backward()
        optimizer.step()


def assert_same_state(model: FDFA, expected: FDFA) -> None:
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-3, atol=1e-5, msg=key)


def compiled(model: FDFA, compiler: str = "aot_eager") -> Any:
    return torch.compile(model, fullgraph=True, dynamic=False, backend=compiler)


AT: list[tuple[type[nn.Module], Any, str, str]] = [
    (Tower, "auto", "fdfa", "aot_eager"),
    (Tower, [nn.Linear, "bodies.0"], "fdfa", "aot_eager"),
    (Tower, lambda name, module: isinstance(module, nn.Sequential), "dkp", "aot_eager"),
    (Tower, "auto", "lg-fg-a", "aot_eager"),
    (OwnLoss, "auto", "fdfa", "aot_eager"),
    (OwnLoss, "auto", "dfa", "aot_eager"),
    (OwnLoss, "auto", "fdfa", "inductor"),
    (Siamese, "auto", "fdfa", "aot_eager"),
    (Tokens, "auto", "fdfa", "aot_eager"),
    (Pixels, "auto", "fdfa", "aot_eager"),
]


@pytest.mark.parametrize(("kind", "at", "method", "compiler"), slow_but(AT, AT[0], AT[4]))
@pytest.mark.filterwarnings(
    "ignore:FDFA. .*keeps a hidden activation", "ignore:FDFA. no parameter learns by"
)
def test_points_compile(
    device: torch.device, kind: type[nn.Module], at: Any, method: str, compiler: str
) -> None:
    """Also where an eager step comes between, for which the module has no hook in its way."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    net, x = kind().to(device), torch.randn(6, 16, device=device)
    eager = FDFA(net, at=at, method=method, feedback_lr=0.05, example_input=x)
    model = copy.deepcopy(eager)
    forward = compiled(model, compiler)
    train(eager, eager, x, 4)
    for step_forward in (forward, model, forward, forward):
        train(step_forward, model, x, 1)
    assert_same_state(model, eager)


def test_a_net_with_compiled_points_is_copied_saved_and_used_alone() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(6, 16)
    model = FDFA(Tower(), at="auto", feedback_lr=0.05, example_input=x)
    plain = copy.deepcopy(model.module)
    train(compiled(model), model, x)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    train(model, model, x)
    for twin in twins:
        train(compiled(twin), twin, x)
        assert_same_state(twin, model)
    plain.load_state_dict(model.module.state_dict())
    for net in (plain, model.module, copy.deepcopy(model.module)):
        net.zero_grad()
        net(x).square().sum().backward()
    for a, b in zip(plain.parameters(), model.module.parameters(), strict=True):
        assert b.grad is not None
        torch.testing.assert_close(a.grad, b.grad)


def test_a_copy_of_a_model_that_compiled_itself_trains_itself() -> None:
    torch._dynamo.reset()
    x = torch.randn(6, 16)
    model = FDFA(Tower(), at="auto", example_input=x)
    model.compile(backend="aot_eager", dynamic=False)
    train(model, model, x, 1)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        train(twin, twin, x, 1)
        assert (model.noise_state[1], twin.noise_state[1]) == (1, 2)


def test_a_point_stands_before_hooks_that_came_after_it() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(6, 16)
    model = FDFA(Tower(), at=["stem", "bodies.0"], feedback_lr=0.05, example_input=x)
    eager = copy.deepcopy(model)
    forward = compiled(model)
    train(forward, model, x, 1)
    train(eager, eager, x, 1)
    for each in (model, eager):
        each.module.bodies[0].register_forward_hook(lambda m, args, y: y * 3, prepend=True)
    train(forward, model, x[:5])  # which is traced anew
    train(eager, eager, x[:5])
    assert_same_state(model, eager)


def test_hooks_of_models_that_are_gone_go_too() -> None:
    x, net = torch.randn(6, 16), Tower()
    for _ in range(3):
        torch._dynamo.reset()
        model = FDFA(net, at=["stem"], example_input=x)
        compiled(model)(x)
        network = weakref.ref(model.network)
        del model
    torch._dynamo.reset()
    gc.collect()
    assert network() is None
    assert len(net.stem._forward_hooks) == 1


class OwnUpdate(FeedbackUpdate):
    def step(self, name: str, feedback: Tensor, gradient: Tensor) -> None:
        feedback.sub_(0.1 * gradient)


def test_an_update_of_ones_own_is_refused_for_compiled_points() -> None:
    torch._dynamo.reset()
    x = torch.randn(6, 16)
    model = FDFA(Tower(), at="auto", feedback=OwnUpdate(), example_input=x)
    with pytest.raises(Exception, match="cannot train a model with points or output= by a method"):
        torch.compile(model, dynamic=False, backend="aot_eager")(x)


@pytest.mark.slow
def test_two_models_of_one_net_compile_each_with_points_of_its_own() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    x, net = torch.randn(6, 16), Tower()
    pair = (
        FDFA(net, at="auto", feedback_lr=0.05, example_input=x),
        FDFA(net, at=[nn.Sequential], method="dfa", example_input=x),
    )
    eager = copy.deepcopy(pair)
    forwards = [*map(compiled, pair)]
    for i in (0, 1, 0):
        train(forwards[i], pair[i], x)
        train(eager[i], eager[i], x)
    for model, expected in zip(pair, eager, strict=True):
        assert_same_state(model, expected)


def test_a_module_exchanged_at_a_point_is_said_to_the_compiler() -> None:
    torch._dynamo.reset()
    x = torch.randn(6, 16)
    model = FDFA(Tower(), at=["bodies.0"], example_input=x)
    forward = compiled(model)
    train(forward, model, x)
    model.module.bodies[0] = nn.Linear(8, 8)
    with pytest.raises(Exception, match="FDFA: blocks were exchanged since the last training forward"):
        forward(x)
    train(model, model, x, 1)
    moments = {name: moment.clone() for name, moment in model.exp_avg.items()}
    train(forward, model, x, 1)
    assert all(not moment.equal(moments[name]) for name, moment in model.exp_avg.items())


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
            *((method, "aot_eager") for method in ("dfa", "dkp", "fg-a", "bp", OwnRule)),
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
