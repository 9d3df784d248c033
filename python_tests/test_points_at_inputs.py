"""Points at the inputs of modules: a tensor that no module returns by itself is perturbed where it is
read."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import check_compiled_steps, step
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fdfa_ext import FDFA, FDFALinear, check
from fdfa_ext.duals import forward_mode, make_dual, unpack_dual
from fdfa_ext.jvp import point_rules
from fdfa_ext.metrics import feedback_alignment, gradient_alignment, mean_jacobian

OPTIONS: dict[str, Any] = {"feedback": "ema", "feedback_lr": 0.3}
LENGTHS = torch.tensor([5, 2, 3, 5])


def wrapped(net: nn.Module, x: Any, **options: Any) -> FDFA:
    torch.manual_seed(3)
    return FDFA(net, example_input=x, **{**OPTIONS, **options})


def images() -> nn.Sequential:
    """[N, 1, 8, 8] → [N, 3]."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(80, 3)
    )


def sequences() -> nn.Sequential:
    """[N, 4, T] → [N, 3]."""
    return nn.Sequential(
        nn.Conv1d(4, 6, 1),
        nn.ReLU(),
        nn.Conv1d(6, 6, 1),
        nn.Tanh(),
        nn.AdaptiveMaxPool1d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


@pytest.mark.parametrize("method", ["fdfa", "dfa", "dkp", "fg-a", "lg-fg-a"])
@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize(
    ("make", "shape", "inputs"),
    [(images, (1, 8, 8), ["2.input", "4.input"]), (sequences, (4, 6), ["2.input", "4.input"])],
)
def test_a_point_at_an_input_is_one_at_the_output_that_it_reads(
    make: Callable[[], nn.Sequential],
    shape: tuple[int, ...],
    inputs: list[str],
    method: str,
    patch: int,
    backend: str,
) -> None:
    torch.manual_seed(0)
    net, x, y = make(), torch.randn(5, *shape), torch.tensor([0, 1, 2, 0, 1])
    net[0].register_forward_hook(lambda *_: None)  # so that each module is called
    states = []
    for at in (["1", "3"], inputs):
        model = wrapped(copy.deepcopy(net), x, at=at, method=method, patch=patch, backend=backend)
        assert model.block_names == at
        optimizer = torch.optim.SGD(model.forward_parameters(), lr=0.1)
        for _ in range(3):
            step(model, optimizer, x, y)
        state = {
            name.replace("2/input", "1").replace("4/input", "3"): t
            for name, t in model.state_dict().items()
        }
        states.append(state)
    assert states[0].keys() == states[1].keys()
    for name, t in states[0].items():
        assert torch.equal(t, states[1][name]), name


def test_measurements_know_points_at_inputs() -> None:
    torch.manual_seed(0)
    net, x, y = images(), torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    outputs = wrapped(copy.deepcopy(net), x, at=["1", "3"])
    inputs = wrapped(net, x, at=["2.input", "4.input"])
    for mine, theirs in zip(
        mean_jacobian(inputs, x).values(), mean_jacobian(outputs, x).values(), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    assert gradient_alignment(inputs, (x, y)) == pytest.approx(gradient_alignment(outputs, (x, y)))
    assert [*feedback_alignment(inputs, x)] == ["2.input", "4.input"]


class Rows(nn.Module):
    """A recurrent layer whose last state alone is read: [N, T, 6] → [N, 3]."""

    def __init__(self, kind: type[nn.RNNBase] = nn.GRU, **options: Any) -> None:
        super().__init__()
        self.rows = kind(6, 5, batch_first=True, **options)
        self.output = nn.Linear(10 if options.get("bidirectional") else 5, 3)

    def state(self, x: Any) -> Tensor:
        _, state = self.rows(x)
        last = state[0] if isinstance(state, tuple) else state
        return torch.cat([last[-2], last[-1]], 1) if self.rows.bidirectional else last[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.state(x))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
def test_a_recurrent_layer_learns_by_its_last_state(
    kind: type[nn.RNNBase], options: dict[str, Any]
) -> None:
    """Its parameters get the gradient of state · δ, with δ = eB."""
    torch.manual_seed(0)
    net, x, y = Rows(kind, **options), torch.randn(4, 7, 6), torch.tensor([0, 1, 2, 0])
    model = wrapped(net, x, at="auto", method="dfa")
    assert model.block_names == ["output.input"]
    assert check(net, x).points[0].parameters == [
        f"rows.{name}" for name, _ in net.rows.named_parameters()
    ]
    output = net(x).detach().requires_grad_()
    (error,) = torch.autograd.grad(F.cross_entropy(output, y), output)
    wanted = torch.autograd.grad(
        net.state(x), [*net.rows.parameters()], error @ model.feedback["output.input"]
    )
    F.cross_entropy(model(x), y).backward()
    for parameter, gradient in zip(net.rows.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


class Packed(nn.Module):
    """A recurrent layer behind another, which takes sequences as they are, or packed: [N, T, 6] → [N, 3]."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.first, self.rows = nn.Linear(6, 6), kind(6, 5, batch_first=True)
        self.output = nn.Linear(10, 3)
        self.lengths: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        if self.lengths is None:
            states, last = self.rows(x)
        else:
            options: dict[str, Any] = {"batch_first": True}
            packed = pack_padded_sequence(x, self.lengths, enforce_sorted=False, **options)
            states, last = self.rows(packed)
            states, _ = pad_packed_sequence(states, **options)
        last = last[0] if isinstance(last, tuple) else last
        return self.output(torch.cat([last[-1], states.mean(1)], 1))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_packed_sequences_train_as_others_do(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    net, x, y = Packed(kind), torch.randn(4, 5, 6), torch.tensor([0, 1, 2, 0])
    states = []
    # torch's LSTM by oneDNN, for sequences that are not packed, has no forward mode.
    with torch.backends.mkldnn.flags(enabled=False):
        for lengths in (None, torch.full((4,), 5)):
            model = wrapped(copy.deepcopy(net), x, at=["first", "output.input"])
            model.module.lengths = lengths
            optimizer = torch.optim.SGD(model.forward_parameters(), lr=0.1)
            for _ in range(3):
                step(model, optimizer, x, y)
            states.append(model.state_dict())
    for name, t in states[0].items():
        torch.testing.assert_close(states[1][name], t, rtol=1e-4, atol=1e-6, msg=name)
    net.lengths = LENGTHS
    assert wrapped(net, x, at="auto").block_names == ["first", "output.input"]


@pytest.mark.parametrize("sorts", [True, False])
def test_the_tangent_of_a_packed_sequence_is_packed_as_it_is(sorts: bool) -> None:
    x, tangent, lengths = torch.randn(4, 5, 6), torch.randn(4, 5, 6), LENGTHS

    def pack(t: Tensor) -> PackedSequence:
        own = lengths.sort(descending=True).values if sorts else lengths
        return pack_padded_sequence(t, own, batch_first=True, enforce_sorted=sorts)

    with forward_mode(), point_rules():
        packed = pack(make_dual(x, tangent))
        primal, found = unpack_dual(packed.data)
    assert torch.equal(primal, pack(x).data)
    assert found is not None
    assert torch.equal(found, pack(tangent).data)


class By(nn.Module):
    """What a function makes of layers: layer after layer by name, and the last one."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(self, *inputs)


def linear(inputs: int = 6, outputs: int = 6) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def _attention(m: Any, x: Tensor) -> Tensor:
    return m.o(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x)).mean(1))


def _pooled(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.o((x * m.b(torch.tanh(x)).softmax(1)).sum(1))


def _highway(m: Any, x: Tensor) -> Tensor:
    for layer, gate in ((m.a, m.b), (m.c, m.d)):
        share = torch.sigmoid(gate(x))
        x = share * torch.relu(layer(x)) + (1 - share) * x
    return m.o(x)


def _wave(m: Any, x: Tensor) -> Tensor:
    x, total = m.i(x), 0
    for layer, residual, skip in ((m.a, m.b, m.c), (m.d, m.unread, m.f)):
        left, right = layer(x).chunk(2, 1)
        gated = torch.tanh(left) * torch.sigmoid(right)
        x, total = x + residual(gated), total + skip(gated)
    return m.o(torch.relu(total).mean(2))


def _conditioned(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return m.o(torch.relu(m.n(m.a(x)) * m.b(y) + m.c(y)))


def _between(m: Any, x: Tensor) -> Tensor:
    return m.o(torch.relu(m.d(torch.lerp(m.a(x), m.b(x), torch.sigmoid(m.c(x))))))


SEQUENCE = (4, 5, 6)
SAMPLE = (4, 6)
GATED: dict[str, tuple[nn.Module, list[tuple[int, ...]], list[str]]] = {
    "product": (
        By(lambda m, x: m.o(torch.sigmoid(m.a(x)) * m.b(x)), a=linear(), b=linear(), o=linear(6, 3)),
        [SAMPLE],
        ["o.input"],
    ),
    "GLU": (
        By(
            lambda m, x: m.o(F.glu(m.b(F.glu(m.a(x))))),
            a=linear(6, 12),
            b=linear(6, 12),
            o=linear(6, 3),
        ),
        [SAMPLE],
        ["b.input", "o.input"],
    ),
    "a module's GLU": (
        nn.Sequential(linear(6, 12), nn.GLU(), linear(), nn.ReLU(), linear(6, 3)),
        [SAMPLE],
        ["1", "3"],
    ),
    "attention": (
        By(_attention, q=linear(), k=linear(), v=linear(), o=linear(6, 3)),
        [SEQUENCE],
        ["o.input"],
    ),
    "attention's pooling": (
        By(_pooled, a=linear(), b=linear(6, 1), o=linear(6, 3)),
        [SEQUENCE],
        ["a", "o.input"],
    ),
    "highway": (
        By(_highway, a=linear(), b=linear(), c=linear(), d=linear(), o=linear(6, 3)),
        [SAMPLE],
        ["c.input", "d.input", "o.input"],
    ),
    "WaveNet": (
        By(
            _wave,
            i=nn.Conv1d(6, 6, 1),
            a=nn.Conv1d(6, 12, 1),
            b=nn.Conv1d(6, 6, 1),
            c=nn.Conv1d(6, 6, 1),
            d=nn.Conv1d(6, 12, 1),
            unread=nn.Conv1d(6, 6, 1),
            f=nn.Conv1d(6, 6, 1),
            o=linear(6, 3),
        ),
        [(4, 6, 5)],
        ["i", "b.input", "c.input", "f.input"],
    ),
    "modulation": (
        By(_conditioned, a=linear(), n=nn.LayerNorm(6), b=linear(), c=linear(), o=linear(6, 3)),
        [SAMPLE, SAMPLE],
        ["o.input"],
    ),
    "a difference": (
        By(lambda m, x, y: m.o((m.a(x) - m.a(y)).abs()), a=linear(), o=linear(6, 3)),
        [SAMPLE, SAMPLE],
        ["o.input"],
    ),
    "interpolation": (
        By(_between, a=linear(), b=linear(), c=linear(), d=linear(), o=linear(6, 3)),
        [SAMPLE],
        ["d.input", "o.input"],
    ),
}


@pytest.mark.parametrize("name", GATED)
def test_auto_stands_behind_what_multiplies_features_by_features(name: str) -> None:
    net, shapes, points = GATED[name]
    inputs = tuple(torch.randn(shape) for shape in shapes)
    model = wrapped(copy.deepcopy(net), inputs, at="auto")
    assert model.block_names == points
    model(*inputs).square().mean().backward()
    learning = {n for n, p in model.module.named_parameters() if p.grad is not None}
    assert learning == {n for n, _ in net.named_parameters() if not n.startswith("unread")}


class Functional(nn.Module):
    """Convolutions with their activations and pools by functions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.third, self.fourth, self.output = nn.Linear(24, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.max_pool2d(F.relu(self.second(x)), 2).flatten(1)
        x = self.fourth(F.dropout(F.relu(self.third(x)), 0.5, self.training))
        return self.output(x.unsqueeze(1).squeeze(1))


def test_auto_stands_behind_functions_as_behind_modules() -> None:
    x = torch.randn(4, 1, 8, 8)
    points = ["second.input", "third.input", "fourth.input", "fourth"]
    assert wrapped(Functional(), x, at="auto").block_names == points
    # A view as one row would have no patches.
    in_patches = ["second.input", "second", "fourth.input", "fourth"]
    assert wrapped(Functional(), x, at="auto", patch=2).block_names == in_patches
    assert [point.name for point in check(Functional(), x, patch=2).points] == in_patches
    layers = ["first", "second", "third", "fourth"]
    assert wrapped(Functional(), x, at="auto", granularity="layer").block_names == layers


def test_auto_stands_behind_a_sum_of_functions_too() -> None:
    """Only behind a gate does a layer go without a point of its own."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.relu(m.a(x))
        return m.o(torch.relu(m.b(x) + m.c(x)))

    net = By(forward, a=linear(), b=linear(), c=linear(), o=linear(6, 3))
    assert wrapped(net, torch.randn(4, 6), at="auto").block_names == ["a", "o.input"]

    def in_a_row(m: Any, x: Tensor) -> Tensor:
        x = torch.relu(m.a(x))
        x = torch.relu(m.b(x))
        return m.o(torch.relu(m.c(x) + 0.5 * m.d(torch.ones_like(x))))

    net = By(in_a_row, a=linear(), b=linear(), c=linear(), d=linear(), o=linear(6, 3))
    points = wrapped(net, torch.randn(4, 6), at="auto").block_names
    assert points == ["b.input", "c.input", "o.input"]


def test_auto_cuts_a_layer_that_reads_itself_at_each_use() -> None:
    def cell(m: Any, x: Tensor) -> Tensor:
        h = x[:, 0]
        for row in x.unbind(1):
            h = torch.tanh(m.a(h + row))
        return m.o(h)

    model = wrapped(By(cell, a=linear(), o=linear(6, 3)), torch.randn(4, 3, 6), at="auto")
    assert model.block_names == ["a", "a:2", "a:3"]


def test_auto_reads_sequences_that_come_first_where_samples_do() -> None:
    """Of [T, N, D], which nn.GRU takes by default, a point may stand on the last step alone."""
    net = By(lambda m, x: m.o(m.g(x.transpose(0, 1))[0][-1]), g=nn.GRU(6, 6), o=linear(6, 3))
    assert wrapped(net, torch.randn(*SEQUENCE), at="auto").block_names == ["o.input"]


def test_auto_finds_the_last_state_layer_by_layer_too() -> None:
    assert wrapped(Rows(), torch.randn(4, 7, 6), at="auto", granularity="layer").block_names == [
        "output.input"
    ]


@pytest.mark.parametrize("method", ["fdfa", "dfa"])
def test_a_compiled_step_does_what_an_eager_one_does(method: str) -> None:
    torch.manual_seed(0)
    net = GATED["highway"][0]
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    check_compiled_steps(lambda: wrapped(copy.deepcopy(net), x, at="auto", method=method), x, y)


def test_a_module_used_again_has_a_point_for_each_use() -> None:
    net = By(lambda m, x: m.o(m.b(m.b(m.a(x)))), a=linear(), b=linear(), o=linear(6, 3))
    model = wrapped(net, torch.randn(4, 6), at=["b.input"])
    assert model.block_names == ["b.input", "b.input:2"]


def test_a_module_may_have_a_point_at_both_ends_and_be_the_output() -> None:
    net = By(lambda m, x: m.o(m.b(m.a(x))), a=linear(), b=linear(), o=linear(6, 3))
    x = torch.randn(4, 6)
    model = wrapped(net, x, at=["b", "b.input", "o.input"], output="o")
    assert model.block_names == ["b.input", "b", "o.input"]
    model(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_the_first_argument_may_be_given_by_name() -> None:
    torch.manual_seed(0)
    x, states = torch.randn(4, 6), []
    by_name = By(lambda m, x: m.o(input=torch.tanh(m.a(x))), a=linear(), o=linear(6, 3))
    in_order = copy.deepcopy(by_name)
    in_order.run = lambda m, x: m.o(torch.tanh(m.a(x)))
    for net in (by_name, in_order):
        model = wrapped(net, x, at=["o.input"])
        model(x).sum().backward()
        states.append(net.a.weight.grad)
    assert torch.equal(*states)


def test_a_module_named_input_is_meant_itself() -> None:
    net = nn.Sequential()
    net.add_module("part", By(lambda m, x: m.input(x), input=linear()))
    net.add_module("output", linear(6, 3))
    assert wrapped(net, torch.randn(4, 6), at=["part.input"]).block_names == ["part.input"]
    model = wrapped(net, torch.randn(4, 6), at=["part.input"])
    assert model.network.blocks["part.input"] is net.part.input


def test_a_saved_model_goes_on() -> None:
    torch.manual_seed(0)
    net, x = Rows(), torch.randn(4, 7, 6)
    model = wrapped(net, x, at="auto")
    model(x).sum().backward()
    again = wrapped(copy.deepcopy(net), x, at="auto")
    again.load_state_dict(model.state_dict())
    for one in (model, again):
        one.zero_grad()
        one(x).sum().backward()
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    assert torch.equal(model.feedback["output.input"], again.feedback["output.input"])


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (["0.input"], r"at names '0.input', but a block is perturbed at its output alone"),
        (["9.input"], r"at names '9.input', but the model has no such module"),
        (["input"], r"at names 'input', but the model has no such module"),
    ],
)
def test_names_that_mean_no_input_are_refused(at: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FDFA(nn.Sequential(FDFALinear(6, 6), nn.Linear(6, 3)), at=at)


def test_an_input_that_is_changed_in_place_is_refused() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.o(x + m.r(x))

    net = By(forward, a=linear(), r=nn.ReLU(inplace=True), o=linear(6, 3))
    with pytest.raises(
        RuntimeError, match=r"point 'r.input' is at the input of a module that changes it"
    ):
        wrapped(net, torch.randn(4, 6), at=["r.input"])


def test_a_point_that_nothing_learns_by_is_told() -> None:
    net = nn.Sequential(linear(), nn.ReLU(), linear(6, 3))
    with pytest.warns(UserWarning, match=r"FDFA: no parameter learns by point '0.input'"):
        wrapped(net, torch.randn(4, 6), at=["0.input", "1"])


@pytest.mark.parametrize("outputs", ["samples", "tokens"])
def test_a_layer_that_no_other_reads_first_is_told_of(outputs: str) -> None:
    """As an encoder, whose last state goes into the decoder as its first."""

    def forward(m: Any, x: Tensor) -> Tensor:
        states, _ = m.d(x, m.r(x)[1])
        return m.o(states.mean(1) if outputs == "samples" else states)

    net = By(
        forward, r=nn.GRU(6, 6, batch_first=True), d=nn.GRU(6, 6, batch_first=True), o=linear(6, 3)
    )
    with pytest.warns(UserWarning, match="puts no point after layer 'r', whose features"):
        wrapped(net, torch.randn(*SEQUENCE), at="auto")


def test_an_input_without_features_is_refused() -> None:
    net = nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(30, 3))
    message = r"point '0.input' is at the input of a module, whose first argument must be features .* got torch.int64 \[4, 5\]"
    with pytest.raises(TypeError, match=message):
        wrapped(net, torch.randint(9, (4, 5)), at=["0.input", "1"])


@pytest.mark.parametrize(
    ("shares", "loss"),
    [
        (lambda y: F.log_softmax(y, 1), F.nll_loss),
        (nn.LogSoftmax(1), F.nll_loss),
        (lambda y: torch.sigmoid(y).squeeze(1), F.binary_cross_entropy),
    ],
)
def test_an_output_as_shares_trains_as_what_they_are_made_of(
    shares: Callable[[Tensor], Tensor], loss: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """The error at the output layer is the exact one, that of the loss through the shares."""
    is_binary = loss is F.binary_cross_entropy
    torch.manual_seed(0)
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 1, 0])
    net = By(
        lambda m, x: shares(m.o(torch.relu(m.a(x)))), a=linear(), o=linear(6, 1 if is_binary else 3)
    )
    as_logits = copy.deepcopy(net)
    as_logits.run = lambda m, x: m.o(torch.relu(m.a(x)))
    mine = wrapped(net, x, at="auto")
    theirs = wrapped(as_logits, x, at="auto")
    assert mine.network.output == "o"
    target = y.float() if is_binary else y
    loss(mine(x), target).backward()
    logits = theirs(x)
    if is_binary:
        F.binary_cross_entropy_with_logits(logits.squeeze(1), target).backward()
    else:
        F.cross_entropy(logits, target).backward()
    for a, b in zip(net.parameters(), as_logits.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert torch.equal(mine.feedback["o.input"], theirs.feedback["o.input"])
