"""The data room: what is read is what the files say, what is wrong with them is one line, and batches repeat."""
from __future__ import annotations

import functools
import gzip
import io
import itertools
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicnn import data
from minicnn.data import DataError, ImageSet, Normalize, handwritten
from minicnn.data.cifar import CIFAR10_CLASSES
from minicnn.data.imageset import stratified_split

Image = pytest.importorskip("PIL.Image", reason="image files need Pillow")

RNG = np.random.default_rng(20240)
NOISE = RNG.integers(0, 256, (40, 40, 3))                       # its files are long enough to be cut in the pixels

unhurried = settings(deadline=None, max_examples=60)            # machines that run tests are busy machines


@contextmanager
def one_line_about(*words: object) -> Iterator[None]:
    """A DataError of one line that holds all these words, and the file's name among them."""
    with pytest.raises(DataError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert all(str(word) in message for word in words), message
    assert ";" in message or "(" in message, f"no cure in: {message}"


def real(name: str) -> Path:
    root = os.environ.get("MINICNN_DATA")
    if not root:
        pytest.skip("MINICNN_DATA is not set")
    if not Path(root, name).exists():
        pytest.skip(f"no {name} in MINICNN_DATA")
    return Path(root)


def image_set(n: int = 10, shape: tuple[int, ...] = (1, 2, 2), classes: int = 2) -> ImageSet:
    """Image i is filled with the value i, so that batches can be told apart by their pixels."""
    images = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, *shape)).copy()
    return ImageSet(images, np.arange(n) % classes, tuple(f"class {i}" for i in range(classes)), "numbered")


# ---------------------------------------------------------------- ImageSet and its division

@pytest.mark.parametrize(("images", "labels", "words"), [
    (np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.int64), "(2, 4, 4)"),
    (np.zeros((2, 1, 4, 4), np.float32), np.zeros(2, np.int64), "float32"),
    (np.zeros((2, 1, 4, 4), np.uint8), np.zeros(2, np.int32), "int32"),
    (np.zeros((2, 1, 4, 4), np.uint8), np.zeros((2, 1), np.int64), "(2, 1)"),
    (np.zeros((2, 1, 4, 4), np.uint8), np.zeros(3, np.int64), "2 images but 3 labels"),
    (np.zeros((2, 1, 4, 4), np.uint8), np.array([0, 3]), "from 0 to 3, but 3 classes"),
    (np.zeros((2, 1, 4, 4), np.uint8), np.array([-1, 0]), "from -1 to 0"),
])
def test_an_image_set_refuses_what_does_not_fit_together(images, labels, words):
    with pytest.raises(ValueError, match="made up") as caught:
        ImageSet(images, labels, ("a", "b", "c"), "made up")
    assert words in str(caught.value)


def test_a_subset_is_a_copy_in_the_order_asked_for():
    whole = image_set(5)
    part = whole.subset([3, 0, 3])
    assert part.images[:, 0, 0, 0].tolist() == [3, 0, 3] and part.labels.tolist() == [1, 0, 1]
    part.images[:] = 99
    assert whole.images.max() == 4
    assert len(whole.subset([])) == 0
    assert repr(part) == "<ImageSet numbered: 3 images of 1x2x2, 2 classes>"


@pytest.mark.parametrize("indices", [[-1], [5], [True] * 5, [0.0], [[0]]])
def test_a_subset_never_wraps_around_or_takes_a_mask_for_positions(indices):
    with pytest.raises(ValueError, match="positions from 0 to 4"):
        image_set(5).subset(indices)


@unhurried
@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=12), share=st.floats(0.01, 0.99),
       seed=st.integers(0, 99))
def test_a_stratified_split_is_a_partition_that_keeps_proportions(counts, share, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    held_out = round(len(labels) * share)
    if not 0 < held_out < len(labels):
        with pytest.raises(ValueError, match="hold out"):
            stratified_split(labels, held_out, seed)
        return
    kept, held = stratified_split(labels, held_out, seed)
    assert len(held) == held_out
    assert sorted([*kept, *held]) == list(range(len(labels)))
    due = np.array(counts) * held_out / len(labels)
    got = np.bincount(labels[held], minlength=len(counts))
    assert (abs(got - due) < 1).all()
    again = stratified_split(labels, held_out, seed)
    assert np.array_equal(again[0], kept) and np.array_equal(again[1], held)


def test_another_seed_draws_another_split():
    labels = np.arange(100) % 2
    assert not np.array_equal(stratified_split(labels, 20, 0)[1], stratified_split(labels, 20, 1)[1])


# ---------------------------------------------------------------- digits and MNIST

def test_digits_are_all_of_the_librarys_images_divided_once_and_for_all():
    source = pytest.importorskip("sklearn.datasets", reason="digits need scikit-learn").load_digits()
    train, test = data.digits()
    assert (len(train), len(test)) == (1437, 360)
    assert train.classes == test.classes == tuple("0123456789")
    assert abs(np.bincount(test.labels) - np.bincount(source.target) / 5).max() < 1

    def rows(images, labels):
        return sorted((*image.ravel().tolist(), label) for image, label in zip(images, labels, strict=True))
    images = np.concatenate([train.images, test.images])
    assert images.shape == (1797, 1, 8, 8) and images.min() == 0 and images.max() == 255
    back = np.rint(images * (16 / 255)).astype(int)              # the source's counts can be had back: nothing is lost
    assert rows(back, [*train.labels, *test.labels]) == rows(source.images.astype(int), source.target)
    again = data.digits()
    assert np.array_equal(again[1].images, test.images) and np.array_equal(again[0].labels, train.labels)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"scikit-learn.*pip install (pillow|scikit-learn)"):
        data.digits()


def idx(array: np.ndarray, magic: int | None = None) -> bytes:
    magic = 0x800 + array.ndim if magic is None else magic
    return struct.pack(f">i{array.ndim}i", magic, *array.shape) + array.astype(np.uint8).tobytes()


def mnist_half(root: Path, half: str, n: int, gz: bool = False, dash: str = "-") -> tuple[np.ndarray, np.ndarray]:
    """Write one half of a small MNIST, 3 x 2 pixels an image, and say what is in it."""
    images, labels = RNG.integers(0, 256, (n, 3, 2)), np.arange(n) % 10
    for content, array in (("images", images), ("labels", labels)):
        name = f"{half}-{content}{dash}idx{array.ndim}-ubyte"
        if gz:
            (root / (name + ".gz")).write_bytes(gzip.compress(idx(array)))
        else:
            (root / name).write_bytes(idx(array))
    return images, labels


@pytest.mark.parametrize(("gz", "dash"), [(False, "-"), (True, "-"), (False, "."), (True, ".")])
def test_mnist_reads_both_halves_plain_or_compressed(tmp_path, gz, dash):
    written = mnist_half(tmp_path, "train", 30, gz, dash), mnist_half(tmp_path, "t10k", 20, gz, dash)
    for (images, labels), read, name in zip(written, data.mnist(tmp_path), ("mnist train", "mnist test"), strict=True):
        assert np.array_equal(read.images, images[:, None]) and np.array_equal(read.labels, labels)
        assert read.classes == tuple("0123456789") and read.name == name


