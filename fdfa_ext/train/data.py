"""Image data sets as tensors in memory, and batches in a seeded order."""

import gzip
import importlib
import os
import pickle
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fdfa_ext.arguments import UserError

_CLASSES = {  # of each data set
    "digits": 10,
    "mnist": 10,
    "fashion-mnist": 10,
    "cifar10": 10,
    "cifar100": 100,
    "tiny-imagenet": 200,
}
DATASETS = tuple(_CLASSES)

_IDX_FILES = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)
# Files of a CIFAR set, the last one for testing, and the key of its labels.
_CIFAR = {
    "cifar10": ((*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"), b"labels"),
    "cifar100": (("train", "test"), b"fine_labels"),
}
_CIFAR_SHAPE = (3, 32, 32)
_TINY_SHAPE = (3, 64, 64)

# Where a file may lie below the data directory; the second is where torchvision puts it.
_FOLDERS = {
    "mnist": ("mnist", "MNIST/raw", "."),
    "fashion-mnist": ("fashion-mnist", "FashionMNIST/raw", "."),
    "cifar10": ("cifar10", "cifar-10-batches-py", "cifar10/cifar-10-batches-py", "."),
    "cifar100": ("cifar100", "cifar-100-python", "cifar100/cifar-100-python", "."),
    "tiny-imagenet": ("tiny-imagenet", "tiny-imagenet-200", "tiny-imagenet/tiny-imagenet-200", "."),
}
_TORCHVISION = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}


@dataclass(frozen=True)
class Dataset:
    """Images float32 [N, C, H, W] in [-1, 1], labels int64 [N] in [0, n_classes)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    n_classes: int = 10

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device) -> "Dataset":
        """The same data set on ``device``."""
        return Dataset(
            self.train_images.to(device),
            self.train_labels.to(device),
            self.test_images.to(device),
            self.test_labels.to(device),
            self.n_classes,
        )

    def head(self, n: int) -> "Dataset":
        """The first `n` images of training, and as many of testing, where there are more."""
        return Dataset(
            self.train_images[:n],
            self.train_labels[:n],
            self.test_images[:n],
            self.test_labels[:n],
            self.n_classes,
        )


def load_dataset(name: str, data_dir: Path | None = None) -> Dataset:
    """Read a whole data set into memory.

    ``digits`` (1797 images, 1 x 8 x 8, 1437 of them for training) comes with scikit-learn. ``mnist``
    and ``fashion-mnist`` (1 x 28 x 28) are read from the four idx files, gzipped or not, and
    ``cifar10`` and ``cifar100`` (3 x 32 x 32) from their python batches, in ``data_dir`` or its
    subfolder called as the data set. ``tiny-imagenet`` (3 x 64 x 64) is the unpacked folder, whose
    validation part is for testing; Pillow decodes it. Without ``data_dir`` the environment variable
    FDFA_DATA_DIR counts, then ``data``. Files that are missing are downloaded by torchvision where it
    is installed and knows them.

    Raises:
        UserError: a file is missing and could not be downloaded, or does not hold what it should.
    """
    if name == "digits":
        return _load_digits()
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    root = data_dir or Path(os.environ.get("FDFA_DATA_DIR", "data"))
    if name == "tiny-imagenet":
        return _load_tiny_imagenet(root)
    if name in _CIFAR:
        return _load_cifar(name, root)
    train_images, train_labels, test_images, test_labels = _locate(name, root, _IDX_FILES)
    return Dataset(
        *_read_idx_pair(train_images, train_labels), *_read_idx_pair(test_images, test_labels)
    )


def batches(
    images: Tensor, labels: Tensor, batch_size: int, order: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of ([batch_size, C, H, W], [batch_size]) pairs in a fresh order.

    The last pair may be smaller. ``order`` is a CPU generator, whatever the images' device, so that
    every device sees the same order.
    """
    permutation = torch.randperm(len(images), generator=order).to(images.device)
    for chosen in torch.split(permutation, batch_size):
        yield images[chosen], labels[chosen]


def _scale(pixels: np.ndarray) -> Tensor:
    """uint8 [N, C, H, W] -> float32 in [-1, 1], (x - 0.5) / 0.5 of x in [0, 1]."""
    return torch.from_numpy(pixels).float().div_(127.5).sub_(1)


def _load_digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise UserError("digits comes with scikit-learn: pip install scikit-learn") from None
    digits = load_digits()
    train, test = train_test_split(
        np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0
    )
    images = torch.from_numpy(digits.images).float().unsqueeze(1).div_(8).sub_(1)  # pixels are 0..16
    labels = torch.from_numpy(digits.target).long()
    return Dataset(images[train], labels[train], images[test], labels[test])


def _load_cifar(name: str, root: Path) -> Dataset:
    names, key = _CIFAR[name]
    parts = [_read_cifar(file, key, _CLASSES[name]) for file in _locate(name, root, names)]
    images, labels = zip(*parts, strict=True)
    return Dataset(
        _scale(np.concatenate(images[:-1])),
        torch.from_numpy(np.concatenate(labels[:-1])),
        _scale(images[-1]),
        torch.from_numpy(labels[-1]),
        _CLASSES[name],
    )


def _locate(name: str, root: Path, files: tuple[str, ...]) -> list[Path]:
    """The paths of all ``files``, plain or .gz, downloaded where they are missing and that works."""
    found = _find(name, root, files) or (_download(name, root) and _find(name, root, files))
    if not found:
        endings = " (or the same with .gz)" if files == _IDX_FILES else ""
        raise UserError(
            f"{name} is not in {root}: put {', '.join(files)}{endings} into {root / name}, "
            "or name their folder with --data-dir"
        )
    return found


def _find(name: str, root: Path, files: tuple[str, ...]) -> list[Path] | None:
    for folder in _FOLDERS[name]:
        candidates = [(root / folder / file, root / folder / f"{file}.gz") for file in files]
        paths = [next((path for path in pair if path.is_file()), None) for pair in candidates]
        if all(paths):
            return [path for path in paths if path]
    return None


def _download(name: str, root: Path) -> bool:
    """Whether torchvision is here and brought the files. It fails in many ways, all of them no."""
    try:
        datasets = importlib.import_module("torchvision.datasets")
        getattr(datasets, _TORCHVISION[name])(root=str(root), download=True)
    except Exception:
        return False
    return True


def _read_idx_pair(image_file: Path, label_file: Path) -> tuple[Tensor, Tensor]:
    images = _read_idx(image_file, n_dims=3)
    labels = _read_idx(label_file, n_dims=1)
    if len(images) != len(labels):
        raise UserError(f"{image_file} holds {len(images)} images, {label_file} {len(labels)} labels")
    _check_labels(label_file, labels, _CLASSES["mnist"])
    return _scale(images[:, None]), torch.from_numpy(labels).long()


def _read_idx(file: Path, n_dims: int) -> np.ndarray:
    """An idx file of unsigned bytes: magic number 0x000008 and n_dims, big-endian sizes, the bytes."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    header = 4 * (1 + n_dims)
    magic, expected_magic = content[:4].hex(), f"000008{n_dims:02x}"
    if magic != expected_magic:
        raise UserError(
            f"{file} starts with 0x{magic}, not with 0x{expected_magic} of an idx{n_dims} file"
        )
    if len(content) < header:
        raise UserError(f"{file} ends within its header of {header} bytes")
    shape = np.frombuffer(content, ">i4", count=n_dims, offset=4)
    expected = header + int(np.prod(shape, dtype=np.int64))
    if min(shape) < 1 or len(content) != expected:
        sizes = " x ".join(map(str, shape))
        raise UserError(f"{file} says {sizes}, that is {expected} bytes, but has {len(content)}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def _check_labels(file: Path, labels: np.ndarray, n_classes: int) -> None:
    if labels.min() < 0 or labels.max() >= n_classes:
        raise UserError(f"{file} holds the label {labels.max()}, outside 0 to {n_classes - 1}")


class _ArrayUnpickler(pickle.Unpickler):
    """Makes plain containers and numpy arrays and nothing else: a data file runs no code."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")
        allowed = {
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


def _read_cifar(file: Path, key: bytes, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """One python batch: images uint8 [N, 3, 32, 32] and labels int64 [N]."""
    try:
        with file.open("rb") as stream:
            batch = _ArrayUnpickler(stream, encoding="bytes").load()
        pixels, labels = np.asarray(batch[b"data"]), np.asarray(batch[key], dtype=np.int64)
    except Exception as error:  # a broken pickle raises nearly anything
        raise UserError(f"{file} is not a CIFAR python batch: {error}") from None
    n_pixels = int(np.prod(_CIFAR_SHAPE))
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), n_pixels) or not len(labels):
        raise UserError(
            f"{file} must hold uint8 data of {len(labels)} x {n_pixels}, one row a label, "
            f"got {pixels.dtype} of {' x '.join(map(str, pixels.shape))}"
        )
    _check_labels(file, labels, n_classes)
    return pixels.reshape(-1, *_CIFAR_SHAPE), labels


