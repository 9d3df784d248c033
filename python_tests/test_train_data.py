"""Data sets: what the readers accept, how they refuse the rest, and the order of batches."""

import gzip
import os
import pickle
import struct
import sys
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fdfa_ext.arguments import UserError
from fdfa_ext.train.data import Dataset, batches, load_dataset

CIFAR_FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def idx_bytes(array: np.ndarray) -> bytes:
    sizes = struct.pack(f">{array.ndim}i", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, compressed: bool = False) -> dict[str, np.ndarray]:
    """Four small idx files with 6 training and 4 test images of 5 x 7 pixels."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for part, n in (("train", 6), ("t10k", 4)):
        arrays[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 5, 7))
        arrays[f"{part}-labels-idx1-ubyte"] = rng.integers(0, 10, n)
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        content = idx_bytes(array)
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return arrays


def write_cifar(folder: Path) -> dict[str, dict[bytes, object]]:
    """Six python batches of 3 images, in the pickle protocol of the published ones."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {}
    for name in CIFAR_FILES:
        pixels = rng.integers(0, 256, (3, 3072), dtype=np.uint8)
        contents[name] = {b"data": pixels, b"labels": rng.integers(0, 10, 3).tolist()}
        (folder / name).write_bytes(pickle.dumps(contents[name], protocol=2))
    return contents


def test_digits_are_split_for_good_and_scaled_to_one():
    data = load_dataset("digits")
    assert data.train_images.shape == (1437, 1, 8, 8)
    assert data.test_images.shape == (360, 1, 8, 8)
    assert data.image_shape == (1, 8, 8)
    assert data.train_images.dtype == torch.float32
    assert data.train_labels.dtype == torch.int64
    assert (data.train_images.min(), data.train_images.max()) == (-1, 1)
    # Stratified: every class has about a tenth of the test images.
    assert data.test_labels.bincount().min() >= 34
    assert torch.equal(data.test_images, load_dataset("digits").test_images)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("subfolder", [".", "mnist", "MNIST/raw"])
def test_idx_files_are_found_and_read(tmp_path, compressed, subfolder):
    arrays = write_idx(tmp_path / subfolder, compressed)
    data = load_dataset("mnist", tmp_path)
    pixels = torch.from_numpy(arrays["train-images-idx3-ubyte"]).float()
    torch.testing.assert_close(data.train_images[:, 0], (pixels / 255 - 0.5) / 0.5)
    assert data.test_labels.tolist() == arrays["t10k-labels-idx1-ubyte"].tolist()
    assert data.test_images.shape == (4, 1, 5, 7)


def test_the_environment_names_the_data_folder(tmp_path, monkeypatch):
    write_idx(tmp_path)
    monkeypatch.setenv("FDFA_DATA_DIR", str(tmp_path))
    assert len(load_dataset("fashion-mnist").train_labels) == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00\x00\x08\x01" + bytes(20), "starts with 0x00000801, not with 0x00000803"),
        (b"", "starts with 0x,"),
        (b"\x00\x00\x08\x03\x00\x00", "ends within its header of 16 bytes"),
        (idx_bytes(np.zeros((6, 5, 7)))[:-1], "says 6 x 5 x 7, that is 226 bytes, but has 225"),
        (idx_bytes(np.zeros((6, 5, 7))) + b"x", "says 6 x 5 x 7, that is 226 bytes, but has more"),
        (idx_bytes(np.zeros((0, 5, 7))), "says 0 x 5 x 7"),
        (bytes([0, 0, 8, 3]) + 12 * b"\x7f" + b"x", "which no such set has"),
        (bytes([0, 0, 8, 3]) + 12 * b"\xff" + b"x", "says -1 x -1 x -1, which no such set has"),
        (idx_bytes(np.zeros((5, 5, 7))), "holds 5 images, .* 6 labels"),
    ],
)
def test_broken_image_files_are_named(tmp_path, content, message):
    write_idx(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(UserError, match=f"train-images-idx3-ubyte.*{message}"):
        load_dataset("mnist", tmp_path)


def test_a_broken_archive_and_a_label_out_of_range_are_named(tmp_path):
    write_idx(tmp_path, compressed=True)
    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx_bytes(np.array([1, 2, 10, 3]))))
    with pytest.raises(UserError, match=r"t10k-labels.* holds the label 10, outside 0 to 9"):
        load_dataset("mnist", tmp_path)
    whole = labels.read_bytes()
    for broken in (whole[:-3], whole[:10] + b"\xff\xff" + whole[12:]):
        labels.write_bytes(broken)
        with pytest.raises(UserError, match=r"t10k-labels.* cannot be read"):
            load_dataset("mnist", tmp_path)