def test_mnist_with_one_half_holds_out_a_fifth_of_it_and_says_so(tmp_path):
    images, _ = mnist_half(tmp_path, "t10k", 100, gz=True)
    train, test = data.mnist(tmp_path)
    assert (len(train), len(test)) == (80, 20)
    assert np.bincount(test.labels).tolist() == [2] * 10
    assert "fifth" in test.name and "t10k" in test.name and "t10k" in train.name
    both = np.concatenate([train.images, test.images])
    assert sorted(map(bytes, both)) == sorted(map(bytes, images.astype(np.uint8)))


def test_mnist_says_what_is_wrong_with_its_files(tmp_path):
    images, labels = tmp_path / "t10k-images-idx3-ubyte", tmp_path / "t10k-labels-idx1-ubyte"
    with one_line_about(tmp_path / "nowhere", "no such folder"):
        data.mnist(tmp_path / "nowhere")
    with one_line_about(tmp_path, "no MNIST here", images.name):
        data.mnist(tmp_path)
    good_images, good_labels = idx(np.zeros((4, 3, 2))), idx(np.arange(4))
    images.write_bytes(good_images)
    with one_line_about(images, "t10k-labels-idx1-ubyte"):
        data.mnist(tmp_path)
    for wrong, words in [(good_labels[:-1], "promises 4 bytes"), (good_labels + b"x", "5 follow"), (b"", "0 bytes"),
                         (idx(np.arange(4), magic=0x801 + 1), "magic number 2050, not 2049"),
                         (idx(np.arange(4), magic=0xD01), "magic number 3329"),
                         (idx(np.arange(5)), "4 images but 5 labels"), (idx(np.array([0, 1, 2, 10])), "from 0 to 10")]:
        labels.write_bytes(wrong)
        with one_line_about(labels, words):
            data.mnist(tmp_path)
    labels.write_bytes(good_labels)
    images.write_bytes(b"\xff" * len(good_images))             # a header of nonsense
    with one_line_about(images, "magic"):
        data.mnist(tmp_path)
    images.write_bytes(struct.pack(">4i", 0x803, -1, -1, -1))
    with one_line_about(images, "promises"):
        data.mnist(tmp_path)
    images.write_bytes(idx(np.zeros((0, 3, 2))))
    labels.write_bytes(idx(np.zeros(0)))
    with one_line_about(images, "holds no image"):
        data.mnist(tmp_path)