def _load_tiny_imagenet(root: Path) -> Dataset:
    """wnids.txt numbers the classes; train/CLASS/images; val/images with val_annotations.txt."""
    (names,) = _locate("tiny-imagenet", root, ("wnids.txt",))
    folder, n_classes = names.parent, _CLASSES["tiny-imagenet"]
    number = {name: i for i, name in enumerate(names.read_text().split())}
    if len(number) != n_classes:
        raise UserError(f"{names} must name {n_classes} classes, got {len(number)}")
    train = [
        (file, label)
        for name, label in number.items()
        for file in sorted((folder / "train" / name / "images").glob("*.JPEG"))
    ]
    annotations = folder / "val" / "val_annotations.txt"
    try:
        rows = [line.split("\t") for line in annotations.read_text().splitlines()]
        test = [(folder / "val" / "images" / row[0], number[row[1]]) for row in rows]
    except (OSError, IndexError, KeyError) as error:
        raise UserError(f"{annotations} cannot be read: {error!r}") from None
    for part, pairs in (("train", train), ("val", test)):
        if not pairs:
            raise UserError(f"tiny-imagenet has no images in {folder / part}")
    return Dataset(*_decode(train), *_decode(test), n_classes)


def _decode(pairs: list[tuple[Path, int]]) -> tuple[Tensor, Tensor]:
    try:
        from PIL import Image
    except ImportError:
        raise UserError("tiny-imagenet is in JPEG: pip install pillow") from None
    images = torch.empty(len(pairs), *_TINY_SHAPE)
    for image, (file, _) in zip(images, pairs, strict=True):
        try:
            pixels = np.array(Image.open(file).convert("RGB")).transpose(2, 0, 1)  # some are grey
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error}") from None
        if pixels.shape != _TINY_SHAPE:
            raise UserError(
                f"{file} must be of 64 x 64 pixels, got {pixels.shape[2]} x {pixels.shape[1]}"
            )
        image.copy_(_scale(pixels))
    return images, torch.tensor([label for _, label in pairs])
