"""State: saved and loaded in any form, shared with optimizers and copies made before it exists."""

import copy
import io
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import slow_but
from nets import NETS, batch, block_net, conv_net, make, mlp, step
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fdfa_ext import FDFA, FDFABlock, FDFALinear, FeedbackUpdate

KEPT = ("feedback.", "exp_avg.", "exp_avg_sq.")  # in float32, whatever the weights are


def losses(model: Any, x: Tensor, y: Tensor) -> Tensor:
    output = model(x)
    inner = next(module for module in model.modules() if isinstance(module, FDFA))
    return sum(F.cross_entropy(o, y) for o in (output, *inner.local_outputs))


def train(model: nn.Module, name: str, steps: int, optimizer: Any = None) -> Any:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(steps)
    batches = [batch(name) for _ in range(steps)]
    for x, y in batches:
        optimizer.zero_grad()
        losses(model, x, y).backward()
        optimizer.step()
    return optimizer


def one_pixel_net() -> nn.Sequential:
    """A block whose B [K, C, 1, 1] has a choice of strides; [N, 1, 12, 12] → [N, 3]."""
    return nn.Sequential(
        FDFABlock(nn.Conv2d(1, 4, 12), nn.Tanh()),
        FDFABlock(nn.Conv2d(4, 5, 1), nn.Tanh()),
        nn.Flatten(),
        nn.Linear(5, 3),
    )


def same_state(a: nn.Module, b: nn.Module) -> None:
    states = a.state_dict(), b.state_dict()
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


CHANGES: dict[str, Callable[[str, Tensor], Tensor]] = {
    "as it is": lambda key, t: t.clone(),
    "row-major": lambda key, t: t.clone(memory_format=torch.contiguous_format),
    "channels_last": lambda key, t: (
        t.clone(memory_format=torch.channels_last) if key.startswith(KEPT) and t.dim() == 4 else t
    ),
    "float64": lambda key, t: t.double() if key.startswith(KEPT) else t,
    "bfloat16": lambda key, t: t.bfloat16() if key.startswith(KEPT) else t,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("into", slow_but(["fresh", "with example", "running"], "fresh", "running"))
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("conv_net", {"feedback": "adam"}),
        ("block_net", {"feedback": "grad"}),
        ("one_pixel", {"feedback": "adam"}),
        ("block_net", {"method": "lg-fg-a"}),
        ("mlp", {"method": "dkp", "feedback": "ema"}),
    ],
    ids=str,
)
def test_a_state_in_any_form_goes_on_as_the_model_it_came_from(
    name: str, options: dict, assign: bool, into: str, change: str
) -> None:
    """The same bits where the dtype holds them; with bfloat16 those of the rounded feedback."""
    make, data = (one_pixel_net, "conv_net") if name == "one_pixel" else (NETS[name][0], name)
    trained = FDFA(make(), feedback_lr=0.05, **options)
    train(trained, data, 2)
    state = {key: CHANGES[change](key, t).clone() for key, t in trained.state_dict().items()}
    example = None if into == "fresh" else batch(data)[0]
    model = FDFA(make(), feedback_lr=0.05, **options, example_input=example)
    if into == "running":
        train(model, data, 1)
    model.load_state_dict(state, assign=assign)
    if change == "bfloat16":
        rounded = {k: t.bfloat16().float() if k.startswith(KEPT) else t for k, t in state.items()}
        trained.load_state_dict(rounded)
    for each in (trained, model):
        train(each, data, 3)
    same_state(model, trained)
    for matrix in (*model.feedback.values(), *model.exp_avg.values()):
        assert matrix.dtype == torch.float32


@pytest.mark.parametrize("into", ["fresh", "running"])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("rule", ["adam", "grad"])
def test_a_run_resumed_from_safetensors_is_the_uninterrupted_one(
    tmp_path: Path, name: str, rule: str, into: str
) -> None:
    files = pytest.importorskip("safetensors.torch")
    trained = FDFA(NETS[name][0](), feedback=rule)
    train(trained, name, 2)
    path = str(tmp_path / "model.safetensors")
    files.save_file(trained.state_dict(), path)
    resumed = FDFA(NETS[name][0](), feedback=rule)
    if into == "running":
        train(resumed, name, 1)
    resumed.load_state_dict(files.load_file(path))
    for model in (trained, resumed):
        train(model, name, 3)
    same_state(resumed, trained)


