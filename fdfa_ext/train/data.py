"""Image data sets as tensors in memory, and batches in a seeded order."""

import gzip
import hashlib
import importlib
import math
import os
import pickle
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fdfa_ext.arguments import UserError
from fdfa_ext.train.files import check_regular

_CLASSES = {  # of the data sets whose files do not name them
    "digits": 10,
    "mnist": 10,
    "fashion-mnist": 10,
    "cifar10": 10,
    "cifar100": 100,
}
DATASETS = (*_CLASSES, "tiny-imagenet")

_MOST_PICKLED = 2**28  # bytes of a pickle, or of a list of names
_MOST_BYTES = 2**32  # of a data file, unpacked: far above every set's
_IDX_FILES = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)
# Files of a CIFAR set, the last one for testing, and the key of its labels.
_CIFAR = {
    "cifar10": ((*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"), b"labels"),
    "cifar100": (("train", "test"), b"fine_labels"),
}
_CIFAR_SHAPE = (3, 32, 32)
_INTEGERS = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)}  # numpy's names of dtypes
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
    """Images float32 [N, C, H, W] in [-1, 1], labels int64 [N] in [0, n_classes).

    Raises:
        UserError: they are something else, NaN and infinity included.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    n_classes: int = 10

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            if images.dtype != torch.float32 or images.dim() != 4 or not images.numel():
                raise UserError(f"{part}_images must be float32 [N, C, H, W], got {_words(images)}")
            if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
                raise UserError(
                    f"{part}_labels must be int64 [{len(images)}], one an image, got {_words(labels)}"
                )
            if not images.isfinite().all():
                raise UserError(f"{part}_images hold NaN or infinity")
            if labels.min() < 0 or labels.max() >= self.n_classes:
                raise UserError(
                    f"{part}_labels are from {labels.min()} to {labels.max()}, outside 0 to "
                    f"{self.n_classes - 1}"
                )
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            sizes = (_words(self.train_images), _words(self.test_images))
            raise UserError("images to train with and to test with differ: {} and {}".format(*sizes))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    def digest(self) -> str:
        """Of sizes and labels, by which a data set is known again. The bits of images may depend on
        what decodes them."""
        found = hashlib.sha256(repr([self.n_classes, self.image_shape]).encode())
        for labels in (self.train_labels, self.test_labels):
            found.update(labels.cpu().numpy().tobytes())
        return found.hexdigest()

    def to(self, device: torch.device) -> "Dataset":
        """The same data set on ``device``."""
        return replace(
            self,
            train_images=self.train_images.to(device),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
        )

    def head(self, n: int) -> "Dataset":
        """The first `n` images of training, and as many of testing, where there are more."""
        return replace(
            self,
            train_images=self.train_images[:n],
            train_labels=self.train_labels[:n],
            test_images=self.test_images[:n],
            test_labels=self.test_labels[:n],
        )


def _words(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} [{', '.join(map(str, t.shape))}]"


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
    except ModuleNotFoundError:
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
    header, expected_magic = 4 * (1 + n_dims), f"000008{n_dims:02x}"
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            start = stream.read(header)
            if (magic := start[:4].hex()) != expected_magic:
                raise UserError(
                    f"{file} starts with 0x{magic}, not with 0x{expected_magic} of an idx{n_dims} file"
                )
            if len(start) < header:
                raise UserError(f"{file} ends within its header of {header} bytes")
            shape = np.frombuffer(start, ">i4", offset=4).tolist()
            sizes, n = " x ".join(map(str, shape)), math.prod(shape)
            if min(shape) < 1 or n > _MOST_BYTES:
                raise UserError(f"{file} says {sizes}, which no such set has")
            content = bytearray()
            # No more than is wanted, whatever the rest unpacks to.
            while len(content) <= n and (block := stream.read(2**20)):
                content += block
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if len(content) != n:
        found = "more" if len(content) > n else header + len(content)
        raise UserError(f"{file} says {sizes}, that is {header + n} bytes, but has {found}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _check_labels(file: Path, labels: np.ndarray, n_classes: int) -> None:
    wrong = labels[(labels < 0) | (labels >= n_classes)]
    if len(wrong):
        raise UserError(f"{file} holds the label {wrong[0]}, outside 0 to {n_classes - 1}")


class _PickledArray:
    """An array in a pickle, before anybody has looked at it: what numpy hands to `__setstate__`."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def read(self) -> np.ndarray:
        _, shape, dtype, is_fortran, content = self.state
        if not isinstance(dtype.name, str) or dtype.name not in _INTEGERS:
            raise pickle.UnpicklingError(f"it holds an array of {str(dtype.name)[:80]!r}")
        array = np.frombuffer(content, np.dtype(dtype.state[1] + dtype.name))
        return array.reshape(shape, order="F" if is_fortran else "C").copy()


class _PickledDtype(_PickledArray):
    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name.decode() if isinstance(name, bytes) else name


def _latin1(text: str, encoding: Any) -> bytes:
    return text.encode("latin1")


