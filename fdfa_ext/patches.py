"""Patches: squares of an image's pixels that have noise and feedback in common, channel by channel.

Pixel (h, w) is of patch (h // size, w // size), so patches at the far edges may be smaller. A sequence
in patches is an image of height 1. Other blocks have none.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_shape(shape: Sequence[int], size: int) -> list[int]:
    """[N, C, H, W] → [N, C, rows, columns] of patches; any other shape as it is."""
    if len(shape) != 4:
        return list(shape)
    return [*shape[:2], *(-(-side // size) for side in shape[2:])]


def as_image(sequence: Tensor, channels_first: bool) -> Tensor:
    """A view of [N, T, D], or with channels first of [N, D, T], as images [N, D, 1, T]."""
    return (sequence if channels_first else sequence.transpose(1, 2)).unsqueeze(2)


def as_sequence(image: Tensor, channels_first: bool) -> Tensor:
    """The sequence that `as_image` was given."""
    sequence = image.squeeze(2)
    return sequence if channels_first else sequence.transpose(1, 2)


def patch_pixels(shape: Sequence[int], size: int, device: torch.device) -> Tensor:
    """The number of pixels of each patch of images of this shape, [rows, columns]."""
    rows, columns = (
        (side - torch.arange(0, side, size, device=device)).clamp(max=size) for side in shape[2:]
    )
    return torch.outer(rows, columns)


def spread(values: Tensor, shape: Sequence[int], size: int) -> Tensor:
    """What patches have, [*, C, rows, columns], given to their pixels: [*, C, H, W] of `shape`."""
    if len(shape) != 4 or size == 1:
        return values
    rows, columns = (torch.arange(side, device=values.device) // size for side in shape[2:])
    return values[..., rows, :][..., columns].contiguous(memory_format=torch.channels_last)


def patch_means(images: Tensor, size: int) -> Tensor:
    """The mean over each patch's pixels of images [N, C, H, W]: [N, C, rows, columns]."""
    if images.dim() != 4 or size == 1:
        return images
    sides = [min(size, side) for side in images.shape[2:]]
    return F.avg_pool2d(images, sides, sides, ceil_mode=True, count_include_pad=False)
