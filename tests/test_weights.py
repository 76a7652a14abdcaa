"""Files: what goes in comes out, damage is told, and a file is whole or is the old one."""
import builtins
import errno
import os
import signal
import stat
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

import minicnn as mc
from minicnn import weights
from minicnn.weights import WeightsError, archives

STATE = {
    "model": {"conv1.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2), "bn1.num_batches_tracked": np.array(7),
              "half": np.arange(3, dtype=np.float16), "mask": np.array([[True, False]]), "bytes": np.arange(256, dtype=np.uint8),
              "empty": np.zeros((0, 3)), "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "strided": np.arange(10)[::2],
              "file": np.ones(2), "arr_0": np.zeros(2), "self": np.full(3, 0.1)},
    "optimizer": {"groups": {"0": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "betas": (0.9, 0.999)}}},
    "epoch": 3, "best": -1.5, "name": "resnet20", "note": "Zoë: größer, ≥ 81 %\nsecond line", "nothing": "",
    "a 0-d": np.array(2.5, np.float32), "a scalar": np.float64(0.1), "a": 1, "a.npy": 2, "list": [1.0, 2.0]}


FORMATS = {".npz": "npz", ".safetensors": "safetensors", ".pth": "pytorch"}


@pytest.fixture(params=FORMATS)
def suffix(request):
    if request.param == ".safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    return request.param


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        if isinstance(a[name], dict):
            assert_equal(a[name], b[name])
        elif isinstance(b[name], (list, tuple)):            # as PyTorch's checkpoints have them
            assert type(a[name]) is type(b[name])
            assert_equal(dict(enumerate(a[name])), dict(enumerate(b[name])))
        else:
            x, y = np.asarray(a[name]), b[name]
            assert (type(y), x.dtype, x.shape) == (np.ndarray, y.dtype, y.shape), name
            assert x.tobytes() == y.tobytes(), name


# ---------------------------------------------------------------- what goes in comes out
def test_a_state_comes_back(tmp_path, suffix):
    path = tmp_path / f"state{suffix}"
    mc.save(path, STATE)
    assert_equal(STATE, mc.load(path))
    mc.save(str(path), mc.load(str(path)))          # paths as text too, and what was loaded saves again
    assert_equal(STATE, mc.load(path))


def test_loaded_arrays_are_the_readers_own(tmp_path, suffix):
    path = tmp_path / f"state{suffix}"
    mc.save(path, {"a": np.zeros(3)})
    a = mc.load(path)["a"]
    a += 1
    np.testing.assert_array_equal(mc.load(path)["a"], np.zeros(3))


def test_an_empty_state_comes_back(tmp_path, suffix):
    mc.save(tmp_path / f"empty{suffix}", {})
    assert mc.load(tmp_path / f"empty{suffix}") == {}


def test_arrays_of_every_backend_are_saved(tmp_path, suffix, device):
    path = tmp_path / f"state{suffix}"
    mc.save(path, {"a": device.put(np.arange(3.0)), "b": {"c": device.put(np.array(2))}})
    assert_equal({"a": np.arange(3.0), "b": {"c": np.array(2)}}, mc.load(path))


def test_tensors_are_saved_by_their_numbers(tmp_path, suffix):
    path = tmp_path / f"state{suffix}"
    mc.save(path, {"a": mc.Tensor(np.arange(3.0), requires_grad=True)})
    assert_equal({"a": np.arange(3.0)}, mc.load(path))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"], indirect=True)        # PyTorch itself: test_pytorch_files.py
def test_other_libraries_read_and_write_the_same_files(tmp_path, suffix):
    path = tmp_path / f"state{suffix}"
    flat = {"conv.weight": np.arange(4, dtype=np.float32).reshape(2, 2), "fc.bias": np.zeros(3)}
    mc.save(path, flat)
    if suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            assert_equal(flat, {name: archive[name] for name in archive.files})
        np.savez_compressed(path, **flat)
    else:
        import safetensors.numpy
        assert_equal(flat, safetensors.numpy.load_file(path))
        safetensors.numpy.save_file(flat, path, {"format": "pt"})
    assert_equal(flat, mc.load(path))