def test_an_archive_is_unpacked_no_further_than_its_header_says(tmp_path: Path) -> None:
    write_idx(tmp_path, compressed=True)
    bomb = gzip.compress(idx_bytes(np.zeros((6, 5, 7))) + bytes(2**28))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(bomb)
    tracemalloc.start()
    with pytest.raises(UserError, match="that is 226 bytes, but has more"):
        load_dataset("mnist", tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_images_to_train_and_to_test_with_have_one_size(tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((4, 5, 6))))
    with pytest.raises(UserError, match=r"differ: float32 \[6, 1, 5, 7\] and float32 \[4, 1, 5, 6\]"):
        load_dataset("mnist", tmp_path)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (
            "images",
            lambda t: t.double(),
            r"train_images must be float32 \[N, C, H, W\], got float64 \[4",
        ),
        ("images", lambda t: t[0], r"got float32 \[1, 2, 2\]"),
        ("images", lambda t: t[:0], r"got float32 \[0, 1, 2, 2\]"),
        ("images", lambda t: t / 0, "train_images hold NaN or infinity"),
        ("labels", lambda t: t[:3], r"train_labels must be int64 \[4\], one an image, got int64 \[3\]"),
        ("labels", lambda t: t.int(), "got int32"),
        ("labels", lambda t: t + 1, "train_labels are from 1 to 4, outside 0 to 3"),
        ("labels", lambda t: t - 1, "from -1 to 2"),
    ],
)
def test_a_data_set_is_what_it_says(part: str, change, message: str) -> None:
    images, labels = torch.ones(4, 1, 2, 2), torch.arange(4)
    parts = {"train_images": images, "train_labels": labels}
    Dataset(**parts, test_images=images, test_labels=labels, n_classes=4)
    parts[f"train_{part}"] = change(parts[f"train_{part}"])
    with pytest.raises(UserError, match=message):
        Dataset(**parts, test_images=images, test_labels=labels, n_classes=4)


@pytest.mark.parametrize("subfolder", [".", "cifar-10-batches-py"])
def test_cifar_batches_are_read(tmp_path, subfolder):
    contents = write_cifar(tmp_path / subfolder)
    data = load_dataset("cifar10", tmp_path)
    assert data.train_images.shape == (15, 3, 32, 32)
    pixels = torch.from_numpy(contents["test_batch"][b"data"]).view(3, 3, 32, 32).float()
    torch.testing.assert_close(data.test_images, (pixels / 255 - 0.5) / 0.5)
    assert data.test_labels.tolist() == contents["test_batch"][b"labels"]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({b"data": np.zeros((3, 3071), np.uint8), b"labels": [1, 2, 3]}, "3 x 3072"),
        ({b"data": np.zeros((3, 3072)), b"labels": [1, 2, 3]}, "it holds an array of 'f8'"),
        ({b"data": np.zeros((3, 3072), "i8"), b"labels": [1, 2, 3]}, "got int64"),
        ({b"data": np.array([None]), b"labels": [1]}, "it holds an array of 'O8'"),
        ({b"data": np.zeros((3, 3072), np.uint8), b"labels": [1, 2, 11]}, "label 11"),
        ({b"data": np.zeros((3, 3072), np.uint8), b"labels": [1, 2, -1]}, "label -1"),
        ({b"data": np.zeros((3, 3072), np.uint8), b"labels": [1, 2, 2.5]}, "no whole numbers"),
        ({b"data": np.zeros((3, 3072), np.uint8), b"labels": [1, True, 2]}, "no whole numbers"),
        ({b"data": np.zeros((3, 3072), np.uint8), b"labels": [1, 2, 2**70]}, "too large"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 2, 3]}, "got uint8 of 2 x 3072"),
        ({b"labels": [1]}, "not a CIFAR python batch"),
        ([1], "not a CIFAR python batch"),
        (os.getcwd, "not a CIFAR python batch: it refers to posix.getcwd"),
    ],
)
def test_broken_cifar_batches_are_named(tmp_path, batch, message):
    write_cifar(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(UserError, match=f"data_batch_3.*{message}"):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02]q\x00.",
        b"\x80\x02U\xff.",  # a string that ends before its length
        b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b".",  # 2^60 bytes
        b"\x80\x02K\x01r\xff\xff\xff\x7f.",  # the memo's place number 2^31 - 1
        b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b".",  # a frame of 2^62 bytes
        b"(" * 10**5 + b".",
        b"cos\nsystem\n(S'touch {mark}'\ntR.",
        b"cnumpy\nndarray\n(K\x03tR.",
        b"\x80\x02})" + b"2\x86" * 60 + b"K\x01s.",  # a key whose hash takes forever
        b"\x80\x02})" + b"\x85" * 10**6 + b"K\x01s.",  # or ends the stack
        b"\x80\x02()" + b"2\x86" * 60 + b"K\x01d.",
        b"\x80\x04\x8f()" + b"2\x86" * 60 + b"\x90.",
    ],
)
def test_what_pickles_can_do_they_do_not(tmp_path: Path, content: bytes) -> None:
    write_cifar(tmp_path)
    mark = tmp_path / "mark"
    (tmp_path / "data_batch_2").write_bytes(content.replace(b"{mark}", str(mark).encode()))
    with pytest.raises(UserError, match="data_batch_2 is not a CIFAR python batch"):
        load_dataset("cifar10", tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_arrays_are_read_as_numpy_writes_them(tmp_path: Path, protocol: int, order: str) -> None:
    contents = write_cifar(tmp_path)
    batch = contents["data_batch_1"]
    again = {b"data": np.asarray(batch[b"data"], order=order), b"labels": np.array(batch[b"labels"])}
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(again, protocol=protocol))
    data = load_dataset("cifar10", tmp_path)
    pixels = torch.from_numpy(batch[b"data"]).view(3, 3, 32, 32).float()
    torch.testing.assert_close(data.train_images[:3], (pixels / 255 - 0.5) / 0.5)
    assert data.train_labels[:3].tolist() == batch[b"labels"]