def test_mnist_names_a_gzip_file_that_is_cut_short_flipped_or_none(tmp_path):
    mnist_half(tmp_path, "t10k", 50, gz=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0x10
    no_deflate, wrong_checksum = good[:10] + b"\xff" * 90, good[:-8] + bytes(8)
    for wrong in (good[:-20], good[:5], bytes(flipped), no_deflate, wrong_checksum, b"<html>not found</html>"):
        path.write_bytes(wrong)
        with one_line_about(path, "again"):
            data.mnist(tmp_path)


# ---------------------------------------------------------------- folders of images

def encode(pixels: np.ndarray, suffix: str = "png") -> bytes:
    """A file of these pixels, (H, W) or (H, W, 3)."""
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
    return stream.getvalue()


def plain(value: int, height: int = 4, width: int = 4, grey: bool = False) -> bytes:
    return encode(np.full((height, width) if grey else (height, width, 3), value))


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def tar(path: Path, files: dict[str, bytes]) -> Path:
    """A tar archive, compressed as its name says."""
    mode = {".gz": "w:gz", ".xz": "w:xz", ".bz2": "w:bz2"}.get(path.suffix, "w:")
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def two_classes(n: int = 10, half: str = "") -> dict[str, bytes]:
    """n images a class; every image has a value of its own, cats below 100, dogs above."""
    return {f"{half}{label}/{i:03}.png": plain(first + i)
            for label, first in (("cat", 10), ("dog", 110)) for i in range(n)}


def test_a_folder_of_classes_holds_out_a_fifth(tmp_path):
    train, test = data.image_folder(write(tmp_path / "pets", two_classes()))
    assert (len(train), len(test)) == (16, 4)
    assert train.classes == ("cat", "dog") and np.bincount(test.labels).tolist() == [2, 2]
    assert train.images.shape[1:] == (3, 4, 4)
    values = np.concatenate([train.images, test.images])[:, 0, 0, 0]
    assert sorted(values) == [*range(10, 20), *range(110, 120)]
    for part in (train, test):
        assert np.array_equal(part.labels, part.images[:, 0, 0, 0] > 100)
    assert train.name.startswith("pets train") and "fifth" in test.name


def test_a_divided_folder_is_taken_as_it_is(tmp_path):
    files = {**two_classes(3, "train/"), **dict.fromkeys(two_classes(2, "val/"), plain(200)), "README.txt": b"pets"}
    train, test = data.image_folder(write(tmp_path, files))
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and test.labels.tolist() == [0, 0, 1, 1]
    assert train.images[:, 0, 0, 0].tolist() == [10, 11, 12, 110, 111, 112] and (test.images == 200).all()
    write(tmp_path, {"test/cat/0.png": plain(77)})             # beside val/, test/ is what is held out
    _, test = data.image_folder(tmp_path)
    assert test.images[:, 0, 0, 0].tolist() == [77] and test.name.endswith("test")


def test_what_a_trained_model_is_judged_by(tmp_path):
    """What image_folder holds out, a half that is alone, and all there is if one says so."""
    def values(folder, **options):
        found = data.judged_images(folder, **options)
        assert found.classes == ("cat", "dog") and np.array_equal(found.labels, found.images[:, 0, 0, 0] > 100)
        return sorted(found.images[:, 0, 0, 0].tolist()), found.name

    folder = write(tmp_path / "pets", two_classes())
    everything = [*range(10, 20), *range(110, 120)]
    _, test = data.image_folder(folder)
    assert values(folder) == (sorted(test.images[:, 0, 0, 0].tolist()), test.name)
    assert values(folder, whole=True) == (everything, "pets")
    for half in ("test", "val"):
        alone = write(tmp_path / half, two_classes(4, f"{half}/"))
        assert values(alone) == ([10, 11, 12, 13, 110, 111, 112, 113], f"{half} {half}")
        with one_line_about(f"has {half} alone"):
            data.image_folder(alone)
    both = write(tmp_path / "both", {**two_classes(2, "train/"), "val/cat/9.png": plain(77), "val/dog/9.png": plain(177)})
    assert values(both) == ([77, 177], "both val") and values(both, whole=True)[0] == [10, 11, 77, 110, 111, 177]
    assert values(write(both, {"test/cat/9.png": plain(88), "test/dog/9.png": plain(188)})) == ([88, 188], "both test")
    single = write(tmp_path / "single", {"cat/0.png": plain(1), "dog/0.png": plain(200)})
    assert values(single, whole=True)[0] == [1, 200]
    with one_line_about("train/ alone", "--all"):
        data.judged_images(write(tmp_path / "half", two_classes(2, "train/")))
    with one_line_about("beside folders named"):
        data.judged_images(write(both, {"cat/0.png": plain(1)}), whole=True)


def test_a_picture_is_turned_as_its_camera_was_held(tmp_path):
    pixels = RNG.integers(0, 256, (4, 6, 3)).astype(np.uint8)
    for orientation, turned in [(1, pixels), (3, pixels[::-1, ::-1]), (6, np.rot90(pixels, -1)), (8, np.rot90(pixels))]:
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
        height, width = turned.shape[:2]
        np.testing.assert_array_equal(data.read_image(tmp_path / "a.png", (3, height, width)), turned.transpose(2, 0, 1))
        Image.fromarray(pixels).save(tmp_path / "a.webp", exif=exif, lossless=True)
        folder = write(tmp_path / "pets", {f"{label}/{i}.webp": (tmp_path / "a.webp").read_bytes() for label in "ab" for i in "01"})
        assert data.image_folder(folder)[0].images.shape[2:] == (height, width)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffnothing")
    np.testing.assert_array_equal(data.read_image(tmp_path / "a.png", (3, 4, 6)), pixels.transpose(2, 0, 1))


def test_a_name_with_a_line_break_is_told_in_one_line(tmp_path):
    with one_line_about("a\\nb.png", "not an image"):
        data.image_folder(write(tmp_path, {"cat/a\nb.png": b"meow"}))


@pytest.mark.parametrize("name", ["pets.tar", "pets.tar.gz", "pets.tar.bz2", "pets.tar.xz"])
@pytest.mark.parametrize("above", ["", "./", "pets/"])
def test_an_archive_is_read_like_the_folder_it_was_made_of(tmp_path, name, above):
    files = {**two_classes(3, "train/"), **two_classes(2, "test/")}
    from_folder = data.image_folder(write(tmp_path / "pets", files))
    from_archive = data.image_folder(tar(tmp_path / name, {above + file: files[file] for file in files}))
    for one, other in zip(from_folder, from_archive, strict=True):
        assert np.array_equal(one.images, other.images) and np.array_equal(one.labels, other.labels)
        assert one.classes == other.classes and one.name == other.name


def test_pixels_keep_their_place_and_channels_their_order(tmp_path):
    pixels = RNG.integers(0, 256, (4, 5, 3))
    png, bmp = encode(pixels), encode(pixels, "bmp")
    files = {"a/0.png": png, "a/1.bmp": bmp, "b/0.PNG": png, "b/1.png": png}
    train, test = data.image_folder(write(tmp_path, files))
    for image in (*train.images, *test.images):
        assert np.array_equal(image, pixels.transpose(2, 0, 1))


def test_images_are_grey_only_if_all_are(tmp_path):
    grey = {f"{label}/{i}.png": plain(10 * i, grey=True) for label in "ab" for i in range(2)}
    train, _ = data.image_folder(write(tmp_path / "grey", grey))
    assert train.images.shape[1:] == (1, 4, 4)
    # one with colours makes all of them RGB, and the grey ones get three equal channels
    train, test = data.image_folder(write(tmp_path / "mixed", {**grey, "a/2.png": plain(7)}))
    both = np.concatenate([train.images, test.images])
    assert both.shape == (5, 3, 4, 4) and sorted(both[:, 2, 1, 1]) == [0, 0, 7, 10, 10]


def test_differing_sizes_are_refused_or_brought_to_one_size(tmp_path):
    files = {**two_classes(2), "dog/wide.png": plain(30, 4, 6)}
    root = write(tmp_path, files)
    with one_line_about("wide.png is 4 x 6", "000.png is 4 x 4", "size=(H, W)"):
        data.image_folder(root)
    train, test = data.image_folder(root, size=(2, 3))
    assert train.images.shape[1:] == test.images.shape[1:] == (3, 2, 3)


def test_what_sticks_out_is_cut_off_evenly():
    striped = np.repeat(np.array([50, 100, 100, 150]), 2)[None].repeat(4, 0)         # (4, 8): the middle is 100
    cropped = data.pictures.decode(encode(striped), "striped", size=(4, 4))
    assert cropped.shape == (1, 4, 4) and (cropped == 100).all()
    smaller = data.pictures.decode(encode(striped), "striped", size=(1, 2))
    left, right = smaller.ravel().tolist()                     # shrunk whole: each pixel averages over its half
    assert smaller.shape == (1, 1, 2) and 65 <= left <= 85 and 115 <= right <= 135


def test_hidden_files_are_no_images(tmp_path):
    files = {**two_classes(2), "cat/._000.png": b"some systems leave these", ".cache/cat/0.png": b"", ".DS_Store": b""}
    assert sum(map(len, data.image_folder(write(tmp_path, files)))) == 4


@pytest.mark.parametrize(("files", "words"), [
    ({}, ["no image files", "CLASS/IMAGE"]),
    ({"cat/notes.txt": b"meow"}, ["no image files"]),
    ({**two_classes(), "lost.png": plain(0)}, ["lost.png", "no class folder"]),
    ({"train/0.png": plain(0), "test/0.png": plain(0)}, ["0.png", "no class folder"]),
    ({**two_classes(), "dog/puppies/brown/0.png": plain(0)}, ["puppies", "too deep"]),
    ({**two_classes(), "dog/puppies/0.png": plain(0)}, ["puppies", "not as deep"]),
    ({**two_classes(), **two_classes(2, "train/")}, ["000.png", "beside folders named train"]),
    (two_classes(half="train/"), ["train alone"]),
    (two_classes(half="test/"), ["test alone"]),
    ({**two_classes(2, "train/"), **two_classes(2, "test/"), "test/yak/0.png": plain(0)}, ["0.png", "yak", "cat, dog"]),
    ({**two_classes(), "yak/none.txt": b""}, ["yak", "no image files"]),
    ({**two_classes(2, "train/"), **two_classes(2, "test/"), "train/yak/none.txt": b""}, ["yak", "no image files"]),
    ({**two_classes(), "yak/0.png": plain(0)}, ["'yak'", "single image"]),
    ({**two_classes(), "dog/1.png": b"<html>not found</html>"}, ["1.png", "not an image"]),
    ({**two_classes(), "dog/1.png": b""}, ["1.png", "not an image"]),
    ({**two_classes(), "dog/1.jpg": encode(NOISE, "jpg")[:-200]}, ["1.jpg", "damaged"]),
    ({**two_classes(), "dog/1.png": encode(NOISE)[:-200]}, ["1.png", "damaged"]),
])
def test_a_folder_that_is_not_right_is_one_line(tmp_path, files, words):
    with one_line_about(tmp_path, *words):
        data.image_folder(write(tmp_path, files))


def test_missing_and_unfit_sources_are_one_line(tmp_path):
    with one_line_about(tmp_path / "nowhere", "no such file or folder"):
        data.image_folder(tmp_path / "nowhere")
    with one_line_about("pets.zip", "not a tar archive"):
        data.image_folder(write(tmp_path, {"pets.zip": b"PK\x03\x04" + bytes(1000)}) / "pets.zip")
    with one_line_about("empty.tar", "not a tar archive"):
        data.image_folder(write(tmp_path, {"empty.tar": b""}) / "empty.tar")


def test_deep_pixels_are_refused_rather_than_clipped(tmp_path):
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    with one_line_about("deep.png", "8 bits"):
        data.read_image(tmp_path / "deep.png", (1, 4, 4))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_listed_is_one_line(tmp_path):
    write(tmp_path, two_classes(2))
    (tmp_path / "cat").chmod(0)
    try:
        with one_line_about("Permission"):
            data.image_folder(tmp_path)
    finally:
        (tmp_path / "cat").chmod(0o700)


@pytest.mark.parametrize("name", ["../../cat/9.png", "/cat/9.png", "cat/../../../cat/9.png"])
def test_an_archive_entry_that_escapes_is_refused(tmp_path, name):
    with one_line_about("pets.tar", name, "would land outside"):
        data.image_folder(tar(tmp_path / "pets.tar", {**two_classes(), name: plain(0)}))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_an_archive_entry_that_is_no_file_is_refused(tmp_path, kind):
    path = tar(tmp_path / "pets.tar", two_classes())
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("cat/link.png")
        link.type, link.linkname = kind, "/etc/passwd"
        archive.addfile(link)
    with one_line_about("link.png", "plain files"):
        data.image_folder(path)


def test_an_archive_entry_with_holes_is_refused(tmp_path):
    """A header of GNU tar that says: a file of 8 GiB, and no byte of it is kept."""
    header = bytearray(tarfile.TarInfo("cat/holes.png").tobuf(tarfile.GNU_FORMAT))
    header[156:157], header[386:398], header[398:410], header[483:495] = b"S", *[b"%011o\0" % n for n in (0, 0, 8**11 - 1)]
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "holes.tar").write_bytes(header + bytes(1024))
    with one_line_about("holes.png", "a file with holes"):
        data.image_folder(tmp_path / "holes.tar")


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz"])
def test_an_archive_cut_anywhere_never_passes_for_a_smaller_one(tmp_path, suffix):
    whole = tar(tmp_path / f"pets.tar{suffix}", two_classes(4)).read_bytes()
    path, refused = tmp_path / f"cut.tar{suffix}", 0
    cuts = np.linspace(0, len(whole) - 1, 20, dtype=int) if suffix else range(0, len(whole), 512)   # block by block
    for cut in cuts:
        path.write_bytes(whole[:cut])
        try:
            assert sum(map(len, data.image_folder(path))) == 8          # only padding was lost
        except DataError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused >= (17 if suffix else 8 * 2)                         # a header and a block of pixels each


