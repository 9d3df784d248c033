"""What users add: methods by name, rules of all blocks, feedback updates, JVP rules."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import mlp, step
from torch import Tensor, nn

from fdfa_ext import (
    FDFA,
    FDFABlock,
    FDFAConv2d,
    FDFALinear,
    FeedbackUpdate,
    jvp,
    methods,
    register_jvp,
    register_method,
)
from fdfa_ext.methods import BlockMethod, BlockStep, ForwardFeedback


@pytest.fixture(autouse=True)
def _registers_are_put_back() -> Iterator[None]:
    kept = [jvp.MODULE_RULES, jvp.FORWARD_FUNCTIONS, methods.METHODS]
    before = [dict(entries) for entries in kept]
    yield
    for entries, old in zip(kept, before, strict=True):
        entries.clear()
        entries.update(old)  # type: ignore[arg-type]
    jvp._REGISTERED.clear()


def test_a_registered_method_has_a_name() -> None:
    @register_method("mine")
    class Mine(BlockMethod):
        feedback = "fixed"

        def initialize(self, feedback: Tensor) -> None:
            nn.init.ones_(feedback)

        def delta(self, block: BlockStep) -> Tensor:
            return block.error @ block.feedback

    model = FDFA(mlp(), method="mine", example_input=torch.randn(5, 6))
    assert isinstance(model.method, Mine)
    assert model.feedback["0"].eq(1).all()
    with pytest.raises(ValueError, match="there is a method 'fdfa' already"):
        register_method("fdfa")(Mine)
    with pytest.raises(TypeError, match="must be a subclass of Method"):
        register_method("other")(nn.Linear)  # type: ignore[arg-type]


class Joint(ForwardFeedback):
    """FDFA by the lists of all blocks."""

    def deltas(self, blocks: Sequence[BlockStep]) -> Sequence[Tensor]:
        assert [block.name for block in blocks] == ["0", "1"]
        return [block.error @ block.feedback for block in blocks]

    def feedback_gradients(self, blocks: Sequence[BlockStep]) -> Sequence[Tensor]:
        d = blocks[0].tangent
        return [block.feedback - d.t() @ block.perturbation / len(d) for block in blocks]


class Plain(FeedbackUpdate):
    """The running average of feedback="ema", as an update of one's own, which counts its steps."""

    def create(self, name: str, feedback: Tensor) -> None:
        self.register_buffer(name, torch.zeros_like(feedback))

    def step(self, name: str, feedback: Tensor, gradient: Tensor) -> None:
        assert gradient.stride() == feedback.stride()
        self.get_buffer(name).add_(1)
        feedback.sub_(0.3 * gradient)


def image_net() -> nn.Sequential:
    return nn.Sequential(
        FDFAConv2d(1, 3, 3, activation="relu"),
        nn.Sequential(FDFABlock(nn.Flatten(), nn.Linear(48, 5), nn.Tanh())),
        nn.Linear(5, 3),
    )


def trained(net: nn.Module, x: Tensor, **options: Any) -> FDFA:
    torch.manual_seed(4)
    model = FDFA(copy.deepcopy(net), **options)
    optimizer = torch.optim.SGD(model.module.parameters(), lr=0.1)
    for _ in range(3):
        step(model, optimizer, x, torch.arange(len(x)) % 3)
    return model


def test_lists_of_blocks_and_own_updates_train_as_the_built_in_ones() -> None:
    for net, x, blocks in [
        (mlp(), torch.randn(5, 6), ["0", "1"]),
        (image_net(), torch.randn(5, 1, 6, 6), ["0", "1.0"]),
    ]:
        expected = trained(net, x, feedback="ema", feedback_lr=0.3).state_dict()
        others = [trained(net, x, feedback=Plain())]
        if blocks == ["0", "1"]:
            others.append(trained(net, x, method=Joint(), feedback="ema", feedback_lr=0.3))
        for model in others:
            for key, value in expected.items():
                torch.testing.assert_close(
                    model.state_dict()[key], value, rtol=1e-4, atol=1e-5, msg=key
                )
        update = others[0].feedback_update
        assert update is not None
        for name in blocks:
            counted = update.get_buffer(name.replace(".", "/"))
            assert counted.eq(3).all()


