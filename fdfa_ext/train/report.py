"""What a person reads of a run: lines, a CSV, a plot, a table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure  # without pyplot: needs no display

from fdfa_ext.train.training import EpochResult

EPOCH_HEADER = "epoch        lr  train loss  train acc  test acc  seconds"


def epoch_line(result: EpochResult) -> str:
    """One row below EPOCH_HEADER, accuracies in percent."""
    return (
        f"{result.epoch:5d}  {result.lr:8.2e}  {result.train_loss:10.5f}  {result.train_accuracy:8.2%}"
        f"   {result.test_accuracy:7.2%}   {result.seconds:6.2f}"
    ).rstrip()


def plot(histories: Mapping[str, Sequence[EpochResult]], title: str, file: Path) -> None:
    """Loss and accuracy over the epochs, a colour for each method, training dashed, test solid."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for number, (method, history) in enumerate(histories.items()):
        epochs = [result.epoch for result in history]
        # A marker, or a run of one epoch would draw nothing.
        style = {"color": f"C{number}", "marker": "." if len(history) < 30 else ""}
        for part, line in (("train", "--"), ("test", "-")):
            label = f"{method}, {part}"
            losses = [getattr(result, f"{part}_loss") for result in history]
            accuracies = [100 * getattr(result, f"{part}_accuracy") for result in history]
            loss_axes.plot(epochs, losses, linestyle=line, label=label, **style)
            accuracy_axes.plot(epochs, accuracies, linestyle=line, label=label, **style)
    loss_axes.set(xlabel="epoch", ylabel="cross-entropy, nats", yscale="log")
    accuracy_axes.set(xlabel="epoch", ylabel="accuracy, %")
    accuracy_axes.legend()
    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(file, dpi=120)


def final_table(histories: Mapping[str, Sequence[EpochResult]]) -> str:
    """The last epoch of each method, side by side; the best test accuracy is that of any epoch."""
    last = [history[-1] for history in histories.values()]
    best = [max(result.test_accuracy for result in history) for history in histories.values()]
    pace = [fmean(result.seconds for result in history) for history in histories.values()]
    rows = {
        "": list(histories),
        "epochs": [str(result.epoch) for result in last],
        "train loss": [f"{result.train_loss:.5f}" for result in last],
        "test loss": [f"{result.test_loss:.5f}" for result in last],
        "train accuracy": [f"{result.train_accuracy:.2%}" for result in last],
        "test accuracy": [f"{result.test_accuracy:.2%}" for result in last],
        "best test accuracy": [f"{accuracy:.2%}" for accuracy in best],
        "seconds per epoch": [f"{seconds:.2f}" for seconds in pace],
    }
    lines = (f"{name:18}" + "".join(f"{cell:>10}" for cell in cells) for name, cells in rows.items())
    return "\n".join(lines)