def test_a_damaged_header_does_not_end_an_archive(tmp_path):
    path = tar(tmp_path / "pets.tar", two_classes(4))
    content = bytearray(path.read_bytes())
    content[6 * 2 * 512] ^= 0x20                               # the name of the seventh file: its checksum is now wrong
    path.write_bytes(content)
    with one_line_about("pets.tar", "damaged"):
        data.image_folder(path)


# ---------------------------------------------------------------- CIFAR-10

def cifar_batch(n: int = 10) -> tuple[np.ndarray, list[int]]:
    return RNG.integers(0, 256, (n, 3072)).astype(np.uint8), [i % 10 for i in range(n)]


def python2_pickle(rows: np.ndarray, labels: list[int]) -> bytes:
    """A batch as Python 2 wrote it, where strings are bytes: opcode by opcode, since Python 3 cannot."""
    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value
    numbers = b"]" + b"(" + b"".join(b"K" + bytes([n]) for n in labels) + b"e"
    array = (b"cnumpy.core.multiarray\n_reconstruct\n" + b"(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR"
             + b"(K\x01(" + b"".join(b"J" + struct.pack("<i", n) for n in rows.shape) + b"t"
             + b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|")
             + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
             + b"\x89T" + struct.pack("<i", rows.size) + rows.tobytes() + b"tb")
    return (b"\x80\x02}(" + text(b"batch_label") + text(b"training batch") + text(b"labels") + numbers
            + text(b"data") + array + text(b"filenames") + b"](" + text(b"a.png") + b"eu.")


def binary(rows: np.ndarray, labels: list[int]) -> bytes:
    return np.insert(rows, 0, labels, axis=1).tobytes()


NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def cifar_files(write_one: Callable[[np.ndarray, list[int]], bytes], folder: str,
                suffix: str = "") -> tuple[dict[str, bytes], dict[str, tuple[np.ndarray, list[int]]]]:
    batches = {name: cifar_batch() for name in NAMES}
    order = [NAMES[i] for i in (3, 5, 0, 4, 1, 2)]              # the published archive is not sorted, either
    files = {f"{folder}/{name}{suffix}": write_one(*batches[name]) for name in order}
    return {f"{folder}/readme.html": b"<html>", **files}, batches


VERSIONS = [(python2_pickle, "cifar-10-batches-py", "", "cifar-10-python.tar.gz"),
            (binary, "cifar-10-batches-bin", ".bin", "cifar-10-binary.tar.gz")]


def test_the_hand_made_pickle_is_one_that_numpy_reads():
    rows, labels = cifar_batch(3)
    batch = pickle.loads(python2_pickle(rows, labels).replace(b"numpy.core", b"numpy._core"), encoding="bytes")
    assert np.array_equal(batch[b"data"], rows) and batch[b"labels"] == labels


@pytest.mark.parametrize(("write_one", "folder", "suffix", "archive"), VERSIONS)
@pytest.mark.parametrize("at", ["archive", "beside archive", "folder", "beside folder"])
def test_cifar10_reads_the_published_files(tmp_path, write_one, folder, suffix, archive, at):
    files, batches = cifar_files(write_one, folder, suffix)
    write(tmp_path, files) if "folder" in at else tar(tmp_path / archive, files)
    root = {"archive": tmp_path / archive, "folder": tmp_path / folder}.get(at, tmp_path)
    train, test = data.cifar10(root)
    assert (len(train), len(test)) == (50, 10) and train.classes == CIFAR10_CLASSES
    rows = np.concatenate([batches[name][0] for name in NAMES[:5]])
    assert np.array_equal(train.images, rows.reshape(50, 3, 32, 32))
    assert train.labels.tolist() == [label for name in NAMES[:5] for label in batches[name][1]]
    assert np.array_equal(test.images.reshape(10, -1), batches["test_batch"][0])
    assert (train.name, test.name) == ("cifar10 train", "cifar10 test")


def test_cifar10_reads_pickles_written_by_this_python(tmp_path):
    rows, labels = cifar_batch()
    batch = pickle.dumps({"data": rows, "labels": labels}, protocol=4)
    files = {f"cifar-10-batches-py/{name}": batch for name in NAMES}
    _, test = data.cifar10(write(tmp_path, files))
    assert np.array_equal(test.images.reshape(10, -1), rows) and test.labels.tolist() == labels


