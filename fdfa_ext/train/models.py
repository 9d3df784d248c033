"""The nets of the paper's experiments."""

from collections.abc import Callable
from itertools import pairwise

from torch import nn

from fdfa_ext import FDFABlock, FDFAConv2d, FDFALinear
from fdfa_ext.arguments import UserError

MODELS = ("mlp", "cnn", "cnn-pooled", "cnn-unnormalised", "cnn-two-pool", "alexnet")
IMAGE_SIDES = {"alexnet": 224}  # in pixels, of nets that the paper trains on enlarged images
NORMALISED = (
    "cnn",
    "cnn-pooled",
    "alexnet",
)  # by batch normalisation, behind which zero weights stay zero
WEIGHTS = ("random", "zero")
_DENSE = 128  # units of the dense hidden layer of both small convolutional nets
# Side of an image, in pixels.
_SMALLEST = {"cnn": 10, "cnn-pooled": 10, "cnn-unnormalised": 10, "cnn-two-pool": 16, "alexnet": 63}


def build_net(
    model: str,
    image_shape: tuple[int, int, int],
    n_classes: int,
    hidden: int = 1,
    width: int = 800,
    weights: str = "random",
) -> nn.Sequential:
    """An unwrapped net [N, C, H, W] -> logits [N, n_classes], initialised from torch's generator.

    - ``mlp``: ``hidden`` dense layers of ``width`` ReLU units.
    - ``cnn``: 15C5-40C5-P2-128 with one pool, as the paper's authors published it; each Conv-BN-ReLU is
      one block, perturbed after the ReLU and before the pool.
    - ``cnn-pooled``: the same layers, the pool within the second block: perturbed after it
      (docs/estimation.md).
    - ``cnn-unnormalised``: ``cnn`` without batch normalisation, for ``fg-w`` (docs/results.md).
    - ``cnn-two-pool``: the one that the paper writes, 15C5-P2-40C5-P2-128 without normalisation.
    - ``alexnet``: torchvision's sizes without dropout; each Conv-BN-ReLU-Pool is one block.

    Batch normalisation follows the convolutions alone, as the paper has it. The authors' program
    normalises dense layers too, which fits the paper's tables worse (docs/results.md).

    W and biases keep torch.nn's uniform start, as in the authors' code: Kaiming's with slope √5, so √6
    times narrower than for ReLU (docs/results.md compares them). ``hidden`` and ``width`` count for
    ``mlp`` alone. With ``weights="zero"``, which direct feedback alone can start from, every W is zero;
    the biases then open the ReLUs.

    Raises:
        UserError: the model is unknown, or the images are too small for its kernels.
    """
    channels, height, breadth = image_shape
    if model not in MODELS:
        raise UserError(f"unknown model {model!r}: choose one of {', '.join(MODELS)}")
    least = _SMALLEST.get(model, 1)
    if min(height, breadth) < least:
        raise UserError(
            f"model {model} needs images of {least} x {least} pixels or more, got a side of "
            f"{min(height, breadth)}: take model mlp, or a data set of larger images"
        )
    if model == "mlp":
        net = _mlp(channels * height * breadth, n_classes, hidden, width)
    elif model == "alexnet":
        net = _alexnet(channels, n_classes)
    else:
        layers = _CONVOLUTIONS[model](channels)
        features = 40 * _pooled(model, height) * _pooled(model, breadth)
        net = nn.Sequential(
            *layers, nn.Flatten(), _dense(features, _DENSE), nn.Linear(_DENSE, n_classes)
        )
    if weights == "zero":
        for parameter in net.parameters():
            if parameter.dim() > 1:  # the others are biases
                nn.init.zeros_(parameter)
    return net


def _dense(before: int, after: int) -> FDFALinear:
    return FDFALinear(before, after, activation="relu")


def _mlp(n_inputs: int, n_classes: int, hidden: int, width: int) -> nn.Sequential:
    sizes = [n_inputs] + [width] * hidden
    layers = [_dense(a, b) for a, b in pairwise(sizes)]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(sizes[-1], n_classes))


def _conv_block(before: int, after: int, kernel: int, *then: nn.Module, **geometry: int) -> FDFABlock:
    # No bias before a batch normalisation, which would subtract it again.
    conv = nn.Conv2d(before, after, kernel, bias=False, **geometry)  # type: ignore[arg-type]
    return FDFABlock(conv, nn.BatchNorm2d(after), nn.ReLU(), *then)


def _alexnet(channels: int, n_classes: int) -> nn.Sequential:
    def pool() -> nn.Module:
        return nn.MaxPool2d(3, stride=2)

    return nn.Sequential(
        _conv_block(channels, 64, 11, pool(), stride=4, padding=2),
        _conv_block(64, 192, 5, pool(), padding=2),
        _conv_block(192, 384, 3, padding=1),
        _conv_block(384, 256, 3, padding=1),
        _conv_block(256, 256, 3, pool(), padding=1),
        nn.AdaptiveAvgPool2d(6),  # of 224 x 224 pixels just these are left
        nn.Flatten(),
        _dense(256 * 6 * 6, 4096),
        _dense(4096, 4096),
        nn.Linear(4096, n_classes),
    )


def _conv(before: int, after: int) -> FDFAConv2d:
    return FDFAConv2d(before, after, 5, activation="relu")


def _pool() -> nn.Module:
    return nn.MaxPool2d(2)


# The layers before the dense ones, for so many channels of an image.
_CONVOLUTIONS: dict[str, Callable[[int], list[nn.Module]]] = {
    "cnn": lambda c: [_conv_block(c, 15, 5), _conv_block(15, 40, 5), _pool()],
    "cnn-pooled": lambda c: [_conv_block(c, 15, 5), _conv_block(15, 40, 5, _pool())],
    "cnn-unnormalised": lambda c: [_conv(c, 15), _conv(15, 40), _pool()],
    "cnn-two-pool": lambda c: [_conv(c, 15), _pool(), _conv(15, 40), _pool()],
}


def _pooled(model: str, size: int) -> int:
    """Pixels left of ``size`` after the convolutions and pools; each 5-wide kernel takes 4."""
    return ((size - 4) // 2 - 4) // 2 if model == "cnn-two-pool" else (size - 8) // 2