# ---------------------------------------------------------------- large files
MAPPED = """
import sys
import numpy as np
import minicnn as mc
def own():                                          # bytes that are this process's alone, and not a file's
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))
mc.load(sys.argv[2])                                # a small one: what is imported then is there
before = own()
a = mc.load(sys.argv[1])["a"]
print(own() - before, a.nbytes, int(a.sum()), a.flags.aligned, a.flags.owndata)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="what a process holds is told by Linux alone")
def test_a_large_file_is_mapped(tmp_path, suffix):
    """Its numbers take no memory of the process, though those of an .npz are all read, for their checksum."""
    large, small = tmp_path / f"large{suffix}", tmp_path / f"small{suffix}"
    mc.save(large, {"x": np.zeros(3), "a": np.ones(archives.LARGE // 4, np.float32)})
    mc.save(small, {"a": np.ones(1)})
    found = subprocess.run([sys.executable, "-c", MAPPED, large, small], capture_output=True, text=True, check=True).stdout.split()
    assert found[1:] == [str(archives.LARGE), str(archives.LARGE // 4), "True", "False"]
    assert int(found[0]) < archives.LARGE // 8


def test_a_small_file_is_read_once(tmp_path, suffix):
    path = tmp_path / f"state{suffix}"
    mc.save(path, {"a": np.ones(1 << 20)})
    mc.load(path)
    tracemalloc.start()
    try:
        mc.load(path)
        assert tracemalloc.get_traced_memory()[1] < 1.2 * path.stat().st_size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("save", [mc.save, lambda path, state: np.savez(path, **state)], ids=["ours", "NumPy's"])
def test_a_mapped_npz_is_checked_and_written_to_in_memory_alone(tmp_path, monkeypatch, save):
    monkeypatch.setattr(archives, "LARGE", 100)
    path, state = tmp_path / "state.npz", {"a": np.arange(100.0), "odd": np.arange(50, dtype=np.float32), "text": np.array("words")}
    save(path, state)
    before, loaded = path.read_bytes(), mc.load(path)
    assert_equal(state, loaded)
    assert all(array.flags.aligned for array in loaded.values())
    loaded["a"] += 1
    assert path.read_bytes() == before
    mc.save(path, {"other": np.zeros(3)})                              # while arrays of the old one are in use
    np.testing.assert_array_equal(loaded["a"], state["a"] + 1)
    at = before.index(np.arange(100.0).tobytes()) + 50
    path.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1:])
    with pytest.raises(WeightsError, match=r"state.npz is damaged.*a.npy is damaged: its checksum is another"):
        mc.load(path)


def test_a_mapped_safetensors_is_written_to_in_memory_alone(tmp_path, monkeypatch):
    library = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    monkeypatch.setattr(archives, "LARGE", 100)
    path, state = tmp_path / "state.safetensors", {"a": np.arange(100.0), "b": np.arange(3, dtype=np.uint8), "c": np.zeros((0, 3)),
                                                   "d": np.ones((2, 1), np.float16), "e": np.array(7), "f": np.array([True, False])}
    library.save_file(state, path)
    before, loaded = path.read_bytes(), mc.load(path)
    assert_equal(state, loaded)
    assert all(array.flags.aligned for array in loaded.values())
    loaded["a"] += 1
    assert path.read_bytes() == before
    table = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[1,9]},"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    path.write_bytes(struct.pack("<Q", len(table)) + table + b"\7" + np.array([1, 2], np.float32).tobytes())
    loaded = mc.load(path)                                              # the format lets arrays begin anywhere
    assert_equal({"b": np.array([7], np.uint8), "a": np.array([1, 2], np.float32)}, dict(sorted(loaded.items(), reverse=True)))
    assert loaded["a"].flags.aligned


@pytest.mark.parametrize("kind", [".npz", ".pth"])
def test_every_array_begins_at_an_even_place(tmp_path, kind):
    """So that one that is mapped is as quick to read as any."""
    path = tmp_path / f"state{kind}"
    mc.save(path, {f"{'größer' * i}": {"a": np.ones(3 + i, np.uint8), "b": np.ones(2)} for i in range(1, 9)})
    for inner in mc.load(path).values():
        for array in inner.values():
            assert path.read_bytes().count(array.tobytes()) and array.ctypes.data % 8 == 0 and not array.flags.owndata
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith(".npy") or "/data/" in entry.filename:
                begin = archives.stored(memoryview(content), entry).tobytes()
                assert content.index(begin, entry.header_offset) % archives.ALIGNED == 0


# ---------------------------------------------------------------- what cannot be saved
@pytest.mark.parametrize("state, words", [
    ({"a/b": np.ones(1)}, "a/b: a name must not be empty or contain '/'"), ({"a": {"b/c": 1}}, "a/b/c: a name must not"),
    ({"": 1}, "must not be empty"), ({"a": {"": 1}}, "a/: a name must not be empty")])
def test_names_that_would_not_come_back_are_refused(tmp_path, suffix, state, words):
    with pytest.raises(ValueError, match=words):
        mc.save(tmp_path / f"state{suffix}", state)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("state", [{1: np.ones(1)}, {"a": {1: 2}}, {"a": {("b",): 2}}])
def test_names_are_strings(tmp_path, suffix, state):
    with pytest.raises(TypeError, match=r"^(1|a/1|a/\('b',\)): names are strings, and this is a (int|tuple): write str\("):
        mc.save(tmp_path / f"state{suffix}", state)
    assert not list(tmp_path.iterdir())


NEITHER = [None, [[1], [1, 2]], 1 << 70, object(), {1, 2}, [object()], 1j, b"bytes", np.array(["a", None]), len]


@pytest.mark.parametrize("value", NEITHER, ids=lambda value: type(value).__name__)
def test_values_that_are_no_arrays_numbers_or_strings_are_refused(tmp_path, suffix, value):
    if suffix == ".pth" and any(value is taken for taken in NEITHER[:2]):
        pytest.skip("PyTorch's checkpoints have None and lists")
    with pytest.raises((TypeError, ValueError), match="^model/x: .*use arrays, numbers and strings"):
        mc.save(tmp_path / f"state{suffix}", {"model": {"x": value}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("state", [{"classes": ["cat", "dog"]}, {"a": {"b": np.array(["x"])}}, {"format": "of a state's own"},
                                   {"minicnn": "too"}, {"a": np.ones(2, np.longdouble)}])
def test_what_safetensors_cannot_hold_is_refused_and_npz_holds_it(tmp_path, state):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    if np.longdouble(1).itemsize == 8 and "classes" not in state:
        pytest.skip("no long doubles on this machine")
    with pytest.raises(ValueError, match=r"^(classes|a/b|format|minicnn|a): a .safetensors file cannot hold it.*save to .npz"):
        mc.save(tmp_path / "state.safetensors", state)
    assert not list(tmp_path.iterdir())
    mc.save(tmp_path / "state.npz", state)
    assert_equal(state, mc.load(tmp_path / "state.npz"))


@pytest.mark.parametrize("name", ["model", "model.txt", "model.npy", "model.npz.bak", ".npz"])
def test_the_suffix_names_the_format(tmp_path, name):
    for use in (lambda path: mc.save(path, {"a": 1}), mc.load):
        with pytest.raises(ValueError, match=r"the suffix names the format.*\.npz, \.safetensors"):
            use(tmp_path / name)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- files that are missing or damaged
def test_missing_files_and_folders_are_told_apart(tmp_path, suffix):
    with pytest.raises(FileNotFoundError, match=r"none\S* does not exist"):
        mc.load(tmp_path / f"none{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(FileNotFoundError, match="is not a file"):
        mc.load(tmp_path / f"folder{suffix}")
    with pytest.raises(FileNotFoundError, match=f"nowhere/state{suffix}'$"):
        mc.save(tmp_path / "nowhere" / f"state{suffix}", {"a": 1})
    with pytest.raises(IsADirectoryError, match=f"folder{suffix}'$"):
        mc.save(tmp_path / f"folder{suffix}", {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == [f"folder{suffix}"]


def test_a_truncated_file_is_told_wherever_it_was_cut(tmp_path, suffix):
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    mc.save(whole, STATE)
    content = whole.read_bytes()
    for i in range(20):
        cut.write_bytes(content[:len(content) * i // 20])
        with pytest.raises(WeightsError, match=rf"cut\{suffix} is damaged or not") as caught:
            mc.load(cut)
        assert "\n" not in str(caught.value)
    cut.write_bytes(content[:-1])
    with pytest.raises(WeightsError):
        mc.load(cut)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"not an archive", b"PK\x03\x04 but no more",
                                     struct.pack("<Q", 2 ** 60) + b"{}",
                                     struct.pack("<Q", 8) + b"not json", b"\x80\x04\x95 a pickle"])
def test_a_file_of_another_kind_is_told(tmp_path, suffix, content):
    path = tmp_path / f"state{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="state") as caught:
        mc.load(path)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_changes_no_number_unseen(tmp_path):
    """An .npz carries a checksum of every array. (A bit of the archive's own directory may lose one; load_state_dict tells.)"""
    path = tmp_path / "state.npz"
    state = {"a": np.arange(4.0), "b": "text"}
    mc.save(path, state)
    content, told = path.read_bytes(), 0
    flips = np.random.default_rng(0).choice(8 * len(content), 400, replace=False)
    for at, bit in (divmod(int(flip), 8) for flip in flips):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1:])
        try:
            loaded = mc.load(path)
        except WeightsError as error:
            told += 1
            assert "\n" not in str(error)
        else:
            assert_equal({name: state[name] for name in loaded}, loaded)
    assert 200 < told < 400