def cifar_images(n: int = 1, suffix: str = "jpg") -> dict[str, bytes]:
    """train/ and test/ with n images a class, plain, their grey values 20 a class apart (and the test's 5 above)."""
    return {f"{half}/{name}/{i:04}.{suffix}": encode(np.full((32, 32, 3), 20 * label + extra), suffix)
            for half, extra in (("test", 5), ("train", 0))
            for label, name in enumerate(CIFAR10_CLASSES) for i in range(n)}


@pytest.mark.parametrize("at", ["folder", "archive", "beside archive"])
def test_cifar10_reads_image_files_in_its_own_order_of_classes(tmp_path, at):
    write(tmp_path, cifar_images(2)) if at == "folder" else tar(tmp_path / "cifar10-jpeg.tar.xz", cifar_images(2))
    train, test = data.cifar10(tmp_path / "cifar10-jpeg.tar.xz" if at == "archive" else tmp_path)
    for part, extra in ((train, 0), (test, 5)):
        assert part.images.shape == (20, 3, 32, 32)
        assert abs(part.images - (20.0 * part.labels + extra)[:, None, None, None]).max() <= 2      # JPEG's loss


def test_cifar10_decodes_only_the_part_that_is_asked_for(tmp_path):
    files = {name: good if name.startswith("test") else b"no image at all" for name, good in cifar_images().items()}
    [test] = data.cifar10(tar(tmp_path / "cifar10.tar", files), parts=["test"])
    assert len(test) == 10 and test.name == "cifar10 test"
    with one_line_about("train/airplane", "not an image"):
        data.cifar10(tmp_path)
    files, _ = cifar_files(binary, "cifar-10-batches-bin", ".bin")
    files.pop("cifar-10-batches-bin/test_batch.bin")
    [train] = data.cifar10(tar(tmp_path / "cifar-10-binary.tar", files), parts=["train"])
    assert len(train) == 50
    with pytest.raises(ValueError, match="'train' and 'test'"):
        data.cifar10(tmp_path, parts=["val"])


def test_cifar10_prefers_the_published_archive_to_a_lossy_copy(tmp_path):
    tar(tmp_path / "cifar10-jpeg.tar.xz", cifar_images())
    tar(tmp_path / "cifar-100-python.tar.gz", {"cifar-100-python/train": b"another data set"})
    assert len(data.cifar10(tmp_path)[0]) == 10
    files, _ = cifar_files(binary, "cifar-10-batches-bin", ".bin")
    tar(tmp_path / "cifar-10-binary.tar.gz", files)
    assert len(data.cifar10(tmp_path)[0]) == 50


