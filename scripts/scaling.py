"""What a step of FDFA and of backpropagation computes, sends and waits for on 8 to 1024 GPUs, on paper.

    python scripts/scaling.py docs/scaling.md     write the tables of that page anew, and its figures

Nothing but the last table is measured. The page has the assumptions; the constants below are all of
them.
"""

import argparse
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

# An H100 SXM, eight in a node.
FLOPS = 0.4 * 989e12  # a second, of bfloat16 matrix products, at the share that good programs reach
NODE = 8
NVLINK = 450e9  # bytes a second and GPU, each way
NETWORK = 50e9  # bytes a second and GPU between nodes, 400 Gb/s
LATENCY = 10e-6  # seconds for each doubling of a collective's GPUs
BUCKET = 25 * 2**20  # bytes of DistributedDataParallel's messages
GPUS = (8, 64, 512, 1024)

FLOAT32, BFLOAT16 = 4, 2  # bytes


@dataclass(frozen=True)
class Layer:
    """Of one sample: a sample is a token where the output has tokens."""

    weights: int
    positions: float = 1  # how often a sample uses each weight
    extra: float = 0  # flops of the forward beside the weights', as attention's
    reads_point: bool = True  # whether its input is a point or the network's, which needs no gradient

    @property
    def forward(self) -> float:
        return 2 * self.weights * self.positions + self.extra


@dataclass(frozen=True)
class Net:
    """points: features of each, in patches."""

    name: str
    layers: list[Layer]
    points: list[int]
    outputs: int
    batch: int  # samples on each GPU
    weight_bytes: int = FLOAT32  # of a gradient that is sent
    behind: Layer | None = None  # what stands behind the output, on which exact gradients go back

    @property
    def parameters(self) -> int:
        return sum(layer.weights for layer in self.all_layers)

    @property
    def all_layers(self) -> list[Layer]:
        return [*self.layers, self.behind] if self.behind else self.layers

    @property
    def feedback(self) -> int:
        """Numbers of all B."""
        return self.outputs * sum(self.points)

    @property
    def bp_forward(self) -> float:
        return sum(layer.forward for layer in self.all_layers)

    @property
    def bp_backward(self) -> float:
        first = self.layers[0].forward  # whose input gets no gradient
        return 2 * self.bp_forward - first

    @property
    def forward(self) -> float:
        """Of values and tangents. The first layer's input has no tangent, and the output's goes no
        further."""
        behind = self.behind.forward if self.behind else 0.0
        return 2 * self.bp_forward - self.layers[0].forward - behind

    @property
    def gradients(self) -> float:
        """Of weights, of inputs between points, dᵀu and eB."""
        inner = sum(layer.forward for layer in self.all_layers if not layer.reads_point)
        return self.bp_forward + inner + 4 * self.feedback

    @property
    def kept_weights(self) -> int:
        """Those that the gradients need again."""
        return sum(layer.weights for layer in self.all_layers if not layer.reads_point)


def mlp(*sizes: int) -> Net:
    layers = [Layer(a * b) for a, b in pairwise(sizes)]
    return Net("-".join(map(str, sizes)), layers, [*sizes[1:-1]], sizes[-1], batch=64)


def cnn() -> Net:
    layers = [
        Layer(1 * 15 * 25, 24 * 24),
        Layer(15 * 40 * 25, 20 * 20),
        Layer(40 * 100 * 128),
        Layer(128 * 10),
    ]
    return Net("cnn, Fashion-MNIST", layers, [15 * 24 * 24, 40 * 20 * 20, 128], 10, batch=64)


def resnet50(patch: int) -> Net:
    """Points at the ends of the stem and of each block, as `at="auto"` has them."""
    layers, points = [Layer(3 * 64 * 49, 112**2)], [64 * math.ceil(56 / patch) ** 2]
    channels, side = 64, 56
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            before = side
            side = side // stride if block == 0 else side
            layers += [
                Layer(channels * width, before**2),
                Layer(width * width * 9, side**2, reads_point=False),
                Layer(width * 4 * width, side**2, reads_point=False),
            ]
            if block == 0:
                layers.append(Layer(channels * 4 * width, side**2))
            channels = 4 * width
            points.append(channels * math.ceil(side / patch) ** 2)
    return Net(f"ResNet-50, patch={patch}", [*layers, Layer(2048 * 1000)], points, 1000, batch=64)