@pytest.mark.parametrize("assign", [False, True])
def test_weights_assigned_in_bfloat16_leave_the_feedback_in_float32(assign: bool) -> None:
    x, y = batch("conv_net")
    trained = FDFA(conv_net(), example_input=x)
    train(trained, "conv_net", 1)
    state = {k: t.bfloat16() if t.is_floating_point() else t for k, t in trained.state_dict().items()}
    model = FDFA(conv_net(), example_input=x)
    model.load_state_dict(state, assign=assign)
    dtype = torch.bfloat16 if assign else torch.float32
    loss = F.cross_entropy(model(x.to(dtype)).float(), y)
    loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {dtype}
    assert {matrix.dtype for matrix in model.feedback.values()} == {torch.float32}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", ["noise_state", "updates"])
def test_a_count_in_floating_point_is_refused_by_name(name: str, assign: bool) -> None:
    """A seed of 63 bits would be another one, and steps counted in bfloat16 repeat their noise."""
    model = FDFA(mlp(), example_input=batch("mlp")[0])
    before = model.state_dict()[name].clone()
    state = model.state_dict() | {name: model.state_dict()[name].double()}
    with pytest.raises(RuntimeError, match=rf"FDFA: {name} must hold whole numbers, int64"):
        model.load_state_dict(state, assign=assign)
    assert torch.equal(model.state_dict()[name], before)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1), *batch("mlp"))


def test_a_state_saved_before_the_first_step_can_be_loaded() -> None:
    for options in ({"feedback": "adam"}, {"feedback": "grad"}, {"method": "lg-fg-a"}):
        early = FDFA(mlp(), **options)
        late = FDFA(mlp(), **options)
        late.load_state_dict(early.state_dict())
        for model in (early, late):
            torch.manual_seed(2)  # of the heads
            train(model, "mlp", 2)
        if not early.heads:
            same_state(late, early)


class _Trainer(nn.Module):
    """As Lightning holds a model: in one of its own, with more behind it."""

    def __init__(self, model: FDFA) -> None:
        super().__init__()
        self.model = model
        self.tail = nn.LayerNorm(3)  # not BatchNorm, behind which a bias has no gradient

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.model(x))


LEARNING = [
    {"feedback": "grad"},
    {"method": "dkp", "feedback": "grad"},
    {"method": "lg-fg-a"},
]
ALL = [*LEARNING, {"feedback": "adam"}, {"feedback": "ema"}, {"method": "dfa"}, {"method": "fg-a"}]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("options", LEARNING, ids=str)
def test_an_optimizer_made_before_the_first_step_moves_all_that_learns(
    options: dict, kind: Any, nested: bool
) -> None:
    model: nn.Module = FDFA(mlp("tanh"), **options)
    inner = model
    if nested:
        model = _Trainer(inner)
    optimizer = kind(model.parameters(), lr=0.1)
    train(model, "mlp", 1, optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, "mlp", 2, optimizer)
    assert len(before) == len(optimizer.param_groups[0]["params"])
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    if options.get("feedback") == "grad":
        assert [id(p) for p in inner.feedback_parameters()] == list(map(id, inner.feedback.values()))


@pytest.mark.parametrize("options", LEARNING, ids=str)
def test_the_order_of_parameters_does_not_depend_on_when_they_get_their_shape(options: dict) -> None:
    """An optimizer's state goes by it."""
    x, _ = batch("block_net")
    early, late = FDFA(block_net(), **options, example_input=x), FDFA(block_net(), **options)
    late(x)
    assert [n for n, _ in early.named_parameters()] == [n for n, _ in late.named_parameters()]


@pytest.mark.parametrize("move", [nn.Module.bfloat16, nn.Module.double, nn.Module.cpu])
def test_parameters_without_a_shape_may_be_moved(move: Callable[[nn.Module], nn.Module]) -> None:
    x, _ = batch("mlp")
    for options in LEARNING:
        model = FDFA(mlp(), backend="reference", **options)
        move(model)
        dtype = model.module[0].weight.dtype
        model(x.to(dtype)).sum().backward()
        assert {head.weight.dtype for head in model.heads.values()} <= {dtype}
        assert {matrix.dtype for matrix in model.feedback.values()} <= {torch.float32}


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("options", ALL, ids=str)
def test_an_average_made_before_the_first_step_follows_the_model(
    options: dict, nested: bool, use_buffers: bool
) -> None:
    model: Any = FDFA(block_net(), **options)
    model = _Trainer(model) if nested else model
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected: dict[str, Tensor] = {}
    for _ in range(3):
        train(model, "block_net", 1, optimizer)
        average.update_parameters(model)
        for name, p in model.named_parameters():
            expected[name] = (
                p.detach().lerp(expected[name], 0.5) if name in expected else p.detach().clone()
            )
    averaged = dict(average.module.named_parameters())
    assert averaged.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(averaged[name].detach(), value, msg=name)
    train(average.module, "block_net", 1)


@pytest.mark.parametrize("options", ALL, ids=str)
def test_a_copy_made_before_the_first_step_trains_as_the_model(options: dict) -> None:
    model = FDFA(block_net(), **options)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        train(each, "block_net", 2)
    same_state(twin, model)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert a.data_ptr() != b.data_ptr()