class Malicious:
    """Pickles as a call: what an unpickler that trusts its file would run."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("function", [os.mkdir, eval, np.save, getattr])
def test_a_pickle_that_wants_to_run_something_is_refused(tmp_path, protocol, function):
    target = tmp_path / "made by the pickle"
    arguments = {os.mkdir: (str(target),), eval: (f"__import__('os').mkdir({str(target)!r})",),
                 np.save: (str(target), 0), getattr: ("", "upper")}[function]
    rows, labels = cifar_batch()
    batch = {"data": rows, "labels": labels, "batch_label": Malicious(function, *arguments)}
    files = {f"cifar-10-batches-py/{name}": pickle.dumps(batch, protocol=protocol) for name in NAMES}
    with one_line_about("data_batch_1", "nothing was run"):
        data.cifar10(write(tmp_path, files))
    assert not list(tmp_path.glob("made by*"))


def test_numpys_own_constructors_are_not_called_either(tmp_path):
    """What the pickle names of NumPy is read, not run: the 127 TiB asked of _reconstruct are never made."""
    rows, labels = cifar_batch()
    pickled = python2_pickle(rows, labels).replace(b"(K\x00tU\x01b", b"(\x8a\x06\x00\x00\x00\x00\x00\x7ftU\x01b")
    with pytest.raises(MemoryError):
        pickle.loads(pickled.replace(b"numpy.core", b"numpy._core"), encoding="bytes")
    _, test = data.cifar10(write(tmp_path, {f"cifar-10-batches-py/{name}": pickled for name in NAMES}))
    assert np.array_equal(test.images.reshape(10, -1), rows)


def test_cifar10_says_what_is_wrong_with_its_files(tmp_path):
    with one_line_about(tmp_path / "nowhere", "no such file or folder"):
        data.cifar10(tmp_path / "nowhere")
    with one_line_about(tmp_path, "cifar-10-python.tar.gz"):
        data.cifar10(tmp_path)
    rows, labels = cifar_batch()
    good = python2_pickle(rows, labels)
    files = {f"cifar-10-batches-py/{name}": good for name in NAMES}
    write(tmp_path, files)
    (tmp_path / "cifar-10-batches-py/data_batch_3").unlink()
    with one_line_about("data_batch_3", "cifar-10-batches-py"):
        data.cifar10(tmp_path)
    for wrong, words in [(good[:-500], "data_batch_3"), (b"", "pickle exhausted before seeing STOP"),
                         (b"<html></html>", "not a pickled batch"),
                         (pickle.dumps([1, 2]), "not a pickled batch"), (pickle.dumps({"labels": labels}), "KeyError"),
                         (pickle.dumps({"data": rows.astype(np.float32), "labels": labels}, protocol=4), "f4"),
                         (python2_pickle(rows[:, :-1], labels), "(10, 3071)"),
                         (python2_pickle(rows, labels[:-1]), "10 images but 9 labels"),
                         (python2_pickle(rows, [*labels[:-1], 10]), "from 0 to 10")]:
        write(tmp_path, {"cifar-10-batches-py/data_batch_3": wrong})
        with one_line_about("data_batch_3", words):
            data.cifar10(tmp_path)


def test_cifar10_says_what_is_wrong_with_its_archives(tmp_path):
    files, _ = cifar_files(binary, "cifar-10-batches-bin", ".bin")
    path = tar(tmp_path / "cifar-10-binary.tar.gz", files)
    path.write_bytes(path.read_bytes()[:-2000])
    with one_line_about(path, "cut short"):
        data.cifar10(tmp_path)
    files["cifar-10-batches-bin/data_batch_2.bin"] += b"x"
    tar(path, files)
    with one_line_about("data_batch_2.bin", "records of 3073"):
        data.cifar10(tmp_path)
    with one_line_about("cifar10.tar", "neither a batch"):
        data.cifar10(tar(tmp_path / "cifar10.tar", {"cifar/README": b"empty"}))
    images = cifar_images()
    images.pop("train/frog/0000.jpg")
    with one_line_about("cifar10.tar", "train/", "deer, dog, horse"):
        data.cifar10(tar(tmp_path / "cifar10.tar", images))
    images["train/frog/0000.jpg"] = encode(np.zeros((31, 32, 3)), "jpg")
    with one_line_about("frog/0000.jpg", "31 x 32"):
        data.cifar10(tar(tmp_path / "cifar10.tar", images))


# ---------------------------------------------------------------- CIFAR-100

NAMES100 = [f"thing_{i}" for i in range(100)]


def cifar100_files(version: str) -> tuple[dict[str, bytes], dict[str, tuple[np.ndarray, list[int]]]]:
    """The files of the python or the binary version, and the rows and fine labels in them."""
    parts = {part: (RNG.integers(0, 256, (n, 3072)).astype(np.uint8), [(7 * i) % 100 for i in range(n)])
             for part, n in (("train", 30), ("test", 20))}
    if version == "python":
        files = {part: pickle.dumps({"data": rows, "fine_labels": labels, "coarse_labels": [0] * len(rows), "filenames": ["a"]}, 2)
                 for part, (rows, labels) in parts.items()}
        files["meta"] = pickle.dumps({"fine_label_names": NAMES100, "coarse_label_names": ["thing"]}, 2)
    else:
        files = {f"{part}.bin": np.hstack([np.full((len(rows), 1), 3), np.array(labels)[:, None], rows]).astype(np.uint8).tobytes()
                 for part, (rows, labels) in parts.items()}
        files["fine_label_names.txt"] = "\n".join(NAMES100).encode() + b"\n"
    return {f"cifar-100-{version}/{name}": content for name, content in files.items()}, parts


@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("at", ["archive", "beside archive", "folder", "beside folder"])
def test_cifar100_reads_the_published_files(tmp_path, version, at):
    files, parts = cifar100_files(version)
    write(tmp_path, files) if "folder" in at else tar(tmp_path / f"cifar-100-{version}.tar.gz", files)
    root = {"archive": tmp_path / f"cifar-100-{version}.tar.gz", "folder": tmp_path / f"cifar-100-{version}"}.get(at, tmp_path)
    for found, (name, (rows, labels)) in zip(data.load("cifar100", root), parts.items(), strict=True):
        assert (found.name, found.classes) == (f"cifar100 {name}", tuple(NAMES100))
        assert np.array_equal(found.images.reshape(-1, 3072), rows) and found.labels.tolist() == labels


def test_cifar100_says_what_is_wrong_with_its_files(tmp_path):
    with one_line_about(tmp_path, "no train, test, meta of CIFAR-100"):
        data.cifar100(tmp_path)
    for version, name, wrong, words in [
            ("python", "meta", pickle.dumps({"fine_label_names": ["a"]}), "1 names of classes"),
            ("python", "meta", b"x", "names of classes"), ("python", "train", pickle.dumps({"data": 1}), "not a pickled batch"),
            ("binary", "test.bin", b"xx", "records of 3074"), ("binary", "fine_label_names.txt", None, "no fine_"),
            ("python", "test", pickle.dumps(Malicious(os.mkdir, "x")), "nothing was run")]:
        files, _ = cifar100_files(version)
        folder = tmp_path / f"{version} {name} {words}"
        files[f"cifar-100-{version}/{name}"] = wrong
        write(folder, {path: content for path, content in files.items() if content is not None})
        with one_line_about(words):
            data.cifar100(folder)


# ---------------------------------------------------------------- by name, and single images

def test_bad_files_are_named_and_left_out_if_one_says_so(tmp_path):
    files = {**two_classes(4), "cat/bad.png": b"no image", "dog/short.png": two_classes(1)["dog/000.png"][:40]}
    for root in (write(tmp_path / "pets", files), tar(tmp_path / "pets.tar", files)):
        with one_line_about("cat/bad.png" if root.is_dir() else "bad.png", "Pillow"):
            data.image_folder(root)
        with pytest.warns(RuntimeWarning, match="2 of 10 image files cannot be read and are left out: .*bad.png, .*short.png$"):
            train, test = data.image_folder(root, skip_bad=True)
        assert len(train) + len(test) == 8
    many = {**two_classes(4), **{f"cat/bad{i:02}.png": b"no" for i in range(12)}}
    with pytest.warns(RuntimeWarning, match="bad09.png and 2 more$"):
        data.load(str(write(tmp_path / "many", many)), skip_bad=True)
    with one_line_about("holds no image files but 1 that cannot be read"):
        data.image_folder(write(tmp_path / "none", {"cat/bad.png": b"no"}), skip_bad=True)

def test_load_finds_each_kind_by_name(tmp_path):
    mnist_half(tmp_path, "t10k", 20)
    assert data.load("mnist", tmp_path)[0].name.startswith("mnist train")
    train, test = data.load("fashion_mnist", tmp_path)          # the same format under the same names: only the classes are others
    assert train.name.startswith("fashion_mnist train") and train.classes == test.classes
    assert (train.classes[0], train.classes[9], len(train.classes)) == ("T-shirt/top", "Ankle boot", 10)
    tar(tmp_path / "cifar10.tar", cifar_images())
    assert data.load("cifar10", str(tmp_path))[1].name == "cifar10 test"
    write(tmp_path / "pets", two_classes(2))
    assert data.load(str(tmp_path / "pets"))[0].classes == data.load("pets", tmp_path)[0].classes == ("cat", "dog")
    pytest.importorskip("sklearn", reason="digits need scikit-learn")
    assert len(data.load("digits")[1]) == 360


def test_load_says_what_it_needs(tmp_path):
    for name in ("mnist", "fashion_mnist", "cifar10", "cifar100"):
        with one_line_about(name, "--root FOLDER"):
            data.load(name)
    with one_line_about("'minst'", "digits, mnist, fashion_mnist, cifar10, cifar100"):
        data.load("minst", tmp_path)


def test_read_image_gives_the_channels_and_the_size_asked_for(tmp_path):
    pixels = RNG.integers(0, 256, (6, 6, 3))
    write(tmp_path, {"a.png": encode(pixels), "grey.png": encode(pixels[..., 0]), "no.png": b"nothing"})
    image = data.read_image(tmp_path / "a.png", (3, 6, 6))
    assert image.dtype == np.uint8 and image.flags.c_contiguous and np.array_equal(image, pixels.transpose(2, 0, 1))
    luma = pixels @ [0.299, 0.587, 0.114]                       # ITU-R 601
    assert abs(data.read_image(str(tmp_path / "a.png"), (1, 6, 6))[0] - luma).max() <= 1
    grey = data.read_image(tmp_path / "grey.png", (3, 6, 6))
    assert all(np.array_equal(channel, pixels[..., 0]) for channel in grey)
    assert data.read_image(tmp_path / "a.png", (3, 8, 4)).shape == (3, 8, 4)
    with one_line_about("no.png", "not an image"):
        data.read_image(tmp_path / "no.png", (3, 8, 8))
    with one_line_about("gone.png", "no such file"):
        data.read_image(tmp_path / "gone.png", (3, 8, 8))
    with one_line_about(tmp_path, "directory"):
        data.read_image(tmp_path, (3, 8, 8))
    with pytest.raises(ValueError, match="takes 4"):
        data.read_image(tmp_path / "a.png", (4, 8, 8))


def test_image_files_without_pillow_say_what_to_install(tmp_path, monkeypatch):
    write(tmp_path, {"a.png": plain(0)})
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"Pillow.*pip install (pillow|scikit-learn)"):
        data.read_image(tmp_path / "a.png", (1, 4, 4))


def test_the_room_is_entered_without_the_optional_libraries():
    """Whoever has NumPy alone can use everything but image files and the digits."""
    check = "import sys, minicnn.data; assert not {'PIL', 'sklearn'}.intersection(sys.modules)"
    where = {**os.environ, "PYTHONPATH": str(Path(data.__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", check], env=where, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


# ---------------------------------------------------------------- statistics, normalisation, augmentation

@pytest.mark.parametrize("n", [1, 999, 1000, 2001])             # around the size of the blocks
def test_channel_statistics_are_those_of_the_pixels(n):
    images = RNG.integers(0, 256, (n, 3, 2, 3)).astype(np.uint8)
    images[:, 1] //= 7
    mean, std = data.channel_statistics(images)
    assert all(type(value) is float for value in (*mean, *std))
    np.testing.assert_allclose(mean, (images / 255).mean((0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(std, (images / 255).std((0, 2, 3)), rtol=1e-12)


def test_channel_statistics_of_a_constant_are_exact_and_of_nothing_an_error():
    assert data.channel_statistics(np.full((7, 1, 3, 3), 51, np.uint8)) == ((0.2,), (0.0,))
    with pytest.raises(ValueError, match=r"\(0, 3, 2, 2\)"):
        data.channel_statistics(np.zeros((0, 3, 2, 2), np.uint8))


channel_values = st.lists(st.tuples(st.floats(-2, 2), st.floats(0.01, 10)), min_size=1, max_size=4)


@unhurried
@given(values=channel_values, seed=st.integers(0, 2**32))
def test_normalize_follows_its_equation_and_can_be_undone(values, seed):
    mean, std = zip(*values, strict=True)
    images = np.random.default_rng(seed).integers(0, 256, (2, len(mean), 3, 2)).astype(np.uint8)
    normalize = Normalize(mean, std)
    x = normalize(images, np.float64)
    each = np.array(mean)[:, None, None], np.array(std)[:, None, None]
    expected = (images / 255 - each[0]) / each[1]
    np.testing.assert_allclose(x, expected, rtol=1e-12, atol=1e-12 * (1 + 3 / min(std)))
    assert np.array_equal(np.rint((x * each[1] + each[0]) * 255), images)
    single = normalize(images, np.float32)
    assert single.dtype == np.float32 and x.dtype == np.float64
    np.testing.assert_allclose(single, expected, rtol=1e-5, atol=1e-6 * (1 + 3 / min(std)))
    assert np.array_equal(normalize(images[0], np.float64), x[0])
    assert Normalize.from_dict(json.loads(json.dumps(normalize.as_dict()))) == normalize
    assert Normalize.from_dict({name: np.array(v) for name, v in normalize.as_dict().items()}) == normalize


def test_normalize_refuses_what_it_cannot_do():
    for mean, std, words in [((0.5,), (1, 1), "one a channel"), ((), (), "one a channel"), ((0.5,), (0.0,), "positive"),
                             ((float("nan"),), (1,), "finite")]:
        with pytest.raises(ValueError, match=words):
            Normalize(mean, std)
    normalize = Normalize((0.5,), (0.5,))
    for images in (np.zeros((2, 3, 4, 4), np.uint8), np.zeros((2, 1, 4, 4)), np.zeros((4, 4), np.uint8)):
        with pytest.raises(ValueError, match="1 means takes uint8"):
            normalize(images)
    with pytest.raises(ValueError, match="float32"):
        normalize(np.zeros((2, 1, 4, 4), np.uint8), np.int64)
    with pytest.raises(ValueError, match="'mean' and 'std'"):
        Normalize.from_dict({"mean": [0.5]})


@unhurried
@given(seed=st.integers(0, 2**32), pad=st.integers(0, 5), flip=st.booleans(), shape=st.tuples(
    st.integers(0, 6), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)))
def test_an_augmented_image_is_the_image_shifted_over_zeros_perhaps_flipped(seed, pad, flip, shape):
    images = np.random.default_rng(seed).integers(1, 256, shape).astype(np.uint8)
    before = images.copy()
    result = data.augment(images, np.random.default_rng(seed), pad=pad, flip=flip)
    assert np.array_equal(images, before) and not np.shares_memory(images, result)
    assert (result.shape, result.dtype) == (images.shape, np.uint8)
    height, width = shape[2:]
    for image, got in zip(images, result, strict=True):         # naively: one of all the images it could be
        could_be = []
        for down, right, mirrored in itertools.product(range(-pad, pad + 1), range(-pad, pad + 1), {False, flip}):
            moved = np.zeros_like(image)
            for y, x in itertools.product(range(height), range(width)):
                if 0 <= y + down < height and 0 <= x + right < width:
                    moved[:, y, x] = image[:, y + down, x + right]
            could_be.append(moved[:, :, ::-1] if mirrored else moved)
        assert any(np.array_equal(got, other) for other in could_be)


def test_every_shift_and_both_directions_come_up_about_equally_often():
    one = np.zeros((9000, 1, 5, 5), np.uint8)
    one[:, 0, 2, 1] = 255                                       # off the middle, so that a flip shows
    result = data.augment(one, np.random.default_rng(0), pad=1, flip=True)[:, 0]
    _, down, right = np.nonzero(result)
    assert len(down) == 9000                                    # a shift by 1 never loses this pixel
    assert set(down) == {1, 2, 3} and set(right) == {0, 1, 2, 3, 4}
    assert abs(np.bincount(down)[1:] - 3000).max() < 250
    assert abs(np.bincount(right) - [1500, 1500, 3000, 1500, 1500]).max() < 250
    both = np.bincount(5 * (down - 1) + right).reshape(3, 5)   # a shift down says nothing about one to the right
    assert abs(both - [500, 500, 1000, 500, 500]).max() < 150
    assert np.array_equal(data.augment(one, np.random.default_rng(0), pad=0, flip=False), one)


@unhurried
@given(n=st.integers(1, 20), pad=st.integers(0, 5), flip=st.booleans(), channels=st.integers(1, 3))
def test_what_an_augmentation_draws_depends_on_the_number_of_images_alone(n, pad, flip, channels):
    used, plain_rng = np.random.default_rng(1), np.random.default_rng(1)
    data.augment(np.ones((n, channels, 3, 4), np.uint8), used, pad=pad, flip=flip)
    data.augment(np.zeros((n, 1, 8, 8), np.uint8), plain_rng, pad=0, flip=False)
    assert used.random() == plain_rng.random()


@unhurried
@given(seed=st.integers(0, 2**32), cutout=st.integers(1, 9), pad=st.integers(0, 2), shape=st.tuples(
    st.integers(1, 6), st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)))
def test_a_square_is_cut_out_of_the_augmented_image(seed, cutout, pad, shape):
    images = np.full(shape, 200, np.uint8)
    whole = data.augment(images, np.random.default_rng(seed), pad=pad, flip=True)
    cut = data.augment(images, np.random.default_rng(seed), pad=pad, flip=True, cutout=cutout)
    height, width = shape[2:]
    for before, after in zip(whole, cut, strict=True):
        could_be = []
        for middle in itertools.product(range(height), range(width)):
            expected = before.copy()
            for y, x in itertools.product(range(height), range(width)):
                if all(0 <= at - (m - cutout // 2) < cutout for at, m in zip((y, x), middle, strict=True)):
                    expected[:, y, x] = 0
            could_be.append(expected)
        assert any(np.array_equal(after, other) for other in could_be)


def test_squares_are_cut_out_everywhere():
    cut = data.augment(np.ones((4000, 1, 4, 5), np.uint8), np.random.default_rng(0), pad=0, flip=False, cutout=1)[:, 0]
    assert (cut.reshape(4000, -1) == 0).sum(axis=1).tolist() == [1] * 4000
    assert abs((cut == 0).sum(axis=0) - 200).max() < 60


def test_augment_refuses_what_is_no_batch():
    for shape, pad, cutout in (((3, 4, 4), 1, 0), ((1, 3, 4, 4), -1, 0), ((1, 3, 4, 4), 0, -1)):
        with pytest.raises(ValueError, match="pad"):
            data.augment(np.zeros(shape, np.uint8), np.random.default_rng(0), pad=pad, flip=True, cutout=cutout)


# ---------------------------------------------------------------- batches

def seen(dataset: ImageSet, size: int, **how) -> list[list[int]]:
    """The batches as lists of the images' numbers (see image_set), having checked that labels go with images."""
    batches = list(data.batches(dataset, size, **how))
    for images, labels in batches:
        assert images.dtype == np.uint8 and np.array_equal(labels, images[:, 0, 0, 0] % 2)
    return [images[:, 0, 0, 0].tolist() for images, _ in batches]


