"""What a program does around a model: threads, inference mode, inputs by name, other forms of it."""

import copy
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import NETS, batch, conv_net, mlp, step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fdfa_ext import FDFA, FDFABlock, FDFALinear


class _Attention(nn.Module):
    """Goes on dual tensors, as a forward of its own does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = FDFALinear(6, 8, activation="tanh")
        self.second = FDFABlock(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(x)[:, None]).squeeze(1))


class _Waits(nn.Module):
    """Halts a forward in the middle, if it is that of one thread."""

    def __init__(self) -> None:
        super().__init__()
        self.thread, self.is_here, self.goes_on = 0, threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        if threading.get_ident() == self.thread:
            self.is_here.set()
            assert self.goes_on.wait(60)
        return x


@pytest.mark.parametrize("at", [None, ["0", "2"]], ids=["blocks", "points"])
def test_a_second_thread_evaluates_and_does_not_train(at: list[str] | None) -> None:
    waits = _Waits()
    hidden: list[nn.Module] = [FDFALinear(6, 8), FDFALinear(8, 8)]
    if at is not None:
        hidden = [nn.Linear(6, 8), nn.Linear(8, 8)]
    net = nn.Sequential(hidden[0], waits, hidden[1], nn.Linear(8, 3))
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    model = FDFA(net, at=at, example_input=x)
    alone = FDFA(nn.Sequential(*copy.deepcopy(hidden), copy.deepcopy(net[3])), at=at and ["0", "1"])
    alone.noise_state.copy_(model.noise_state)
    with torch.no_grad():
        expected = net(x)

    def train() -> None:
        waits.thread = threading.get_ident()
        F.cross_entropy(model(x), y).backward()

    thread = threading.Thread(target=train)
    thread.start()
    assert waits.is_here.wait(60)
    try:
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
        with pytest.raises(RuntimeError, match="another thread runs a training forward of this model"):
            model(x)
    finally:
        waits.goes_on.set()
        thread.join()
    F.cross_entropy(alone(x), y).backward()
    for (name, mine), theirs in zip(model.module.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
    F.cross_entropy(model(x), y).backward()  # another thread may, once the first is through


def test_models_in_threads_of_their_own_train_as_one_after_the_other() -> None:
    """torch has one level of forward mode, and one choice of attention, for all threads."""
    x, y = batch("mlp")
    models = [FDFA(net) for net in (_Attention(), _Attention(), mlp())]
    expected = copy.deepcopy(models)
    cuda = torch.backends.cuda
    settings = (cuda.flash_sdp_enabled, torch.backends.mha.get_fastpath_enabled)
    before = [ask() for ask in settings]

    def train(model: FDFA) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(60):
            step(model, optimizer, x, y)

    failures: list[Exception] = []

    def run(model: FDFA) -> None:
        try:
            train(model)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [ask() for ask in settings] == before
    for model, other in zip(models, expected, strict=True):
        train(other)
        for key, value in other.state_dict().items():
            torch.testing.assert_close(model.state_dict()[key], value, msg=key)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("options", [{}, {"feedback": "grad"}, {"method": "lg-fg-a"}], ids=str)
@pytest.mark.parametrize("example", [False, True])
def test_a_wrapper_made_in_inference_mode_trains(name: str, options: dict, example: bool) -> None:
    x, y = batch(name)
    net = NETS[name][0]()
    with torch.inference_mode():
        model = FDFA(net, **options, example_input=x if example else None)
        model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        step(model, optimizer, x, y)
    assert all(bool((matrix != 0).any()) for matrix in model.feedback.values())


def test_a_state_loaded_in_inference_mode_can_be_trained() -> None:
    x, y = batch("conv_net")
    saved = FDFA(conv_net(), example_input=x).state_dict()
    model = FDFA(conv_net())
    with torch.inference_mode():
        model.load_state_dict(saved)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y)


def test_heads_loaded_in_inference_mode_learn() -> None:
    x, y = batch("mlp")
    saved = FDFA(mlp(), method="lg-fg-a", example_input=x).state_dict()
    model = FDFA(mlp(), method="lg-fg-a")
    with torch.inference_mode():
        model.load_state_dict(saved)
    output = model(x)
    sum(F.cross_entropy(o, y) for o in (output, *model.local_outputs)).backward()
    assert model.heads["0"].weight.grad.any()


class _Frozen(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.inner(x)


@pytest.mark.parametrize("block", [FDFALinear(6, 8), FDFABlock(nn.Linear(6, 8), nn.ReLU())])
@pytest.mark.parametrize("method", ["fdfa", "dfa", "fg-a"])
def test_a_block_that_runs_without_gradients_has_none(method: str, block: nn.Module) -> None:
    net = nn.Sequential(_Frozen(copy.deepcopy(block)), FDFALinear(8, 8), nn.Linear(8, 3))
    model = FDFA(net, method=method, example_input=torch.randn(5, 6))
    model(torch.randn(5, 6)).sum().backward()
    assert all(p.grad is None for p in net[0].parameters())
    assert net[1].weight.grad is not None


@pytest.mark.parametrize("method", ["fdfa", "dfa", "fg-a"])
def test_a_checkpoint_of_a_model_with_norms_trains_it(method: str) -> None:
    """A batch norm's tangent takes autograd within the forward, which computes the checkpoint again."""
    torch.manual_seed(0)
    norm = FDFABlock(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    net = nn.Sequential(FDFALinear(6, 8), norm, FDFALinear(8, 7), nn.Linear(7, 3))
    x = torch.randn(16, 6)
    models = [FDFA(copy.deepcopy(net), method=method, example_input=x) for _ in range(2)]
    models[0].load_state_dict(models[1].state_dict())
    checkpoint(models[0], x, use_reentrant=False).square().sum().backward()
    models[1](x).square().sum().backward()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert p.grad is not None
        if method == "dfa":  # has no noise, which is drawn anew
            torch.testing.assert_close(p.grad, q.grad)
    step(models[0], torch.optim.SGD(models[0].parameters(), lr=0.1), x, torch.zeros(16).long())


def test_a_net_made_in_inference_mode_is_refused_by_name() -> None:
    with torch.inference_mode():
        net = mlp()
    with pytest.raises(
        RuntimeError, match=r"FDFA: '0\.weight' of the module was made under torch\.inf"
    ):
        FDFA(net)(batch("mlp")[0])


class _ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = FDFALinear(6, 8), nn.Linear(8, 3)

    def forward(self, *, pixels: Tensor, scale: float = 1.0) -> Tensor:
        return self.out(scale * self.hidden(pixels))


class _OneDict(_ByName):
    def forward(self, inputs: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(pixels=inputs["pixels"])


@pytest.mark.parametrize("net", [_ByName, _OneDict])
def test_an_example_may_be_a_dict(net: Any) -> None:
    """Of inputs by name, or as the one input of a model that wants such."""
    x, _ = batch("mlp")
    model = FDFA(net(), example_input={"pixels": x})
    assert list(model.feedback) == ["hidden"]
    output = model(pixels=x, scale=2.0) if net is _ByName else model({"pixels": x})
    output.sum().backward()


@pytest.mark.parametrize("method", ["fdfa", "dfa", "fg-a"])
def test_an_input_within_a_dict_may_want_a_gradient(method: str) -> None:
    """And gets none, as one that is given by itself."""
    x = torch.randn(5, 6, requires_grad=True)
    model = FDFA(_OneDict(), method=method, example_input={"pixels": x})
    model({"pixels": x}).sum().backward()
    assert x.grad is None


@pytest.mark.parametrize("method", ["fdfa", "dfa", "bp"])
def test_containers_among_the_inputs_are_the_callers_own(method: str) -> None:
    class Recorded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor, seen: list[int], also: dict[str, Any]) -> Tensor:
            seen.append(1)
            also["shape"] = x.shape
            return self.net(x)

    x, seen, also = torch.randn(5, 6, requires_grad=True), [], {}
    model = FDFA(Recorded(), method=method, example_input=(x, [], {}))
    model(x, seen, also).sum().backward()
    assert seen == [1]
    assert also == {"shape": (5, 6)}


@pytest.mark.parametrize("method", ["fdfa", "dfa", "dkp"])
def test_a_checkpoint_stands_in_a_block_and_not_around_one(method: str) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
    x = torch.randn(5, 6)
    with pytest.raises(
        RuntimeError, match=r"block or point '0.inner' is called within torch.utils.checkpoint"
    ):
        FDFA(nn.Sequential(Checkpointed(FDFABlock(*layers)), nn.Linear(8, 3)), method=method)(x)
    nets = [nn.Sequential(FDFABlock(f(layers)), nn.Linear(8, 3)) for f in (Checkpointed, nn.Sequential)]
    nets[1].load_state_dict(
        {name.replace("inner.", "0."): value for name, value in nets[0].state_dict().items()}
    )
    gradients = []
    for net in map(copy.deepcopy, nets):
        torch.manual_seed(0)
        model = FDFA(net, method=method, example_input=x)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


class _Returns(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.LSTM(8, 8), "tuple"),
        (nn.GRU(8, 8), "tuple"),
        (_Returns(lambda x: {"y": x}), "dict"),
        (_Returns(lambda x: None), "NoneType"),
    ],
    ids=["lstm", "gru", "dict", "none"],
)
@pytest.mark.parametrize("after", [[], [nn.ReLU()]], ids=["last", "first"])
@pytest.mark.parametrize("method", ["fdfa", "dfa"])
def test_a_block_of_more_than_one_tensor_is_refused_by_name(
    method: str, after: list[nn.Module], module: nn.Module, kind: str
) -> None:
    net = nn.Sequential(FDFABlock(module, *after), nn.Linear(8, 3))
    message = rf"block or point '0': its module 0 \(.*\) returned a {kind}, but a block's modules must return one"
    with pytest.raises(TypeError, match=message):
        FDFA(net, method=method)(torch.randn(5, 8))