def test_local_heads_declared_for_another_order_are_refused_by_name() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = FDFALinear(8, 8), FDFALinear(6, 8)
            self.out = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.second(self.first(x)))

    x, y = batch("mlp")
    with pytest.raises(
        RuntimeError, match=r"block 'first' needs a local head .* another order .* with example_input"
    ):
        FDFA(Backwards(), method="lg-fg-a")(x)
    losses(FDFA(Backwards(), method="lg-fg-a", example_input=x), x, y).backward()


def test_a_copy_of_a_loaded_model_has_feedback_of_its_own() -> None:
    """Placeholders of what is loaded must not become B, whose fixed zeros would teach nothing."""
    x, y = batch("mlp")
    source = FDFA(mlp(), method="dfa", example_input=x)
    model = FDFA(mlp(), method="dfa")
    twin = copy.deepcopy(model)
    model.load_state_dict(source.state_dict())
    losses(twin, x, y).backward()
    assert all(matrix.any() for matrix in twin.feedback.values())


def test_a_copy_that_got_another_net_keeps_to_it() -> None:
    x, y = batch("mlp")
    model = FDFA(mlp())
    twin = copy.deepcopy(model)
    twin.module = nn.Sequential(FDFALinear(6, 20), FDFALinear(20, 20), nn.Linear(20, 3))
    losses(model, x, y).backward()
    losses(twin, x, y).backward()
    assert [list(matrix.shape) for matrix in twin.feedback.values()] == [[3, 20], [3, 20]]


def test_a_copy_that_runs_is_left_alone() -> None:
    x, y = batch("mlp")
    model = FDFA(mlp(), example_input=x)
    twin = copy.deepcopy(model)
    before = list(twin.state_dict())
    model.module.insert(2, FDFALinear(model.module[1].out_features, model.module[1].out_features))
    losses(model, x, y).backward()
    assert len(model.feedback) == 3
    assert list(twin.state_dict()) == before


def test_heads_may_have_any_name() -> None:
    x, y = batch("mlp")
    layers = [(name, FDFALinear(6, 6, activation="tanh")) for name in ("keys", "values")]
    net = nn.Sequential(OrderedDict([*layers, ("out", nn.Linear(6, 3))]))
    model = FDFA(net, method="lg-fg-a", example_input=x)
    losses(model, x, y).backward()
    assert model.heads["keys"].weight.grad.any()


def test_lazy_modules_get_their_shapes_in_the_first_pass() -> None:
    x, y = batch("mlp")
    model = FDFA(nn.Sequential(FDFABlock(nn.LazyLinear(5), nn.ReLU()), nn.LazyLinear(3)))
    losses(model, x, y).backward()
    assert model.feedback["0"].any()


@pytest.mark.parametrize("method", ["fdfa", "dfa", "dkp", "fg-a", "lg-fg-a"])
def test_a_lazy_norm_is_trained_as_another(method: str) -> None:
    x, y = batch("mlp")
    models = []
    for norm in (nn.LazyBatchNorm1d(), nn.BatchNorm1d(5)):
        torch.manual_seed(0)
        net = nn.Sequential(FDFABlock(nn.Linear(6, 5), norm, nn.ReLU()), nn.Linear(5, 3))
        models.append(FDFA(net, method=method, example_input=x, feedback_lr=0.1))
    models[1].load_state_dict(models[0].state_dict())
    for _ in range(2):
        for model in models:
            step(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y)
    same_state(*models)


def test_weight_perturbation_wants_shapes() -> None:
    model = FDFA(nn.Sequential(FDFABlock(nn.LazyLinear(5)), nn.Linear(5, 3)), method="fg-w")
    with pytest.raises(RuntimeError, match=r"'0.0.weight' has no shape yet; run the module"):
        model(torch.randn(4, 6))


@pytest.mark.parametrize("copied", ["pickle", "torch.save", "deepcopy"])
@pytest.mark.parametrize("method", ["fdfa", "dfa", "lg-fg-a", "fg-w", "bp"])
@pytest.mark.parametrize("name", ["mlp", "block_net"])
def test_a_model_saved_whole_trains_on(name: str, method: str, copied: str) -> None:
    """And so does its net alone, which a wrapper may have had before."""
    x, y = batch(name)
    model = make(name, method=method, feedback_lr=0.1)
    train(model, name, 2)
    file = io.BytesIO()
    if copied == "deepcopy":
        twin = copy.deepcopy(model)
    elif copied == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    for each in (model, twin):
        train(each, name, 2)
    same_state(model, twin)
    net = pickle.loads(pickle.dumps(model.module))
    again = FDFA(net, method=method, example_input=x)
    losses(again, x, y).backward()
    assert all(p.grad is not None for p in again.forward_parameters())