@pytest.mark.parametrize(
    ("name", "file"), [("mnist", "t10k-labels-idx1-ubyte"), ("cifar10", "test_batch")]
)
def test_missing_files_are_listed(tmp_path, monkeypatch, name, file):
    monkeypatch.setattr("fdfa_ext.train.data._download", lambda *_: False)
    with pytest.raises(UserError, match=f"{name} is not in .*: put .*{file}.* into .*{name}"):
        load_dataset(name, tmp_path)


def test_cifar100_has_its_fine_labels(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("train", "test"):
        pixels = rng.integers(0, 256, (3, 3072), dtype=np.uint8)
        batch = {b"data": pixels, b"fine_labels": [0, 50, 99], b"coarse_labels": [0, 5, 9]}
        (tmp_path / name).write_bytes(pickle.dumps(batch, protocol=2))
    data = load_dataset("cifar100", tmp_path)
    assert data.n_classes == 100
    assert data.train_images.shape == (3, 3, 32, 32)
    assert data.test_labels.tolist() == [0, 50, 99]
    (tmp_path / "test").write_bytes(pickle.dumps({**batch, b"fine_labels": [0, 1, 100]}, protocol=2))
    with pytest.raises(UserError, match="label 100, outside 0 to 99"):
        load_dataset("cifar100", tmp_path)


def write_tiny_imagenet(folder: Path) -> list[str]:
    """Two classes, of which one has grey images; the names are not sorted."""
    names = [f"n{9999 - i:08}" for i in range(2)]
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(names) + "\n")
    for i, (name, mode) in enumerate(zip(names, ("RGB", "L"), strict=False)):
        (folder / "train" / name / "images").mkdir(parents=True)
        image = Image.new(mode, (64, 64), 100 * i)
        image.save(folder / "train" / name / "images" / f"{name}_0.JPEG")
        image.save(folder / "val" / "images" / f"val_{i}.JPEG")
    rows = [f"val_{1 - i}.JPEG\t{names[1 - i]}\t0\t0\t63\t63" for i in range(2)]
    (folder / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    return names


@pytest.mark.parametrize("subfolder", [".", "tiny-imagenet-200"])
def test_tiny_imagenet_is_read_from_its_folder(tmp_path, subfolder):
    write_tiny_imagenet(tmp_path / subfolder)
    data = load_dataset("tiny-imagenet", tmp_path)
    assert data.n_classes == 2  # as many as wnids.txt names
    assert data.train_images.shape == (2, 3, 64, 64)
    assert data.train_labels.tolist() == [0, 1]
    assert data.test_labels.tolist() == [1, 0]  # as the annotations order them
    torch.testing.assert_close(data.test_images[1], torch.full((3, 64, 64), -1.0))
    torch.testing.assert_close(data.test_images[0], torch.full((3, 64, 64), 100 / 127.5 - 1))


def test_broken_parts_of_tiny_imagenet_are_named(tmp_path):
    names = write_tiny_imagenet(tmp_path)
    image = tmp_path / "train" / names[0] / "images" / f"{names[0]}_0.JPEG"
    image.write_bytes(b"no image")
    with pytest.raises(UserError, match=f"{names[0]}_0.JPEG cannot be read"):
        load_dataset("tiny-imagenet", tmp_path)
    Image.new("RGB", (64, 63)).save(image)
    with pytest.raises(UserError, match="must be of 64 x 64 pixels, got 64 x 63"):
        load_dataset("tiny-imagenet", tmp_path)
    Image.new("RGB", (64, 64)).save(image, format="PNG")
    with pytest.raises(UserError, match=f"{names[0]}_0.JPEG cannot be read"):
        load_dataset("tiny-imagenet", tmp_path)


def test_the_lists_of_tiny_imagenet_name_classes_and_files(tmp_path: Path) -> None:
    names = write_tiny_imagenet(tmp_path)
    annotations, classes = tmp_path / "val" / "val_annotations.txt", tmp_path / "wnids.txt"
    image = f"val_0.JPEG\t{names[0]}\n".encode()
    for file, content, message in (
        (annotations, b"val_0.JPEG\tn00000000\n", "names the class 'n00000000', which is not in"),
        (annotations, b"val_0.JPEG\n", "must hold names, 2 a line, got 'val_0.JPEG' in line 1"),
        (annotations, b"../../secret.JPEG\tn0\n", "must hold names, 2 a line, got '../../secret"),
        (annotations, 2 * image, "names an image twice"),
        (annotations, b"", "names no images"),
        (annotations, f"val_9.JPEG\t{names[0]}\n".encode(), "val_9.JPEG is missing, or no file"),
        (classes, f"{names[0]}\n{names[1]}\nn1\n".encode(), "names n1, which has no images in .*n1"),
        (annotations, b"\xff", "cannot be read"),
        (classes, b"n1\nn2\nn1\n", "must name classes, each once, got 2 in 3 lines"),
        (classes, b"n1\n\n", "must hold names, 1 a line, got '' in line 2"),
        (classes, b"n1\n/etc\n", "must hold names, 1 a line, got '/etc' in line 2"),
        (classes, b"", "must name classes, each once, got 0"),
    ):
        before = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"{file.name}.*{message}|{message}"):
            load_dataset("tiny-imagenet", tmp_path)
        file.write_bytes(before)