class _Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0][:, -1]


@pytest.mark.parametrize("method", ["fdfa", "dfa", "dkp", "fg-a"])
def test_a_recurrent_block_trains_by_every_method(method: str) -> None:
    net = nn.Sequential(FDFALinear(6, 8), FDFABlock(_Last()), nn.Linear(8, 3))
    model = FDFA(net, method=method)
    model(torch.randn(5, 4, 6)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("name", NETS)
def test_a_trained_model_is_traced_exported_and_quantized_but_not_scripted(name: str) -> None:
    x, y = batch(name)
    model = FDFA(NETS[name][0](), example_input=x)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y)
    model.eval()
    expected = model(x)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    quantized = torch.ao.quantization.quantize_dynamic(model)
    torch.testing.assert_close(quantized(x), expected, rtol=0.1, atol=0.1)
    for scripted in (model, model.module, nn.Sequential(model)):
        with pytest.raises(
            RuntimeError, match=r"FDFA: torch\.jit\.script cannot compile .* torch\.jit\.trace"
        ):
            torch.jit.script(scripted)
    model.train()
    step(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y)


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf")])
def test_a_feedback_rate_is_checked_whenever_it_is_set(rate: float) -> None:
    model = FDFA(mlp(), feedback_lr=0.5)
    with pytest.raises(ValueError, match="feedback_lr must be finite and not negative; got"):
        model.feedback_lr = rate
    assert model.feedback_lr == 0.5
    F.cross_entropy(model(batch("mlp")[0]), batch("mlp")[1]).backward()