def test_an_own_update_forgets_a_block_that_leaves() -> None:
    class Momentum(FeedbackUpdate):
        def create(self, name: str, feedback: Tensor) -> None:
            self.register_buffer(name, torch.zeros_like(feedback))

        def step(self, name: str, feedback: Tensor, gradient: Tensor) -> None:
            feedback.sub_(self.get_buffer(name).mul_(0.9).add_(gradient))

    x, y = batch("mlp")
    model = FDFA(mlp(), feedback=Momentum(), example_input=x)
    losses(model, x, y).backward()
    model.module[1] = nn.Sequential(nn.Tanh(), nn.Identity())
    model.module[2] = nn.Linear(8, 3)
    losses(model, x, y).backward()
    fresh = FDFA(copy.deepcopy(model.module), feedback=Momentum(), example_input=x)
    fresh.load_state_dict(model.state_dict())
    other = FDFA(mlp(), feedback=Momentum(), example_input=x)
    other.module = copy.deepcopy(model.module)
    other.load_state_dict(model.state_dict())


def test_a_rate_of_an_average_is_at_most_one() -> None:
    model = FDFA(mlp(), feedback="ema", feedback_lr=0.5)
    with pytest.raises(ValueError, match=r"feedback_lr must be at most 1 for feedback=.ema.; got 2.5"):
        model.feedback_lr = 2.5
    assert model.feedback_lr == 0.5


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
        model.give_feedback_gradients()
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


@pytest.mark.parametrize(("name", "rule"), [("conv_net", "adam"), *slow_but([("block_net", "grad")])])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, name: str, rule: str
) -> None:
    """5 steps, save, 5 more in a fresh process, against 10 steps in one process."""
    half, resumed, whole = (str(tmp_path / file) for file in ("half", "resumed", "whole"))
    tests = Path(__file__).parent

    def script(*run: Any) -> str:
        return RESUME.format(tests=str(tests), name=name, rule=rule, run=run)

    exec(script(0, 5, None, half), {})
    exec(script(0, 10, None, whole), {})
    command = [sys.executable, "-c", script(5, 10, half, resumed)]
    subprocess.run(command, check=True, cwd=tests.parent)
    states = [torch.load(path)["model"] for path in (resumed, whole)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


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


def test_the_dry_run_leaves_no_trace() -> None:
    net = block_net()
    before = copy.deepcopy(net.state_dict())
    model = FDFA(net, example_input=batch("block_net")[0])
    assert model.noise_state[1] == 0
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


class UsesTwice(nn.Module):
    """Its blocks are called in another order than they are defined, and twice each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = FDFALinear(3, 3), FDFALinear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.b, self.a) * 2:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("options", [{"feedback": "grad"}, {"method": "lg-fg-a"}], ids=str)
@pytest.mark.parametrize("with_example", [False, True], ids=["no example", "example"])
def test_parameters_are_in_one_order_however_the_state_came(
    options: dict[str, str], with_example: bool
) -> None:
    """Optimizers save their moments by the order of the parameters, and blocks of one shape would swap them."""
    x = torch.randn(2, 3)
    model = FDFA(UsesTwice(), example_input=x, **options)
    other = FDFA(UsesTwice(), example_input=x if with_example else None, **options)
    other.load_state_dict(model.state_dict())
    names = [name for name, _ in model.named_parameters()]
    assert len(names) > 6
    assert [name for name, _ in other.named_parameters()] == names
    for each in (model, other):
        each(x).sum().backward()
        assert [name for name, _ in each.named_parameters()] == names


def test_a_state_of_another_rule_or_of_the_module_alone_is_said() -> None:
    x, net = torch.randn(4, 6), nn.Sequential(FDFALinear(6, 5), nn.Linear(5, 3))
    models = {
        rule: FDFA(copy.deepcopy(net), feedback=rule, example_input=x) for rule in ("ema", "adam")
    }
    for one, other, theirs in (("ema", "adam", "another rule"), ("adam", "ema", "Adam")):
        state = models[one].state_dict()
        with pytest.raises(RuntimeError) as raised:
            models[other].load_state_dict(state)
        (note,) = raised.value.__notes__
        assert f"state moves by {theirs}, and that of the model by '{other}'" in note
        models[other].load_state_dict(state, strict=False)
        assert set(models[other].exp_avg) == ({"0"} if other == "adam" else set())
    with pytest.raises(RuntimeError, match="Missing key") as raised:
        models["adam"].load_state_dict(net.state_dict())
    assert "model.module.load_state_dict" in raised.value.__notes__[0]
    models["adam"].module.load_state_dict(net.state_dict())