@unhurried
@given(n=st.integers(1, 40), size=st.integers(1, 45), seed=st.integers(0, 2**70), epoch=st.integers(0, 10**6),
       shuffle=st.booleans(), drop_last=st.booleans(), draw=st.data())
def test_an_epoch_is_every_image_once_and_a_late_start_its_suffix(n, size, seed, epoch, shuffle, drop_last, draw):
    dataset = image_set(n)
    how = {"seed": seed, "epoch": epoch, "shuffle": shuffle, "drop_last": drop_last}
    steps = data.steps_per_epoch(n, size, drop_last=drop_last)
    if steps == 0:
        with pytest.raises(ValueError, match="make no batch"):
            data.batches(dataset, size, **how)
        return
    whole = seen(dataset, size, **how)
    assert len(whole) == steps
    assert [len(batch) for batch in whole] == [size] * (n // size) + ([n % size] if n % size and not drop_last else [])
    numbers = [number for batch in whole for number in batch]
    assert len(set(numbers)) == len(numbers) == (n - n % size if drop_last else n)
    if not shuffle:
        assert numbers == list(range(len(numbers)))
    start = draw.draw(st.integers(0, steps))
    assert seen(dataset, size, start=start, **how) == whole[start:]


@unhurried
@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 50), start=st.integers(0, 4))
def test_a_resumed_epoch_sees_the_same_augmented_pixels(seed, epoch, start):
    rng = np.random.default_rng(5)
    dataset = ImageSet(rng.integers(0, 256, (19, 3, 6, 6)).astype(np.uint8), np.zeros(19, np.int64), ("a",), "noise")
    how = {"seed": seed, "epoch": epoch, "augmentation": functools.partial(data.augment, pad=2, flip=True)}
    whole = list(data.batches(dataset, 4, **how))
    for resumed, first in zip(data.batches(dataset, 4, start=start, **how), whole[start:], strict=True):
        assert all(np.array_equal(one, other) for one, other in zip(resumed, first, strict=True))