def test_what_an_own_update_keeps_is_saved_and_comes_with_copies() -> None:
    x = torch.randn(5, 1, 6, 6)
    model = trained(image_net(), x, feedback=Plain())
    fresh = FDFA(image_net(), feedback=Plain())
    early = copy.deepcopy(fresh)  # before anything is kept
    fresh.load_state_dict(model.state_dict())
    fresh(x).sum().backward()
    for copied in (fresh, early):
        update = copied.feedback_update
        assert update is not None
        assert [name for name, _ in update.named_buffers()] == ["0", "1/0"]
    assert fresh.feedback_update.get_buffer("0").eq(4).all()  # type: ignore[union-attr]


def test_an_own_update_is_given_no_gradient_that_is_not_finite() -> None:
    model = trained(mlp(), torch.randn(5, 6), feedback=Plain())
    before = model.feedback["0"].clone()
    nn.init.constant_(model.module.get_parameter("1.weight"), torch.nan)
    model(torch.randn(5, 6)).sum().backward()
    torch.testing.assert_close(model.feedback["0"], before, rtol=0, atol=0)


# JVP rules.


class Cube(torch.autograd.Function):
    """Without a jvp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x**3 * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return 3 * x**2 * weight * grads[0], (x**3 * grads[0]).sum(0)


class Cubes(nn.Module):
    def __init__(self, learns: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), 0.5), requires_grad=learns)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Cube.apply(x, self.weight)
        return y


class TorchCubes(Cubes):
    """By functions that torch has a forward mode of."""

    def forward(self, x: Tensor) -> Tensor:
        return x**3 * self.weight


class Own(nn.Module):
    def __init__(self, cubes: nn.Module) -> None:
        super().__init__()
        self.first, self.cubes = FDFALinear(6, 4, activation="tanh"), cubes
        self.second, self.out = FDFALinear(4, 4, activation="tanh"), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        return self.out(self.second(first + self.cubes(first)))


def nets(kind: type[Cubes]) -> list[nn.Module]:
    """Between blocks, within one, in a module within one, and in a forward of one's own."""
    torch.manual_seed(6)
    first, out = FDFALinear(6, 4, activation="tanh"), nn.Linear(4, 3)
    wrap = nn.Sequential(nn.Linear(4, 4), kind(True))
    return [
        copy.deepcopy(net)
        for net in (
            nn.Sequential(first, kind(), out),
            nn.Sequential(first, FDFABlock(nn.Linear(4, 4), kind(True), nn.Tanh()), out),
            nn.Sequential(first, FDFABlock(Residual(wrap)), out),
            Own(kind()),
        )
    ]


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_registered_rule_is_asked_wherever_the_module_is_called(hooked: bool) -> None:
    asked = []

    @register_jvp(Cubes)
    def rule(module: Any, x: Tensor, tangent: Tensor | None) -> Any:
        asked.append(x)
        weight = module.weight.detach()
        return module(x), 3 * x.detach() ** 2 * weight * tangent

    x = torch.randn(5, 6)
    for net, plain in zip(nets(Cubes), nets(TorchCubes), strict=True):
        if hooked:
            for module in net.modules():
                module.register_forward_hook(lambda *_: None)
        asked.clear()
        models = [trained(n, x, feedback="ema", feedback_lr=0.3, example_input=x) for n in (net, plain)]
        assert len(asked) >= 4
        theirs = models[1].state_dict()
        for key, value in models[0].state_dict().items():
            torch.testing.assert_close(value, theirs[key], msg=key)
        assert not [m for m in models[0].modules() if "forward" in vars(m)]
        torch.testing.assert_close(models[0].eval()(x), models[1].eval()(x))


def test_a_rule_that_comes_between_two_steps_is_asked_in_the_second() -> None:
    model = FDFA(nets(TorchCubes)[3], example_input=torch.randn(5, 6))
    model(torch.randn(5, 6)).sum().backward()
    asked = []

    @register_jvp(TorchCubes)
    def rule(module: Any, x: Tensor, tangent: Tensor | None) -> Any:
        asked.append(x)
        return module(x), tangent

    model(torch.randn(5, 6)).sum().backward()
    assert len(asked) == 1


def test_bad_rules_are_refused_by_name() -> None:
    for result in (lambda y: None, lambda y: y[:2], lambda y: y * nn.Parameter(torch.ones(()))):
        jvp.MODULE_RULES.pop(Cubes, None)

        @register_jvp(Cubes)
        def rule(module: Any, x: Tensor, tangent: Any, result: Any = result) -> Any:
            return module(x), result(tangent)

        with pytest.raises(RuntimeError, match="the JVP rule of Cubes must return a tangent"):
            FDFA(nets(Cubes)[0])(torch.randn(5, 6))
    with pytest.raises(ValueError, match="Cubes has a JVP rule"):
        register_jvp(Cubes)
    with pytest.raises(ValueError, match="ReLU has a JVP rule"):
        register_jvp(nn.ReLU)
    with pytest.raises(TypeError, match="that of a module class"):
        register_jvp(F.relu)  # type: ignore[arg-type]