def test_a_header_that_counts_too_few_numbers_is_told(tmp_path):
    """Whoever stops reading where the header says so never comes to the checksum."""
    path = tmp_path / "state.npz"
    mc.save(path, {"a": np.arange(4000.0)})
    content = path.read_bytes()
    assert content.count(b"'shape': (4000,)") == 1
    path.write_bytes(content.replace(b"'shape': (4000,)", b"'shape': (0000,)"))
    with pytest.raises(WeightsError):
        mc.load(path)


def test_nothing_in_a_file_is_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)
    path = tmp_path / "trap.npz"
    np.savez(path, a=np.array([Trap()], object))
    with pytest.raises(WeightsError, match="trap.npz"):
        mc.load(path)
    np.save(tmp_path / "trap.npy", np.array([Trap()], object))
    os.replace(tmp_path / "trap.npy", path)
    with pytest.raises(WeightsError, match="trap.npz"):
        mc.load(path)
    assert not (tmp_path / "executed").exists()


def test_an_array_alone_and_clashing_names_are_no_states(tmp_path):
    path = tmp_path / "state.npz"
    with open(path, "wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(WeightsError, match="not an .npz file"):
        mc.load(path)
    for names in (["a", "a/b"], ["a/b", "a"], ["a", "a/b/c"]):
        np.savez(path, **dict.fromkeys(names, np.ones(1)))
        with pytest.raises(WeightsError, match=names[1]):
            mc.load(path)


# ---------------------------------------------------------------- archives that mean harm
def test_what_would_unpack_to_too_much_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "state.npz"
    state = {"a": np.zeros(300_000), "b": np.zeros(300_000)}
    np.savez_compressed(path, **state)
    assert_equal(state, mc.load(path))
    size = path.stat().st_size
    monkeypatch.setattr(archives, "UNPACKED_FLOOR", 1 << 20)
    with pytest.raises(WeightsError, match=rf"state.npz is refused: it would become 4,800,256 bytes .* for {size:,} is 1,048,576"):
        mc.load(path)
    monkeypatch.setattr(archives, "DEFLATE_MOST", 2)                   # as if a file claimed more than can be
    with pytest.raises(WeightsError, match="a.npy claims that .* bytes become .*: deflate cannot do that"):
        mc.load(path)
    rng = np.random.default_rng(0)                                      # of numbers that do not compress, any amount
    state = {"a": rng.random(100_000)}
    np.savez_compressed(path, **state)
    assert_equal(state, mc.load(path))


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="what a process holds is told by Linux alone")
def test_many_zeros_in_a_small_file_take_no_memory(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource", reason="no limits on memory here")
    monkeypatch.setattr(archives, "UNPACKED_FLOOR", 1 << 27)
    path = tmp_path / "state.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w", force_zip64=True) as entry:
        np.lib.format.write_array_header_1_0(entry, {"descr": "|u1", "fortran_order": False, "shape": (1 << 28,)})
        for _ in range(1 << 4):
            entry.write(bytes(1 << 24))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (64 << 20), limits[1]))
    try:
        with pytest.raises(WeightsError, match="is refused"):
            mc.load(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_what_would_be_unpacked_must_lie_in_the_file(tmp_path):
    """Or else an entry could claim a length from which deflate might make anything."""
    path = tmp_path / "state.npz"
    np.savez_compressed(path, a=np.zeros(1000))
    with zipfile.ZipFile(path) as archive:
        size, entry = path.stat().st_size, archive.getinfo("a.npy")
        assert archives.entries(archive, size) == {"a.npy": entry}
        entry.compress_size, entry.file_size = 1 << 20, 1 << 29
        with pytest.raises(ValueError, match="a.npy is cut short"):
            archives.entries(archive, size)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(tmp_path, method):
    path = tmp_path / "state.npz"
    with zipfile.ZipFile(path, "w", method) as archive, archive.open("a.npy", "w") as entry:
        np.save(entry, np.zeros(100))
    with pytest.raises(WeightsError, match=r"is refused: it has an entry a.npy that is compressed in another way"):
        mc.load(path)


@pytest.mark.parametrize("kind", [".npz", ".pth"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_entries_that_stand_twice_are_told(tmp_path, kind):
    """By name; and by place, so that a small file would become many arrays."""
    path = tmp_path / f"state{kind}"
    mc.save(path, {"a": np.ones(3), "b": np.ones(3)})
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    last = [*entries][-1]
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(last, entries[last])
    with pytest.raises(WeightsError, match="two entries have one name"):
        mc.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
        archive.getinfo(last).header_offset = archive.getinfo([*entries][-2]).header_offset
    with pytest.raises(WeightsError, match="lies over another"):
        mc.load(path)
    if kind == ".npz":
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("a", "a.npy"):
                archive.writestr(name, entries[last])
        with pytest.raises(WeightsError, match="two arrays have one name"):
            mc.load(path)


# ---------------------------------------------------------------- what is not the file's fault
@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EIO, "Input/output error"), OSError(errno.ENOMEM, "no memory")])
def test_the_machines_faults_are_not_called_damage(tmp_path, suffix, monkeypatch, error):
    path = tmp_path / f"state{suffix}"
    mc.save(path, {"a": 1})

    def broken(file):
        raise error

    monkeypatch.setattr(archives, "contents", broken)
    with pytest.raises(type(error)) as caught:
        mc.load(path)
    assert caught.value is error


