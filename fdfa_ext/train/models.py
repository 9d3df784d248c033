"""The nets of the paper's experiments."""

from itertools import pairwise

from torch import nn

from fdfa_ext import FDFABlock, FDFAConv2d, FDFALinear
from fdfa_ext.train.errors import UserError

MODELS = ("mlp", "cnn", "cnn-two-pool")
_DENSE = 128  # units of the dense hidden layer of both convolutional nets


def build_net(
    model: str, image_shape: tuple[int, int, int], n_classes: int, hidden: int = 1, width: int = 800
) -> nn.Sequential:
    """An unwrapped net [N, C, H, W] -> logits [N, n_classes], initialised from torch's generator.

    - ``mlp``: ``hidden`` dense layers of ``width`` ReLU units.
    - ``cnn``: the net that the paper's authors published, 15C5-40C5-P2-128 with batch normalisation
      before each ReLU; each Conv-BN-ReLU is one block, perturbed after the ReLU and before the pool.
    - ``cnn-two-pool``: the one that the paper writes, 15C5-P2-40C5-P2-128 without normalisation.

    Biases are zero and W is Kaiming-uniform, but for ``cnn``, which keeps torch.nn's narrower uniform:
    batch normalisation makes the scale of W meaningless to the output, while Adam's steps have a fixed
    size, so that smaller weights learn faster. On Fashion-MNIST both backpropagation and FDFA are half
    a point better so after eight epochs. ``hidden`` and ``width`` count for ``mlp`` alone.

    Raises:
        UserError: the model is unknown, or the images are too small for its kernels.
    """
    channels, height, breadth = image_shape
    if model == "mlp":
        net = _mlp(channels * height * breadth, n_classes, hidden, width)
    elif model == "cnn":
        net = _cnn(channels, _pooled(model, height), _pooled(model, breadth), n_classes)
    elif model == "cnn-two-pool":
        net = _cnn_two_pool(channels, _pooled(model, height), _pooled(model, breadth), n_classes)
    else:
        raise UserError(f"unknown model {model!r}: choose one of {', '.join(MODELS)}")
    for parameter in net.parameters():
        if model != "cnn" and parameter.dim() > 1:  # the others are biases
            nn.init.kaiming_uniform_(parameter, nonlinearity="relu")
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    return net


def _mlp(n_inputs: int, n_classes: int, hidden: int, width: int) -> nn.Sequential:
    sizes = [n_inputs] + [width] * hidden
    layers = [FDFALinear(a, b, activation="relu") for a, b in pairwise(sizes)]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(sizes[-1], n_classes))


def _cnn(channels: int, height: int, breadth: int, n_classes: int) -> nn.Sequential:
    def block(layer: nn.Module, norm: nn.Module) -> FDFABlock:
        return FDFABlock(layer, norm, nn.ReLU())

    # No bias before a batch normalisation, which would subtract it again.
    return nn.Sequential(
        block(nn.Conv2d(channels, 15, 5, bias=False), nn.BatchNorm2d(15)),
        block(nn.Conv2d(15, 40, 5, bias=False), nn.BatchNorm2d(40)),
        nn.MaxPool2d(2),
        nn.Flatten(),
        block(nn.Linear(40 * height * breadth, _DENSE, bias=False), nn.BatchNorm1d(_DENSE)),
        nn.Linear(_DENSE, n_classes),
    )


def _cnn_two_pool(channels: int, height: int, breadth: int, n_classes: int) -> nn.Sequential:
    return nn.Sequential(
        FDFAConv2d(channels, 15, 5, activation="relu"),
        nn.MaxPool2d(2),
        FDFAConv2d(15, 40, 5, activation="relu"),
        nn.MaxPool2d(2),
        nn.Flatten(),
        FDFALinear(40 * height * breadth, _DENSE, activation="relu"),
        nn.Linear(_DENSE, n_classes),
    )


def _pooled(model: str, size: int) -> int:
    """Pixels left of ``size`` after the convolutions and pools; each 5-wide kernel takes 4."""
    left = (size - 8) // 2 if model == "cnn" else ((size - 4) // 2 - 4) // 2
    if left < 1:
        least = 10 if model == "cnn" else 16
        raise UserError(
            f"model {model} needs images of {least} x {least} pixels or more, got a side of {size}: "
            "use --model mlp or another --dataset"
        )
    return left