class Returns(ForwardFeedback):
    """FDFA, but for what its functions are made to return."""

    def __init__(self, change: dict[str, Any]) -> None:
        self.change = change

    def delta(self, block: BlockStep) -> Tensor:
        return self.change.get("delta", lambda t: t)(super().delta(block))

    def feedback_gradient(self, block: BlockStep) -> Tensor:
        return self.change.get("feedback_gradient", lambda t: t)(super().feedback_gradient(block))

    def deltas(self, blocks: Sequence[BlockStep]) -> Sequence[Tensor]:
        return self.change.get("deltas", lambda t: t)(super().deltas(blocks))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"delta": lambda t: t.t()},
            r"delta of Returns must return \[5, 7\] for block '0'; got \[7, 5\]",
        ),
        ({"delta": lambda t: None}, "delta of Returns must return .* got NoneType"),
        ({"delta": lambda t: t.unflatten(1, (-1, 1))}, r"must return \[5, 7\] .* got \[5, 7, 1\]"),
        (
            {"feedback_gradient": lambda t: t.t()},
            r"feedback_gradient of Returns must return \[3, 7\] for block '0'; got \[7, 3\]",
        ),
        ({"deltas": lambda found: found[:1]}, "deltas of Returns must return one tensor a block"),
    ],
)
def test_a_rule_that_returns_another_shape_is_refused(change: dict[str, Any], message: str) -> None:
    """A transposed matrix has as many elements, and would train something else."""
    x = torch.randn(5, 6)
    net = nn.Sequential(FDFALinear(6, 7), FDFALinear(7, 7), nn.Linear(7, 3))
    model = FDFA(net, method=Returns(change), example_input=x)
    with pytest.raises(ValueError, match=message):
        model(x).sum().backward()


@pytest.mark.parametrize("read", ["tangent", "perturbation", "feedback", "output"])
def test_a_rule_that_reads_what_it_has_not_asked_for_is_told_what_to_set(read: str) -> None:
    class Reads(BlockMethod):
        def delta(self, block: BlockStep) -> Tensor:
            return getattr(block, read)

    model = FDFA(mlp(), method=Reads(), example_input=torch.randn(5, 6))
    with pytest.raises(RuntimeError, match=f"block '0' has no {read} in this step; .* needs "):
        model(torch.randn(5, 6)).sum().backward()


def test_what_a_method_lacks_or_misspells_is_said() -> None:
    class Empty(BlockMethod):
        pass

    class Misspelt(ForwardFeedback):
        feedback = "learnt"

    model = FDFA(mlp(), method=Empty(), example_input=torch.randn(5, 6))
    with pytest.raises(NotImplementedError, match="Empty must define delta"):
        model(torch.randn(5, 6)).sum().backward()
    with pytest.raises(ValueError, match="feedback of Misspelt must be one of none, fixed, learned"):
        FDFA(mlp(), method=Misspelt())
    with pytest.raises(ValueError, match="or a FeedbackUpdate, not its class"):
        FDFA(mlp(), feedback=FeedbackUpdate)  # type: ignore[arg-type]


def test_the_rate_of_an_own_update_is_its_own() -> None:
    class Still(FeedbackUpdate):
        def step(self, name: str, feedback: Tensor, gradient: Tensor) -> None:
            """Nothing moves."""

    model = FDFA(mlp(), feedback=Still(), example_input=torch.randn(5, 6))
    with pytest.raises(ValueError, match="feedback_lr has no effect on Still"):
        model.feedback_lr = 0.1
    assert "feedback=Still" in repr(model)
    for update in (None, Still()):
        with pytest.raises(AttributeError, match="feedback_update cannot be changed"):
            model.feedback_update = update


def test_a_jvp_rule_returns_a_pair() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    @register_jvp(Doubled)
    def rule(module: Any, x: Tensor, tangent: Tensor) -> Any:
        return module(x)

    net = nn.Sequential(FDFALinear(6, 7), Doubled(), nn.Linear(7, 3))
    with pytest.raises(TypeError, match="the JVP rule of Doubled must return a pair"):
        FDFA(net, example_input=torch.randn(5, 6))