def transformer(output: str) -> Net:
    """Points at the inputs of dense layers, as `at="auto"` has them, and before the head."""
    width, depth, vocabulary, tokens = 2048, 18, 32000, 2048
    block = [
        Layer(3 * width**2),
        Layer(width**2, extra=2 * tokens * width, reads_point=False),  # with causal attention
        Layer(4 * width**2),
        Layer(4 * width**2, reads_point=False),
    ]
    points = [width] * 2 * depth
    if output == "vocabulary":
        layers, k = [*block * depth, Layer(width * vocabulary)], vocabulary
        return Net("transformer, K = vocabulary", layers, [*points, width], k, 4 * tokens, BFLOAT16)
    head = Layer(width * vocabulary, reads_point=False)
    return Net("transformer, K = width", block * depth, points, width, 4 * tokens, BFLOAT16, head)


NETS = [
    mlp(784, 800, 10),
    mlp(784, 800, 800, 800, 10),
    cnn(),
    resnet50(8),
    transformer("vocabulary"),
    transformer("width"),
]


def all_reduce(size: float, gpus: int) -> float:
    """Seconds: within the nodes by NVLink, and between them each GPU its part."""
    nodes = max(gpus // NODE, 1)
    inner = min(gpus, NODE)
    time = 2 * (inner - 1) / inner * size / NVLINK
    time += 2 * (nodes - 1) / nodes * size / inner / NETWORK
    return time + 2 * LATENCY * math.log2(gpus)


def all_gather(size: float, gpus: int) -> float:
    """Seconds. size: bytes of each GPU. All of them come into each node, and within it to each GPU."""
    nodes = max(gpus // NODE, 1)
    time = (gpus - 1) * size / NVLINK + (nodes - 1) * size / NETWORK
    return time + LATENCY * math.log2(gpus)


@dataclass(frozen=True)
class Step:
    """Of data parallel training."""

    sent: float  # bytes that each GPU sends
    messages: int
    seconds: float


def buckets(net: Net) -> int:
    return math.ceil(net.parameters * net.weight_bytes / BUCKET)


def exposed(net: Net, gpus: int, hidden: float) -> float:
    """Seconds by which the sum of the weights' gradients outlasts the work beside which it runs."""
    return max(all_reduce(net.parameters * net.weight_bytes, gpus) - hidden, 0)


def ring(size: float, gpus: int) -> float:
    """Bytes that a GPU sends in an all-reduce."""
    return 2 * (gpus - 1) / gpus * size


def backpropagation(net: Net, gpus: int) -> Step:
    backward = net.batch * net.bp_backward / FLOPS
    seconds = net.batch * net.bp_forward / FLOPS + backward + exposed(net, gpus, backward)
    return Step(ring(net.parameters * net.weight_bytes, gpus), buckets(net), seconds)


def fdfa(net: Net, gpus: int, gathers: bool) -> Step:
    """B waits for what is learned of it, and the gradients for B."""
    size = FLOAT32 * (net.batch * net.outputs if gathers else net.feedback)
    rows = FLOAT32 * 8
    sent = ring(net.parameters * net.weight_bytes, gpus) + (gpus - 1) / gpus * rows
    gradients = net.gradients
    if gathers:
        sent += (gpus - 1) * size  # by a ring, each part through each GPU
        wait = all_gather(size, gpus)
        gradients += 2 * net.feedback * (gpus - 1)  # dᵀu of the other GPUs' samples
    else:
        sent += ring(size, gpus)
        wait = all_reduce(size, gpus)
    work = net.batch * gradients / FLOPS
    seconds = net.batch * net.forward / FLOPS + all_gather(rows, gpus) + wait + work
    return Step(sent, buckets(net) + 2, seconds + exposed(net, gpus, work))


def sharded(net: Net, gpus: int) -> tuple[float, float]:
    """Bytes that each GPU sends with its weights divided among all, by backpropagation and FDFA.

    Each gathers the weights for its forward and again for what goes back through them, and sends each
    gradient to the GPU that has its weight. What FDFA learns of B goes to all.
    """
    part = (gpus - 1) / gpus * net.weight_bytes
    feedback = ring(FLOAT32 * net.feedback, gpus)
    return part * 3 * net.parameters, part * (2 * net.parameters + net.kept_weights) + feedback


@dataclass(frozen=True)
class Pipelined:
    """A step in equal stages."""

    time: float  # over that of backpropagation without waiting
    waiting: float  # share of the time in which a stage has nothing to do
    kept: list[int]  # by each stage: the most micro-batches whose activations it has at a time
    events: list[tuple[int, float, float, bool]]  # stage, start, length, whether it is a forward


def pipeline(net: Net, stages: int, batches: int) -> tuple[Pipelined, Pipelined]:
    """By backpropagation (1F1B) and by FDFA."""
    work = batches * (net.bp_forward + net.bp_backward)
    return (
        _simulated(stages, batches, net.bp_forward, net.bp_backward, work, is_backpropagation=True),
        _simulated(stages, batches, net.forward, net.gradients, work, is_backpropagation=False),
    )


def _simulated(
    stages: int, batches: int, forward: float, gradients: float, unit: float, is_backpropagation: bool
) -> Pipelined:
    """A stage that is free takes the gradients of its next micro-batch if they can start, or else a
    forward. In backpropagation they can when the next stage has its own, and a stage has no more
    micro-batches under way than there are stages from it to the end. In FDFA they can when the last
    stage has e and d of all micro-batches, since B moves first.
    """
    forwards: list[list[float]] = [[] for _ in range(stages)]  # when each micro-batch was through
    backwards: list[list[float]] = [[] for _ in range(stages)]
    free = [0.0] * stages
    kept = [0] * stages
    events = []

    def next_of(stage: int) -> tuple[float, bool]:
        """When it can start what, True for a forward."""
        i, j = len(forwards[stage]), len(backwards[stage])
        if not is_backpropagation:
            error = [forwards[-1][-1]] * batches if len(forwards[-1]) == batches else []
        else:
            error = forwards[-1] if stage == stages - 1 else backwards[stage + 1]
        start = max(free[stage], error[j]) if j < min(i, len(error)) else math.inf
        gradient = (start, False)
        inputs = forwards[stage - 1] if stage else [0.0] * batches
        most = stages - stage if is_backpropagation else batches
        if i < min(batches, len(inputs)) and i - j < most:
            return min(gradient, (max(free[stage], inputs[i]), True))
        return gradient

    waiting = [next_of(stage) for stage in range(stages)]
    for _ in range(2 * stages * batches):
        (start, is_forward), stage = min(zip(waiting, range(stages), strict=True))
        length = forward if is_forward else gradients
        events.append((stage, start / unit, length / unit, is_forward))
        free[stage] = start + length
        (forwards if is_forward else backwards)[stage].append(free[stage])
        kept[stage] = max(kept[stage], len(forwards[stage]) - len(backwards[stage]))
        tells_all = stage == stages - 1 and len(forwards[stage]) == batches
        for other in range(stages) if tells_all else range(max(stage - 1, 0), min(stage + 2, stages)):
            waiting[other] = next_of(other)
    busy = batches * (forward + gradients)
    return Pipelined(max(free) / unit, 1 - busy / max(free), kept, events)


def table(header: list[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def readable(size: float) -> str:
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 1000:
            return f"{size:.3g} {unit}"
    return f"{size / 1000:.3g} TB"


def net_table() -> str:
    rows = []
    for net in NETS:
        bp, own = net.bp_forward + net.bp_backward, net.forward + net.gradients
        gradient = net.parameters * net.weight_bytes
        rows.append(
            [
                net.name,
                f"{net.parameters / 1e6:.3g}",
                str(net.outputs),
                f"{sum(net.points):,}",
                readable(gradient),
                readable(FLOAT32 * net.feedback),
                f"{bp / 1e9:.3g}",
                f"{own / 1e9:.3g}",
                f"{own / bp:.2f}",
            ]
        )
    numbers = ["million weights", "K", "ΣD", "weight gradients", "B"]
    work = ["GFLOP a sample, backpropagation", "FDFA", "ratio"]
    return table(["net", *numbers, *work], rows)


def data_parallel_table() -> str:
    rows = []
    for net in NETS:
        for gpus in GPUS:
            steps = [
                backpropagation(net, gpus),
                *(fdfa(net, gpus, gathers) for gathers in (False, True)),
            ]
            rows.append(
                [net.name, str(gpus)]
                + [f"{readable(s.sent)} in {s.messages}" for s in steps]
                + [f"{s.seconds * 1e3:.3g}" for s in steps]
            )
    ways = ["backpropagation", "FDFA, mean of G", "FDFA, gathered d"]
    return table(["net", "GPUs", *(f"{w}: sent" for w in ways), *(f"{w}: ms" for w in ways)], rows)


def sharded_table() -> str:
    rows = [[net.name, *(readable(size) for size in sharded(net, 1024))] for net in NETS]
    return table(["net", "backpropagation", "FDFA"], rows)


def stages_table() -> str:
    rows = []
    for net in PIPELINED:
        for stages in (2, 8, 64):
            for batches in (stages, 4 * stages):
                row = [net.name, str(stages), str(batches)]
                for way in pipeline(net, stages, batches):
                    mean = sum(way.kept) / stages
                    row += [f"{way.time:.2f}", f"{way.waiting:.0%}", f"{max(way.kept)}, {mean:.3g}"]
                rows.append(row)
    of = ("time", "waiting", "kept")
    ways = [f"{way}: {what}" for way in ("1F1B", "FDFA") for what in of]
    return table(["net", "stages p", "micro-batches", *ways], rows)


def measured_table() -> str:
    """Of what scripts/pipeline_timeline.py has recorded."""
    record = Path(__file__).parents[1] / "docs" / "records" / "pipeline.csv"
    rows, ways = [], []
    for line in record.read_text().splitlines():
        if match := re.fullmatch(r"# (\d+) processes: (.*)", line):
            times = [words.removesuffix(" ms").rsplit(" ", 1) for words in match[2].split("; ")]
            ways = [way for way, _ in times]
            numbers = [float(ms) for _, ms in times]
            ratios = [f"{numbers[way] / numbers[2 + way]:.2f}" for way in (0, 1)]
            rows.append([match[1], *(ms for _, ms in times), *ratios])
    ratio = [f"{way} / one process" for way in ("1F1B", "FDFA")]
    return table(["processes", *ways, *ratio], rows)


STAGES = (2, 4, 8, 16, 32, 64)
PIPELINED = (NETS[1], NETS[3], NETS[5])
TABLES = {
    "nets": net_table,
    "data parallel": data_parallel_table,
    "sharded": sharded_table,
    "stages": stages_table,
    "measured stages": measured_table,
}


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    gpus = [8 * 2**i for i in range(8)]
    for net, color in zip(PIPELINED, ("tab:green", "tab:blue", "tab:orange"), strict=True):
        alone = net.batch * (net.bp_forward + net.bp_backward) / FLOPS
        name = net.name.split(",")[0]
        for label, style, step in (
            ("backpropagation", ":", lambda p, net=net: backpropagation(net, p)),
            ("FDFA, mean of G", "-", lambda p, net=net: fdfa(net, p, False)),
            ("FDFA, gathered d", "--", lambda p, net=net: fdfa(net, p, True)),
        ):
            times = [step(p).seconds / alone for p in gpus]
            if net is not PIPELINED[0]:  # which is too small for its times to mean anything
                left.plot(gpus, times, style, color=color, label=f"{name}: {label}")
        for label, style, which in (("backpropagation (1F1B)", ":", 0), ("FDFA", "-", 1)):
            times = [pipeline(net, p, p)[which].time for p in STAGES]
            right.plot(STAGES, times, style, color=color, label=f"{name}: {label}")
    left.set(xscale="log", xlabel="GPUs", ylabel="step / backpropagation on one GPU", ylim=(0, 6))
    left.set_title("data parallel, the same batch on each GPU", fontsize=10)
    right.set(
        xscale="log",
        xlabel="stages, and micro-batches",
        ylabel="step / backpropagation without waiting",
    )
    right.set_title("stages", fontsize=10)
    right.set_ylim(1, 2.05)
    for axes, ticks in ((left, gpus), (right, STAGES)):
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def draw_stages(path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(2, 2, figsize=(11, 6.5), sharex=True)
    for row, stages in zip(all_axes, (4, 64), strict=True):
        ways = zip(
            row, ("backpropagation, 1F1B", "FDFA"), pipeline(NETS[1], stages, stages), strict=True
        )
        for axes, name, way in ways:
            for stage in range(stages):
                for forward, color in ((True, "tab:blue"), (False, "tab:orange")):
                    spans = [e[1:3] for e in way.events if e[0] == stage and e[3] == forward]
                    look = {"facecolor": color, "edgecolor": "white" if stages < 64 else "none"}
                    axes.broken_barh(spans, (stage - 0.5, 1), **look)
            axes.invert_yaxis()
            axes.set_title(f"{name}, {stages} stages and micro-batches", fontsize=10)
            axes.set(ylabel="stage", yticks=range(0, stages, max(stages // 8, 1)))
    for axes in all_axes[-1]:
        axes.set_xlabel("time / backpropagation without waiting")
    names = {"forward": "tab:blue", "gradients": "tab:orange"}
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in names.values()]
    all_axes[0, 0].legend(handles, names, fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def written(page: str) -> str:
    """The page with its tables made anew: each stands between its marks."""
    for name, make in TABLES.items():
        marks = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        anew = f"\n{make()}\n\n"
        page, found = re.subn(marks, lambda m, anew=anew: m[1] + anew + m[2], page, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"the page must have the marks of table '{name}' once; got {found}")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("page", type=Path)
    page = parser.parse_args().page
    page.write_text(written(page.read_text()))
    draw(page.parent / "figures" / "scaling.png")
    draw_stages(page.parent / "figures" / "stages.png")


if __name__ == "__main__":
    main()