class _NamesOnly(dict[Any, Any]):
    """Takes no key whose hash is that of a structure, which may take forever."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, bytes | str):
            raise pickle.UnpicklingError("it has a dict of other keys than strings")
        super().__setitem__(key, value)


def _load_dict(unpickler: Any) -> None:
    items, names = unpickler.pop_mark(), _NamesOnly()
    for key, value in zip(items[::2], items[1::2], strict=True):
        names[key] = value
    unpickler.append(names)


class _ArrayUnpickler(pickle._Unpickler):
    """Makes plain containers and arrays of integers and nothing else: a data file runs no code.

    It is the one in Python, whose memory no number in the file decides. numpy's own functions trust
    what the file says.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        **{
            opcode: load
            for opcode, load in pickle._Unpickler.dispatch.items()
            if opcode not in (pickle.EMPTY_SET[0], pickle.ADDITEMS[0], pickle.FROZENSET[0])
        },
        pickle.EMPTY_DICT[0]: lambda self: self.append(_NamesOnly()),
        pickle.DICT[0]: _load_dict,
    }

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy._core.multiarray", "_reconstruct"): lambda *_: _PickledArray(),
            ("numpy", "ndarray"): None,
            ("numpy", "dtype"): _PickledDtype,
            ("_codecs", "encode"): _latin1,
        }
        key = (module.replace("numpy.core", "numpy._core"), name)
        if key not in allowed:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return allowed[key]


def _read_cifar(file: Path, key: bytes, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """One python batch: images uint8 [N, 3, 32, 32] and labels int64 [N]."""
    check_regular(file, _MOST_PICKLED)
    try:
        with file.open("rb") as stream:
            batch = _ArrayUnpickler(stream, encoding="bytes").load()
        pixels, labels = batch[b"data"].read(), batch[key]
        if isinstance(labels, _PickledArray):
            labels = labels.read().tolist()
        if not all(type(label) is int for label in labels):
            raise TypeError("its labels are no whole numbers")
        labels = np.array(labels, np.int64)
    except Exception as error:  # a broken pickle raises nearly anything
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error).split("\n")[0]
        raise UserError(f"{file} is not a CIFAR python batch: {why}") from None
    n_pixels = math.prod(_CIFAR_SHAPE)
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), n_pixels) or not len(labels):
        raise UserError(
            f"{file} must hold uint8 data of {len(labels)} x {n_pixels}, one row a label, "
            f"got {pixels.dtype} of {' x '.join(map(str, pixels.shape))}"
        )
    _check_labels(file, labels, n_classes)
    return pixels.reshape(-1, *_CIFAR_SHAPE), labels


def _load_tiny_imagenet(root: Path) -> Dataset:
    """wnids.txt numbers the classes; train/CLASS/images; val/images with val_annotations.txt."""
    (file,) = _locate("tiny-imagenet", root, ("wnids.txt",))
    folder, names = file.parent, [name for (name,) in _read_columns(file, 1)]
    number = {name: i for i, name in enumerate(names)}
    if len(number) < len(names) or not names:
        raise UserError(f"{file} must name classes, each once, got {len(number)} in {len(names)} lines")
    train = [
        (image, label)
        for name, label in number.items()
        for image in sorted((folder / "train" / name / "images").glob("*.JPEG"))
    ]
    annotations = folder / "val" / "val_annotations.txt"
    test = []
    for image, name in _read_columns(annotations, 2):
        if name not in number:
            raise UserError(f"{annotations} names the class {name!r}, which is not in {file}")
        test.append((folder / "val" / "images" / image, number[name]))
    if len(dict(test)) < len(test):
        raise UserError(f"{annotations} names an image twice")
    if len(with_images := {label for _, label in train}) < len(names):
        missing = next(name for name in names if number[name] not in with_images)
        raise UserError(f"{file} names {missing}, which has no images in {folder / 'train' / missing}")
    if not test:
        raise UserError(f"{annotations} names no images")
    for path, _ in (*train, *test):
        if not path.is_file():
            raise UserError(f"{path} is missing, or no file")
    return Dataset(*_decode(train), *_decode(test), len(names))


def _read_columns(file: Path, n: int) -> Iterator[list[str]]:
    """The first `n` words of each line, each the name of a file or folder and no path elsewhere."""
    check_regular(file, _MOST_PICKLED)
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    for i, line in enumerate(lines, 1):
        words = line.split()[:n]
        if len(words) < n or not all(re.fullmatch(r"\w[\w.-]*", word) for word in words):
            raise UserError(f"{file} must hold names, {n} a line, got {line[:80]!r} in line {i}")
        yield words


def _decode(pairs: list[tuple[Path, int]]) -> tuple[Tensor, Tensor]:
    try:
        from PIL import Image
    except ImportError:
        raise UserError("tiny-imagenet is in JPEG: pip install pillow") from None
    images = torch.empty(len(pairs), *_TINY_SHAPE)
    _, height, width = _TINY_SHAPE
    for image, (file, _) in zip(images, pairs, strict=True):
        try:
            with Image.open(file, formats=["JPEG"]) as opened:
                if opened.size != (width, height):
                    size = " x ".join(map(str, opened.size))
                    raise UserError(f"{file} must be of {width} x {height} pixels, got {size}")
                pixels = np.array(opened.convert("RGB")).transpose(2, 0, 1)  # some are grey
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{file} cannot be read: {error}") from None
        image.copy_(_scale(pixels))
    return images, torch.tensor([label for _, label in pairs])