def test_texts_that_others_write_beside_their_arrays_are_no_part_of_the_state(tmp_path):
    library = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    path = tmp_path / "state.safetensors"
    library.save_file({"w": np.ones(3)}, path, {"format": "pt", "license": "MIT"})
    assert_equal({"w": np.ones(3)}, mc.load(path))
    mc.save(path, {"w": np.ones(3), "license": "MIT"})                  # but of ours they are
    assert_equal({"w": np.ones(3), "license": "MIT"}, mc.load(path))


def test_an_unreadable_file_is_not_called_damaged(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"state{suffix}"
    mc.save(path, {"a": 1})

    def forbidden(file, *args, **kwargs):           # as chmod(0) makes it, but for the root user too
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr(builtins, "open", forbidden)
    with pytest.raises(PermissionError, match=f"Permission denied.*state{suffix}"):
        mc.load(path)


def test_without_safetensors_the_message_says_what_to_install(tmp_path, monkeypatch):
    for name in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    for use in (lambda path: mc.save(path, {"a": 1}), lambda path: (path.touch(), mc.load(path))):
        with pytest.raises(ImportError, match=r'pip install safetensors.*\.npz'):
            use(tmp_path / "state.safetensors")
    mc.save(tmp_path / "state.npz", {"a": 1})


# ---------------------------------------------------------------- whole, or the old one
class Failure(BaseException):
    """Not an Exception: Ctrl-C, or the interpreter ending."""


def fails(*args, **kwargs):
    raise Failure


def half_a_file(path, flat):
    with open(path, "wb") as file:
        file.write(b"half")
    raise Failure


BREAKS = [lambda m, suffix: m.setattr(weights, f"_write_{FORMATS[suffix]}", half_a_file),
          lambda m, suffix: m.setattr(os, "fsync", fails), lambda m, suffix: m.setattr(os, "replace", fails)]


@pytest.mark.parametrize("break_it", BREAKS, ids=["while writing", "before it is on the disk", "before it is in place"])
def test_a_crash_leaves_the_old_file_and_nothing_else(tmp_path, suffix, monkeypatch, break_it):
    path, other = tmp_path / f"state{suffix}", tmp_path / f"new{suffix}"
    mc.save(path, {"a": np.arange(3)})
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        break_it(patch, suffix)
        for target in (path, other):
            with pytest.raises(Failure):
                mc.save(target, {"a": np.arange(1000)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    mc.save(path, {"a": np.arange(5)})
    assert_equal({"a": np.arange(5)}, mc.load(path))


def test_a_full_disk_leaves_the_old_file(tmp_path, suffix):
    """A real one: a file may not grow beyond the limit that a process sets itself."""
    resource = pytest.importorskip("resource", reason="no limits on file sizes here")
    path = tmp_path / f"state{suffix}"
    mc.save(path, {"a": np.arange(3)})
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=f"File too large.*/state{suffix}'$"):
            mc.save(path, {"a": np.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert_equal({"a": np.arange(3)}, mc.load(path))
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import sys
import numpy as np
import minicnn as mc
for i in range(10 ** 6):
    mc.save(sys.argv[1], {"a": np.full(300_000, i), "b": {"c": np.full(1000, i)}})
    if i == 1:
        print("began", flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "state.npz"
    for wait in (0.0, 0.021, 0.043):
        process = subprocess.Popen([sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"began\n"
        time.sleep(wait)
        process.kill()
        process.communicate()
        state = mc.load(path)
        assert (state["a"] == state["a"][0]).all()
        assert (state["b"]["c"] == state["a"][0]).all()


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_files_permission_follows_the_umask(tmp_path, suffix, umask, mode):
    path, before = tmp_path / f"state{suffix}", os.umask(umask)
    try:
        for _ in range(2):                          # also when it takes an old file's place
            mc.save(path, {"a": 1})
            assert stat.S_IMODE(path.stat().st_mode) == mode
        assert os.umask(umask) == umask, "and leaves the umask as it was"
    finally:
        os.umask(before)


def test_the_arrays_of_an_npz_are_stored_plainly(tmp_path):
    """Other programs can map them, and trained weights do not compress."""
    mc.save(tmp_path / "state.npz", {"a": np.zeros(1000)})
    with zipfile.ZipFile(tmp_path / "state.npz") as archive:
        assert [entry.compress_type for entry in archive.infolist()] == [zipfile.ZIP_STORED]
