"""What cannot be trained is refused by name, with a remedy, and changes nothing."""

import copy
from typing import Any

import pytest
import torch
from nets import Times, make, mlp
from torch import Tensor, nn

from fdfa_ext import FDFA, FDFABlock, FDFALinear
from fdfa_ext.dual_pass import BACKENDS
from fdfa_ext.methods import ForwardFeedback


class Drop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach() * 2


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = FDFALinear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


@pytest.mark.parametrize(
    ("net", "error", "message"),
    [
        (
            nn.Linear(6, 3),
            ValueError,
            'FDFA: the module has no block; give at="auto" and an example_input',
        ),
        (FDFALinear(6, 3), ValueError, r"FDFA: the module is itself a block \(FDFALinear\)"),
        (
            FDFA(nn.Sequential(FDFALinear(6, 4), nn.Linear(4, 3))),
            ValueError,
            "FDFA: the module has an FDFA within it; wrap it once",
        ),
        (Unused(), RuntimeError, "FDFA: the output has no tangent. No module dropped it"),
        (
            nn.Sequential(FDFALinear(6, 4), Drop(), nn.Linear(4, 3)),
            RuntimeError,
            r"FDFA: the output has no tangent. Module '1' \(Drop\) dropped it",
        ),
        (
            nn.Sequential(FDFALinear(6, 4), FDFABlock(nn.ReLU(), Drop()), nn.Linear(4, 3)),
            RuntimeError,
            r"FDFA: block or point '1': its module 1 \(Drop\) dropped the tangent",
        ),
        (
            nn.Sequential(FDFALinear(6, 4), nn.Linear(4, 3), nn.Unflatten(1, (3, 1, 1, 1, 1))),
            ValueError,
            r"FDFA: the output must be \[N, K\].*; got \[2, 3, 1, 1, 1, 1\]",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(net: nn.Module, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        FDFA(net, example_input=torch.randn(2, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"feedback": "sgd"},
            "FDFA: feedback must be one of ema, adam, grad, or a FeedbackUpdate, not its class; got 'sgd'",
        ),
        ({"noise": "cauchy"}, "FDFA: noise must be one of gaussian, rademacher; got 'cauchy'"),
        ({"backend": "triton"}, "FDFA: backend must be one of fused, reference; got 'triton'"),
        ({"feedback": "ema", "feedback_lr": 1.5}, r"FDFA: feedback_lr must be in \(0, 1\)"),
        ({"feedback_lr": "1e-3"}, "FDFA: feedback_lr must be a number; got '1e-3'"),
        ({"betas": (0.9, "0.99")}, "FDFA: betas must be a number; got '0.99'"),
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


def test_a_module_that_drops_the_tangent_of_some_blocks_is_warned_of() -> None:
    net = nn.Sequential(FDFALinear(6, 4), Drop(), FDFALinear(4, 4), nn.Linear(4, 3))
    with pytest.warns(UserWarning, match=r"FDFA: module '1' \(Drop\) drops the tangent"):
        FDFA(net, example_input=torch.randn(2, 6))


@pytest.mark.parametrize("factor", [0.0, 1e38])
@pytest.mark.parametrize("rule", ["adam", "ema", "grad"])
def test_feedback_that_never_moves_is_said(rule: str, factor: float) -> None:
    """Its tangent is zero, or overflows."""
    last = nn.Linear(4, 3)
    net = nn.Sequential(FDFALinear(6, 4, activation="tanh"), Times(factor), nn.Tanh(), last)
    x = torch.randn(2, 6)
    model = FDFA(net, feedback=rule, feedback_lr=0.1, example_input=x)
    parameters = [*last.parameters(), *model.feedback_parameters()]
    message = "feedback has not moved in 31 training forwards; it is that of block or point '0'"
    with pytest.warns(UserWarning, match=message):
        take_steps(model, torch.optim.SGD(parameters, lr=0.1), x)


def take_steps(model: FDFA, optimizer: torch.optim.Optimizer, x: Tensor, steps: int = 40) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def test_feedback_that_no_optimizer_has_is_said() -> None:
    x = torch.randn(2, 6)
    model = FDFA(mlp(), feedback="grad", example_input=x)
    with pytest.warns(
        UserWarning, match=r"not moved in 31 training forwards; .* model\.feedback_parameters\(\)"
    ):
        take_steps(model, torch.optim.SGD(model.module.parameters(), lr=0.1), x)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rule", ["adam", "ema", "grad"])
def test_feedback_that_moves_or_is_not_asked_to_is_not_talked_of(rule: str) -> None:
    x = torch.randn(2, 6)
    model = FDFA(mlp(), feedback=rule, feedback_lr=0.1, example_input=x)
    take_steps(model, torch.optim.SGD(model.parameters(), lr=0.1), x)
    model = FDFA(mlp(), feedback=rule, feedback_lr=0.1, example_input=x)
    layers = [FDFALinear(6, 6, activation="tanh") for _ in range(20)]
    model = FDFA(nn.Sequential(*layers, nn.Linear(6, 3)), feedback=rule, example_input=x)
    saved = copy.deepcopy(model.state_dict())
    for step in range(40):
        model(x)
        if step == 1:
            model.load_state_dict(saved)  # changes each of the parameters, once


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum()


class ToMeta(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to("meta")


@pytest.mark.parametrize(("last", "got"), [(Sum(), "a single number"), (ToMeta(), "a tensor on meta")])
def test_a_block_that_returns_no_features_is_refused(last: nn.Module, got: str) -> None:
    net = nn.Sequential(FDFALinear(6, 4), FDFABlock(nn.Linear(4, 4), last), nn.Linear(4, 3))
    with pytest.raises(TypeError, match=rf"block '1' must return features .* got {got}"):
        FDFA(net, example_input=torch.randn(2, 6))


def test_parameters_between_blocks_are_refused_since_they_would_not_learn() -> None:
    net = nn.Sequential(FDFALinear(6, 4), nn.LayerNorm(4), FDFALinear(4, 4), nn.Linear(4, 3))
    model = FDFA(net)
    for run in (model, lambda x: FDFA(net, example_input=x)):
        with pytest.raises(
            RuntimeError, match=r"the input of block '2' depends on parameters .* FDFABlock"
        ):
            run(torch.randn(2, 6))


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


def test_an_activation_changed_in_place_behind_a_block_is_an_error_not_a_wrong_gradient() -> None:
    net = nn.Sequential(FDFALinear(6, 4, activation="relu"), nn.Dropout(inplace=True), nn.Linear(4, 3))
    model = FDFA(net, example_input=torch.randn(2, 6))
    with pytest.raises(RuntimeError, match=r"FDFA: the output of block '0' was changed in place"):
        model(torch.randn(2, 6))


@pytest.mark.parametrize("block", [FDFALinear(6, 6), FDFABlock(nn.Linear(6, 6), nn.Tanh())])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            torch.tensor(1.0),
            TypeError,
            r"block '0' takes a tensor of samples \[N, \*\]; got a single n",
        ),
        ([1.0], TypeError, r"block '0' takes a tensor of samples \[N, \*\]; got list"),
        (torch.ones(2, 6, device="meta"), RuntimeError, "block '0' is on the meta device, without va"),
    ],
)
def test_an_input_without_samples_or_values_is_refused_by_name(block, x, error, message) -> None:
    model = FDFA(nn.Sequential(block, nn.Linear(6, 3)), example_input=torch.ones(2, 6))
    with pytest.raises(error, match=message):
        model(x)
    assert model.noise_state[1] == 0


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


class Pair(Unused):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.block(x)), x


class Turned(nn.Module):
    """Features first, and the batch first again behind the block."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = FDFABlock(nn.Linear(6, 4), Transpose()), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).t())


class Transpose(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.t()


@pytest.mark.parametrize("method", ["dfa", "dkp"])
@pytest.mark.parametrize(
    ("net", "error", "message"),
    [
        (Pair(), TypeError, "FDFA: the module must return one tensor; got tuple"),
        (
            Turned(),
            ValueError,
            r"FDFA: block or point 'block' must keep the batch first: expected \[2, \*feat",
        ),
        (Unused(), RuntimeError, "FDFA: block 'block' was not used by the forward pass"),
    ],
)
def test_methods_without_tangents_refuse_by_name_too(
    net: nn.Module, error: type, message: str, method: str
) -> None:
    with pytest.raises(error, match=message):
        FDFA(net, method=method, example_input=torch.randn(2, 6))


class MayDrop(Drop):
    drops = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.drops else 2 * x


def test_a_module_that_drops_the_tangent_later_is_refused_then() -> None:
    net = nn.Sequential(FDFALinear(6, 4), MayDrop(), nn.Linear(4, 3))
    model = FDFA(net, example_input=torch.randn(2, 6))
    model(torch.randn(2, 6))
    net[1].drops = True
    with pytest.raises(RuntimeError, match=r"Module '1' \(MayDrop\) dropped it"):
        model(torch.randn(2, 6))


class Doubles(nn.Module):
    """Takes a tuple and returns a dict."""

    def forward(self, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {"y": 2 * inputs[0]}


class DropsNamed(nn.Module):
    """Takes a dict."""

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return inputs["y"].detach()


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.doubles, self.drops = FDFALinear(6, 4), Doubles(), DropsNamed()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drops(self.doubles((self.block(x), x))))


def test_of_modules_of_any_arguments_the_one_that_drops_the_tangent_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"Module 'drops' \(DropsNamed\) dropped it"):
        FDFA(Inner(), example_input=torch.randn(2, 6))


def test_a_pool_whose_indices_would_get_lost_is_refused_by_name() -> None:
    """From the start, and when it is told later to return them."""
    x, pool = torch.randn(2, 1, 8, 8), nn.MaxPool2d(2)
    blocks = [FDFABlock(nn.Conv2d(1, 4, 3)), FDFABlock(nn.Conv2d(4, 4, 1), nn.GELU(), pool)]
    net = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(36, 3))
    model = FDFA(net, example_input=x)
    pool.return_indices = True
    for refused in (lambda: model(x), lambda: FDFA(net, example_input=x)):
        with pytest.raises(
            TypeError, match=r"block or point '1': its module 2 \(MaxPool2d\) returned a tuple"
        ):
            refused()


def test_weight_perturbation_needs_an_output_with_a_tangent() -> None:
    model = FDFA(nn.Sequential(FDFALinear(6, 3), Drop()), method="fg-w")
    with pytest.raises(RuntimeError, match="FDFA: the output has no tangent: a module detached it"):
        model(torch.randn(2, 6))


def test_a_local_head_of_other_sizes_is_refused_by_name() -> None:
    net = nn.Sequential(FDFALinear(6, 4), FDFALinear(4, 4), nn.Linear(4, 3))
    model = FDFA(net, method="lg-fg-a", example_input=torch.randn(2, 6))
    net[2] = nn.Linear(4, 5)
    with pytest.raises(ValueError, match="FDFA: block '0': its local head makes 3 outputs of 4 feat"):
        model(torch.randn(2, 6))


def test_feedback_in_another_memory_order_is_refused_by_name() -> None:
    """As one that was replaced by hand: loading a state puts it in order."""
    model = make("conv_net")
    matrix = model.feedback["2"]
    matrix.data = matrix.data.contiguous(memory_format=torch.contiguous_format)
    with pytest.raises(
        ValueError, match=r"FDFA: block '2': its feedback must lie in torch\.channels_last"
    ):
        model(torch.randn(2, 1, 12, 12))


def test_a_batch_that_local_heads_refuse_leaves_the_noise() -> None:
    net = nn.Sequential(
        FDFABlock(nn.Conv2d(1, 3, 3), nn.Tanh()),
        FDFABlock(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4)),
        nn.Linear(4, 2),
    )
    model = FDFA(net, method="lg-fg-a", example_input=torch.randn(2, 1, 5, 5))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"local head makes 2 outputs of 27 features, but .* 75 features"
    ):
        model(torch.randn(2, 1, 7, 7))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["fdfa", "dfa", "fg-a", "lg-fg-a"])
@pytest.mark.parametrize("block", [FDFALinear(1, 1), FDFABlock(nn.Linear(1, 1), nn.Tanh())])
def test_a_sample_without_its_batch_is_refused_and_the_next_batch_trained(
    block: nn.Module, method: str, backend: str
) -> None:
    """Also by the first forward, which looks at the net."""
    net = nn.Sequential(copy.deepcopy(block), FDFALinear(1, 1), nn.Linear(1, 2))
    model = FDFA(net, method=method, backend=backend)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"fdfa::\w+: [xy] must be \[N, \*.*; got \[1\]"):
            model(torch.randn(1))
        assert model.noise_state[1] == model.noise_state[2] == 0
    model(torch.randn(4, 1)).sum().backward()


@pytest.mark.parametrize("at", [None, "auto"])
def test_what_a_forward_on_example_input_raises_says_so(at: str | None) -> None:
    """As for what a loader yields, with its targets."""
    net = nn.Sequential(FDFALinear(6, 6), nn.Linear(6, 3)) if at is None else mlp()
    with pytest.raises((TypeError, AttributeError)) as raised:
        FDFA(net, at=at, example_input=[torch.randn(4, 6), torch.zeros(4)])
    assert at is None or "raised by the forward on example_input" in raised.value.__notes__[-1]


def test_a_summary_takes_inputs_as_example_input_has_them() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = FDFALinear(6, 6), nn.Linear(6, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.head(self.block(a + b))

    a, b = torch.randn(2, 4, 6)
    model = FDFA(Two(), example_input={"a": a, "b": b})
    assert model.summary({"a": a, "b": b}) == model.summary((a, b)) == model.summary(a, b=b)
    with pytest.raises(TypeError, match=r"takes the inputs of Two\.forward, as model\.summary\(x\)"):
        model.summary()