def test_batches_hold_every_image_once_in_an_order_the_seed_gives():
    images, labels = torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10)

    def epoch(generator: torch.Generator) -> list[list[int]]:
        pairs = list(batches(images, labels, 4, generator))
        assert all(torch.equal(x.flatten().long(), y) for x, y in pairs)
        return [y.tolist() for _, y in pairs]

    generator = torch.Generator().manual_seed(3)
    first, second = epoch(generator), epoch(generator)
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(label for batch in first for label in batch) == list(range(10))
    assert first != second
    assert first == epoch(torch.Generator().manual_seed(3))


@pytest.mark.skipif(
    "FDFA_DATA_DIR" not in os.environ, reason="FDFA_DATA_DIR names no folder with MNIST"
)
def test_the_real_mnist():
    data = load_dataset("mnist")
    assert data.train_images.shape == (60000, 1, 28, 28)
    assert data.test_labels.bincount().tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]


def test_torchvision_downloads_what_is_missing(tmp_path, monkeypatch):
    class MNIST:
        def __init__(self, root: str, download: bool) -> None:
            assert download
            write_idx(Path(root) / "MNIST" / "raw")

    datasets = types.SimpleNamespace(MNIST=MNIST)
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    data = load_dataset("mnist", tmp_path)
    assert data.train_images.shape == (6, 1, 5, 7)
    assert data.test_labels.shape == (4,)


def test_a_download_that_fails_leaves_the_list_of_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(UserError, match=r"mnist is not in .*: put .*t10k-labels-idx1-ubyte"):
        load_dataset("mnist", tmp_path)


def test_images_in_jpeg_need_pillow(tmp_path, monkeypatch):
    write_tiny_imagenet(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match="tiny-imagenet is in JPEG: pip install pillow"):
        load_dataset("tiny-imagenet", tmp_path)