def test_a_net_that_was_never_wrapped_can_be_traced() -> None:
    """torch.jit looks at every property of a module."""
    net, (x, _) = NETS["conv_net"][0]().eval(), batch("conv_net")
    torch.testing.assert_close(torch.jit.trace(net, x)(x), net(x))


@pytest.mark.parametrize("rule", ["adam", "grad"])
def test_torchs_counter_sees_every_product_of_a_step(device: torch.device, rule: str) -> None:
    n, inputs, first, second, k = 4, 20, 32, 16, 10
    net = nn.Sequential(
        FDFALinear(inputs, first, activation="relu"),
        FDFALinear(first, second, activation="relu"),
        nn.Linear(second, k),
    )
    model = FDFA(net.to(device), feedback=rule, example_input=torch.randn(n, inputs, device=device))
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(n, inputs, device=device)).square().mean().backward()
    upper = first * second + second * k
    primal_and_gradients = 2 * (inputs * first + upper)
    feedback = 2 * k * (first + second)  # G and eB
    assert counter.get_total_flops() == 2 * n * (primal_and_gradients + upper + feedback)


def test_missing_or_foreign_extension_says_how_to_rebuild(tmp_path: Path) -> None:
    package = Path(sys.modules["fdfa_ext"].__file__).parent
    copied = tmp_path / "fdfa_ext"
    copied.mkdir()
    for file in package.glob("*.py"):
        (copied / file.name).write_text(file.read_text())
    program = """
import pathlib, torch
for built_for in (None, "1.13.0", torch.__version__):
    if built_for:
        pathlib.Path("fdfa_ext/_built_for.txt").write_text(built_for)
    try:
        import fdfa_ext
    except ImportError as error:
        print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    errors = run.stdout.split("pip install --no-build-isolation .")
    assert len(errors) == 4
    assert "compiled extension is missing. Take the wheel whose version ends in +torch" in errors[0]
    assert "was built for torch 1.13.0, but torch" in errors[1]
    assert "compiled extension does not load" in errors[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("allowed", "kernels"), [("default", {"baseline"}), ("avx2", {"baseline", "avx2"})]
)
def test_kernels_use_no_more_than_torch_is_allowed(allowed: str, kernels: set[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import fdfa_ext; print(fdfa_ext.build_info()['CPU kernels'])"],
        env=os.environ | {"ATEN_CPU_CAPABILITY": allowed}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.strip() in kernels


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


def test_a_printed_model_shows_its_options() -> None:
    model = FDFA(mlp(), method="dkp", feedback="ema", feedback_lr=0.25, noise="rademacher")
    shown = repr(model)
    for option in (
        "KolenPollack",
        "feedback=ema",
        "feedback_lr=0.25",
        "noise=rademacher",
        "backend=fused",
    ):
        assert option in shown
    assert shown.startswith("FDFA(")
    assert repr(model.module[0]) in shown