def test_orders_and_draws_differ_between_seeds_epochs_and_steps():
    dataset, draws = image_set(64), []

    def keep(images, rng):
        draws.append(tuple(rng.random(2)))
        return images
    orders = [str(seen(dataset, 16, seed=seed, epoch=epoch, augmentation=keep))
              for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == len(orders)
    assert len(set(draws)) == len(draws) == 4 * 4 * 4
    assert all(tuple(np.random.default_rng(seed).random(2)) not in draws for seed in range(4))
    # a plain generator of the same seed, as somebody else's initialisation uses, gives no epoch's order
    for seed in range(4):
        assert str(np.random.default_rng(seed).permutation(64).reshape(4, 16).tolist()) not in orders


def test_batches_are_copies_and_the_augmentation_gets_them():
    dataset = image_set(6)
    for shuffle in (False, True):
        for images, labels in data.batches(dataset, 4, seed=0, epoch=0, shuffle=shuffle):
            images[:], labels[:] = 255, 9
    assert dataset.images.max() == 5 and dataset.labels.max() == 1
    doubled = data.batches(dataset, 4, seed=0, epoch=0, shuffle=False, augmentation=lambda images, rng: images * 2)
    assert [images[:, 0, 0, 0].tolist() for images, _ in doubled] == [[0, 2, 4, 6], [8, 10]]


def test_batches_complain_at_the_call_not_at_the_first_step():
    dataset = image_set(10)
    for how, words in [({"batch_size": 0}, "at least one"), ({"start": 4}, "0 to 3"), ({"start": -1}, "0 to 3"),
                       ({"seed": -1}, "negative"), ({"epoch": -1, "shuffle": False}, "negative"),
                       ({"batch_size": 11, "drop_last": True}, "make no batch"),
                       ({"dataset": dataset.subset([])}, "make no batch")]:
        with pytest.raises(ValueError, match=words):
            data.batches(**{"dataset": dataset, "batch_size": 4, "seed": 0, "epoch": 0, **how})


# ---------------------------------------------------------------- real files

def test_the_real_mnist_test_digits():
    root = real("t10k-images-idx3-ubyte.gz")
    labels = handwritten.read_idx(root / "t10k-labels-idx1-ubyte.gz", 1)
    assert np.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    train, test = data.mnist(root)
    assert (len(train), len(test)) == (8000, 2000) and train.images.shape[1:] == (1, 28, 28)
    # an upright 1 is a stroke down the middle: its mean image is taller than wide, and bright on a dark ground
    one = train.images[train.labels == 1, 0].mean(0)
    assert one[:, 13:15].sum() > 2 * one[13:15].sum() and one[0].max() < 1 < 100 < one.max()


@pytest.mark.slow
def test_the_real_cifar10_as_image_files():
    train, test = data.load("cifar10", real("cifar10-jpeg.tar.xz"))
    assert np.bincount(train.labels).tolist() == [5000] * 10 and np.bincount(test.labels).tolist() == [1000] * 10
    assert train.images.shape == (50000, 3, 32, 32) and train.classes == CIFAR10_CLASSES
    mean, std = data.channel_statistics(train.images)           # the published figures are of the uncompressed images
    np.testing.assert_allclose(mean, (0.4914, 0.4822, 0.4465), atol=1e-3)
    np.testing.assert_allclose(std, (0.2470, 0.2435, 0.2616), atol=3e-3)
