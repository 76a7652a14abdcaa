"""PyTorch's checkpoints: read as PyTorch reads them, written so that it reads them, and nothing in them ever run."""
import io
import os
import pickle
import random
import struct
import sys
import time
import zipfile
from collections import OrderedDict
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

import minicnn as mc
from minicnn import weights
from minicnn.weights import PYTORCH, WeightsError, archives, pytorch
from minicnn.weights.pickled import PickleError, read

PUBLISHED = Path(os.environ.get("MINICNN_DATA", "")) / "resnet20-12fca82f.th"


# ---------------------------------------------------------------- files made here, without PyTorch
def checkpoint(pickled, storages=(), root="archive", compression=zipfile.ZIP_STORED, **more):
    """A zip checkpoint of a pickle and the bytes of its storages."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", pickled)
        for key, numbers in enumerate(storages):
            archive.writestr(f"{root}/data/{key}", numbers)
        for name, content in more.items():
            archive.writestr(f"{root}/{name}", content)
    return file.getvalue()


def legacy(state, little=True):
    """The same state in the format from before 1.6."""
    writer = pytorch.Writer()
    value = writer.pickle(state)
    keys = b"\x80\x02](" + b"".join(writer.value(str(i)) for i in range(len(writer.storages))) + b"e."
    order = "<" if little else ">"
    numbers = b"".join(struct.pack(order + "q", a.size) + a.astype(a.dtype.newbyteorder(order)).tobytes() for a in writer.storages)
    head = [pickle.dumps(part, 2) for part in (pytorch.MAGIC, pytorch.VERSION, {"protocol_version": 1001, "little_endian": little})]
    return b"".join(head) + value + keys + numbers


def rebuilt(storage=b"FloatStorage", numel=6, offset=0, size=(2, 3), stride=(3, 1), function=b"_rebuild_tensor_v2"):
    """A pickle of {"w": one tensor}, whatever it says of itself."""
    w = pytorch.Writer()
    place = w.tuple([w.value("storage"), b"ctorch\n" + storage + b"\n", w.value("0"), w.value("cpu"), w.integer(numel)]) + b"Q"
    numbers = [w.tuple([w.integer(n) for n in ns]) for ns in (size, stride)]
    tensor = b"ctorch._utils\n" + function + b"\n" + w.tuple([place, w.integer(offset), *numbers, b"\x89", b"N"]) + b"R"
    return b"\x80\x02}" + w.value("w") + tensor + b"s."


def loaded(content, tmp_path, name="file.pth"):
    path = tmp_path / name
    path.write_bytes(content)
    return mc.load(path)


def refused(content, tmp_path, words):      # damaged, or not what is taken
    with pytest.raises(WeightsError) as error:
        loaded(content, tmp_path)
    message = str(error.value)
    assert words in message and "\n" not in message and "file.pth" in message, message
    return message


STATE = {"state_dict": {"conv1.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2), "n": np.array(7),
                        "no": np.zeros((0, 3)), "t": np.arange(6.0).reshape(2, 3).T,
                        **{kind: np.arange(5).astype(kind) for kind in ("f2", "f8", "i1", "i2", "i4", "i8", "u1", "b1")}},
         "epoch": 3, "best": 91.5, "ok": True, "name": "Zoë", "big": 1 << 40, "optimizer": {"0": {"lr": 0.1}}}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            same(found[name], value)
        else:
            assert found[name].dtype == np.asarray(value).dtype, name
            np.testing.assert_array_equal(found[name], value, strict=True, err_msg=name)


@pytest.mark.parametrize("suffix", PYTORCH)
def test_what_goes_in_comes_out(tmp_path, suffix):
    mc.save(tmp_path / f"s{suffix}", STATE)
    same(mc.load(tmp_path / f"s{suffix}"), STATE)


@pytest.mark.parametrize("little", [True, False])
def test_the_old_format(tmp_path, little):
    same(loaded(legacy(STATE, little), tmp_path), STATE)


def test_large_files_are_mapped_and_written_to_in_memory_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "LARGE", 100)
    for i, content in enumerate((legacy(STATE), None)):
        path = tmp_path / f"{i}.pth"
        mc.save(path, STATE) if content is None else path.write_bytes(content)
        before = path.read_bytes()
        state = mc.load(path)
        same(state, STATE)
        weight = state["state_dict"]["conv1.weight"]
        weight += 1
        assert path.read_bytes() == before
        same(mc.load(path), STATE)
        mc.save(path, {"other": np.zeros(3)})                          # while arrays of the old one are in use
        np.testing.assert_array_equal(weight, STATE["state_dict"]["conv1.weight"] + 1)


def test_arrays_of_the_old_format_begin_at_even_places(tmp_path):
    for shift in range(3):                                              # the length of the name moves all that follows
        state = loaded(legacy({"w" * (shift + 1): np.arange(5.0), "b": np.ones(2, np.float32)}), tmp_path)
        assert all(array.flags.aligned for array in state.values())


def test_big_endian_files(tmp_path):
    state = loaded(checkpoint(rebuilt(), [np.arange(6, dtype=">f4").tobytes()], byteorder="big"), tmp_path)
    np.testing.assert_array_equal(state["w"], np.arange(6, dtype=np.float32).reshape(2, 3), strict=True)


def test_views_of_one_storage(tmp_path):
    """Transposed, with gaps, repeated without memory of their own."""
    numbers = np.arange(12, dtype=np.float32)
    for offset, size, stride, expected in [
            (0, (3, 4), (1, 3), numbers.reshape(4, 3).T), (1, (2, 3), (6, 2), [[1, 3, 5], [7, 9, 11]]),
            (5, (2, 3), (0, 0), np.full((2, 3), 5)), (11, (), (), 11), (12, (0, 9), (99, 1), np.zeros((0, 9)))]:
        state = loaded(checkpoint(rebuilt(numel=12, offset=offset, size=size, stride=stride), [numbers.tobytes()]), tmp_path)
        np.testing.assert_array_equal(state["w"], np.asarray(expected, np.float32), strict=True)


def test_bfloat16(tmp_path):
    """The upper halves of float32: nothing is lost."""
    numbers = np.array([1.5, -2, 0, np.inf, 1e-40, 3], np.float32)
    halves = (numbers.view(np.uint32) >> 16).astype("<u2")
    state = loaded(checkpoint(rebuilt(b"BFloat16Storage"), [halves.tobytes()]), tmp_path)
    np.testing.assert_array_equal(state["w"].reshape(-1).view(np.uint32) >> 16, halves)
    assert state["w"].dtype == np.float32


def test_what_torch_does_not_have_is_not_written(tmp_path):
    for value in (np.zeros(3, np.uint32).astype("m8[s]"), np.array(["a", "b"]), object(), [object()], ({"b": {1, 2}},)):
        with pytest.raises(TypeError):
            mc.save(tmp_path / "x.pth", {"a": value})
    assert not [*tmp_path.iterdir()]


# ---------------------------------------------------------------- files that mean harm, or are damaged
class Harm:
    """Pickled, this is a call of whatever it is made with."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], tuple(self.call[1:])


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("call", [(os.system, "touch {}"), (exec, "open({!r}, 'w')"), (eval, "open({!r}, 'w')"), (open, "{}", "w")])
def test_nothing_is_run(tmp_path, protocol, call):
    canary = tmp_path / "canary"
    harm = Harm(call[0], *(part.format(str(canary)) for part in call[1:]))
    for state in ({"w": harm}, OrderedDict(w=harm), [harm], {"w": {"deep": (harm,)}}):
        pickled = pickle.dumps(state, protocol)
        head = b"".join(pickle.dumps(part, 2) for part in (pytorch.MAGIC, pytorch.VERSION, {}))
        for content in (checkpoint(pickled), head + pickled, pickled):
            with pytest.raises(WeightsError):
                loaded(content, tmp_path)
    assert not canary.exists()


def test_what_is_asked_for_is_named(tmp_path):
    message = refused(checkpoint(pickle.dumps({"w": Harm(os.system, "true")}, 2)), tmp_path, "posix.system")
    assert "nothing was run" in message and "is refused: it asks for" in message and "damaged" not in message


@pytest.mark.parametrize("content", [checkpoint(b"\x80\x02}.", **{"constants.pkl": "x"}), checkpoint(b"\x80\x02].")],
                         ids=["a program", "a list"])
def test_what_is_sound_and_not_taken_is_not_called_damaged(tmp_path, content):
    assert "damaged" not in refused(content, tmp_path, "is refused: it ")


def nested(depth, wrap):
    value = b"N"
    return b"\x80\x02}X\x01\x00\x00\x00w" + value + wrap * depth + b"s."


HOSTILE = {
    "a program of TorchScript": (lambda: checkpoint(b"\x80\x02}.", **{"constants.pkl": "x"}), "TorchScript"),
    "two pickles": (lambda: checkpoint(b"\x80\x02}.", **{"more/data.pkl": "x"}), "2 entries data.pkl"),
    "compressed": (lambda: checkpoint(b"\x80\x02}." + b"\0" * 1000, compression=zipfile.ZIP_DEFLATED), "compressed"),
    "a storage that is not there": (lambda: checkpoint(rebuilt()), "no entry archive/data/0"),
    "a storage cut short": (lambda: checkpoint(rebuilt(), [b"\0" * 23]), "should have 24 bytes and has 23"),
    "a storage that claims to be huge": (lambda: checkpoint(rebuilt(numel=1 << 50), [b"\0" * 24]), "cut short"),
    "a tensor over the end": (lambda: checkpoint(rebuilt(offset=1), [b"\0" * 24]), "reaches over the end"),
    "a tensor before the beginning": (lambda: checkpoint(rebuilt(offset=-1), [b"\0" * 24]), "offset, size and stride"),
    "a stride backwards": (lambda: checkpoint(rebuilt(stride=(-3, 1)), [b"\0" * 24]), "offset, size and stride"),
    "a size of too many axes": (lambda: checkpoint(rebuilt(size=(1,) * 33, stride=(1,) * 33), [b"\0" * 24]), "size and stride"),
    "quantised": (lambda: checkpoint(rebuilt(b"QInt8Storage"), [b"\0" * 24]), "torch.QInt8Storage"),
    "another way to make one": (lambda: checkpoint(rebuilt(function=b"_rebuild_sparse_tensor"), [b""]), "_rebuild_sparse_tensor"),
    "no dict": (lambda: checkpoint(b"\x80\x02]."), "list"),
    "a class": (lambda: checkpoint(b"\x80\x02}X\x01\x00\x00\x00wctorch\nFloatStorage\ns."), "Global"),
    "deep tuples": (lambda: checkpoint(nested(100_000, b"\x85")), "deep"),
    "a deep tuple as a key": (lambda: checkpoint(b"\x80\x02}N" + b"\x85" * 100_000 + b"Ns."), "neither a string nor an integer"),
    "a list in itself": (lambda: checkpoint(b"\x80\x02}X\x01\x00\x00\x00w]q\x00h\x00as."), "deep"),
    "a memo of a billion places": (lambda: checkpoint(b"\x80\x02}r\xff\xff\xff\xff."), None),
    "a string of 4 GiB": (lambda: checkpoint(b"\x80\x02}X\xff\xff\xff\xffw."), "limit"),
    "a string of more": (lambda: checkpoint(b"\x80\x04}\x8d" + b"\xff" * 8 + b"w."), "byte count"),
    "no end": (lambda: checkpoint(b"\x80\x02}"), "damaged pickle"),
    "nothing": (lambda: checkpoint(b""), "damaged pickle"),
    "an instruction of no use": (lambda: checkpoint(b"\x80\x02}\x82\x01."), "EXT1"),
    "what is called is a string": (lambda: checkpoint(b"\x80\x02U\x01a)R."), "no function"),
    "what is called is a class of tensors": (lambda: checkpoint(b"\x80\x02ctorch\nFloatStorage\n)R."), "no function"),
    "attributes of a number": (lambda: checkpoint(b"\x80\x02K\x01}b."), "attributes of a int"),
    "a number of any length": (lambda: checkpoint(b"\x80\x02}X\x01\x00\x00\x00w\x8a\xff" + b"\x7f" * 255 + b"s."), "int"),
    "no zip and no pickle": (lambda: b"hello", "damaged"),
    "an empty file": (lambda: b"", "damaged"),
    "another pickle": (lambda: pickle.dumps({"a": 1}), "neither of PyTorch's formats"),
}


@pytest.mark.parametrize("case", HOSTILE, ids=str)
def test_a_hostile_file(tmp_path, case):
    make, words = HOSTILE[case]
    if words is None:                                                   # odd, but no harm
        assert loaded(make(), tmp_path) == {}
    else:
        refused(make(), tmp_path, words)


def test_a_changed_number_is_noticed(tmp_path):
    content = checkpoint(rebuilt(), [np.arange(6, dtype=np.float32).tobytes()])
    place = content.index(np.arange(6, dtype=np.float32).tobytes())
    refused(content[:place] + b"\1" + content[place + 1:], tmp_path, "its checksum is another")


def test_laughs_take_no_memory(tmp_path):
    """A list of ten lists of ten lists ... of ten numbers: small, as it is shared; not to be spelled out."""
    laughs = b"\x80\x02}(" + b"".join(
        b"X\x01\x00\x00\x00" + b"%d" % i + b"](" + (b"h" + bytes([i - 1]) if i else b"K\x07") * 10 + b"eq" + bytes([i])
        for i in range(10)) + b"u."
    with at_most(200):
        state = loaded(checkpoint(laughs), tmp_path)
    for _ in range(9):
        state = state["9"] if isinstance(state, dict) else state[-1]
    assert state[0][0] == 7


def test_one_long_text_in_many_places_takes_no_memory(tmp_path):
    """A megabyte in the file, and a reference to it of two bytes in each of 3,000 places."""
    with at_most(200):
        texts = loaded(checkpoint(again(b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20), b"h\x00")), tmp_path)["w"]
    assert len(texts) == 3001 and texts[0] == texts[-1] == "a" * (1 << 20)


def again(value, call, count=3000):
    """{"w": [...]}: a value that is memorised, and so many calls with it."""
    return b"\x80\x02}X\x01\x00\x00\x00w](" + value + b"q\x00" + call * count + b"es."


@pytest.mark.parametrize("case", ["text", "pairs", "array", "size"])
def test_one_large_thing_that_is_copied_again_and_again(tmp_path, case):
    """A megabyte in the file, gigabytes if every call were let have its copy."""
    w = pytorch.Writer()
    text = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20)
    content = {
        "text": again(text, b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R"),
        "pairs": again(b"](" + b"".join(w.tuple([w.value(f"{i:06}"), b"N"]) for i in range(50_000)) + b"e",
                       b"ccollections\nOrderedDict\nh\x00\x85R"),
        "size": again(b"](" + b"K\x01" * 500_000 + b"e", b"ctorch\nSize\nh\x00\x85R"),
        "array": again(text, b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tX\x01\x00\x00\x00btR(K\x01(J"
                       + struct.pack("<i", 1 << 20) + b"tcnumpy\ndtype\n(X\x02\x00\x00\x00u1K\x00K\x01tR\x89h\x00tb")}[case]
    with at_most(300):
        refused(checkpoint(content), tmp_path, "much more of its numbers than it has")


@contextmanager
def at_most(megabytes):
    """Inside the block the process grows by no more, not even for a moment. Where the system forgets no older peak, beyond that."""
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _peak()
    yield
    assert _peak() - before < megabytes << 20


def _peak():
    with suppress(OSError), open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))
    resource = pytest.importorskip("resource")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def mutated(content, rng):
    """Some bytes changed, taken out, put in, or repeated; or the end cut off."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        i, n = rng.randrange(len(content)), rng.choice([1, 1, 1, 2, 4, 16])
        way = rng.randrange(6)
        if way == 0:
            content[i] ^= 1 << rng.randrange(8)
        elif way == 1:
            content[i:i + n] = rng.randbytes(n)
        elif way == 2:
            content[i:i + n] = rng.choice([b"", b"\xff" * n, b"\0" * n, b"\x7f" * n])
        elif way == 3:
            content[i:i] = content[rng.randrange(len(content)):][:n]
        elif way == 4:
            content[i:i] = bytes([rng.choice(b"(0123]}).tbuseaRQc\x85\x86\x87\x88\x89\x8aNKMJXUhjqr")])
        elif len(content) > 1:
            del content[rng.randrange(1, len(content)):]
        if not content:
            return b""
    return bytes(content)


def broken_checkpoints(tmp_path):
    """Half of the mutations are in a sound archive's pickle, the others anywhere in either format."""
    mc.save(tmp_path / "whole.pth", STATE)
    whole, old = (tmp_path / "whole.pth").read_bytes(), legacy(STATE)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    storages = [entries[f"archive/data/{i}"] for i in range(len(entries) - 3)]
    return lambda i, rng: (mutated(whole, rng) if i % 4 == 0 else mutated(old, rng) if i % 4 == 1
                           else checkpoint(mutated(entries["archive/data.pkl"], rng), storages))


def broken_npz(tmp_path):
    """As we write them, and compressed by NumPy."""
    flat = {**STATE["state_dict"], "name": "Zoë", "zeros": np.zeros(1000)}
    mc.save(tmp_path / "whole.npz", STATE)
    np.savez_compressed(tmp_path / "packed.npz", **flat)
    wholes = [(tmp_path / name).read_bytes() for name in ("whole.npz", "packed.npz")]
    return lambda i, rng: mutated(wholes[i % 2], rng)


def broken_safetensors(tmp_path):
    """Half of the mutations are in the table."""
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    mc.save(tmp_path / "whole.safetensors", STATE)
    whole = (tmp_path / "whole.safetensors").read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")

    def broken(i, rng):
        if i % 2:
            return mutated(whole, rng)
        table = mutated(whole[8:end], rng)
        return struct.pack("<Q", len(table)) + table + whole[end:]
    return broken


BROKEN = {".pth": broken_checkpoints, ".npz": broken_npz, ".safetensors": broken_safetensors}


def fuzz(suffix, count, seed, tmp_path, monkeypatch):
    """Load so many mutated files, by turns mapped and not: each gives a state or WeightsError, and takes no memory to speak of."""
    make, rng, path = BROKEN[suffix](tmp_path), random.Random(seed), tmp_path / f"mutated{suffix}"
    outcomes = {"read": 0, "refused": 0}
    for first in range(0, count, 1000):
        with at_most(100):
            for i in range(first, min(first + 1000, count)):
                path.unlink(missing_ok=True)                # a mapped file that is written over ends the process
                path.write_bytes(make(i, rng))
                monkeypatch.setattr(archives, "LARGE", 1 if i // 4 % 2 else 64 << 20)
                try:
                    assert isinstance(mc.load(path), dict)
                    outcomes["read"] += 1
                except WeightsError as error:
                    assert "\n" not in str(error) and len(str(error)) < 1000, f"seed {seed}, file {i}"
                    outcomes["refused"] += 1
                except BaseException as error:
                    raise AssertionError(f"seed {seed}, file {i}: {type(error).__name__}: {error}") from error
    return outcomes


@pytest.mark.parametrize("suffix", BROKEN)
def test_mutated_files(tmp_path, monkeypatch, suffix):
    outcomes = fuzz(suffix, 2_000, 0, tmp_path, monkeypatch)
    assert min(outcomes.values()) > 50, outcomes            # some mutations are in numbers, and do no harm


@pytest.mark.slow
@pytest.mark.parametrize("suffix, seed", [*((".pth", seed) for seed in range(1, 11)),
                                          *((suffix, seed) for suffix in (".npz", ".safetensors") for seed in range(1, 6))])
def test_two_hundred_thousand_mutated_files(tmp_path, monkeypatch, suffix, seed):
    fuzz(suffix, 10_000, seed, tmp_path, monkeypatch)


def test_the_machine_gives_plain_values_back():
    """What a pickle of plain data says, in every protocol."""
    value = {"a": [1, -2, 1 << 70, 2.5, True, None, "ä", b"\xff"], "b": {1: (1,), 2: (1, 2), 3: (1, 2, 3), 4: (1, 2, 3, 4), 5: ()}}
    for protocol in range(6):
        names = {"_codecs encode": pytorch.NAMES["_codecs encode"], "__builtin__ bytes": lambda: b""}
        assert read(io.BytesIO(pickle.dumps(value, protocol)), names) == value
    with pytest.raises(PickleError):
        read(io.BytesIO(pickle.dumps({1, 2}, 4)), {})


# ---------------------------------------------------------------- beside PyTorch
torch_only = pytest.mark.skipif("not __import__('importlib.util').util.find_spec('torch')", reason="PyTorch is not installed")


def of_every_kind(torch):
    """Tensors of every dtype that NumPy or we know, and every way to lie in a storage."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, generator=generator)
    tensors = OrderedDict(base=base, turned=base.T, cut=base[1:3, ::2], row=base[2], repeated=base[:1].expand(5, 6),
                          number=torch.tensor(2.5), empty=torch.zeros(0, 3), parameter=torch.nn.Parameter(torch.ones(3)))
    for name in pytorch.DTYPES:
        tensors[name] = (torch.arange(6) % 2 if name == "bool" else torch.arange(6)).to(getattr(torch, name)).reshape(2, 3)
    return tensors


def as_numpy(tensor):
    import torch
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


@torch_only
@pytest.mark.parametrize("new", [True, False])
def test_tensors_of_every_kind(tmp_path, new):
    import torch
    tensors = of_every_kind(torch)
    if not new:
        tensors = OrderedDict((n, t) for n, t in tensors.items() if n not in ("uint16", "uint32", "uint64"))
    torch.save({"state_dict": tensors, "epoch": 3, "note": "x", "sizes": base_size(tensors), "device": torch.device("cpu"),
                "dtype": torch.float32, "best": np.float64(0.5), "array": np.arange(6, dtype=np.int16).reshape(2, 3)},
               tmp_path / "t.pt", _use_new_zipfile_serialization=new)
    state = mc.load(tmp_path / "t.pt")
    assert [*state["state_dict"]] == [*tensors]
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(state["state_dict"][name], as_numpy(tensor), strict=True, err_msg=name)
    found = state["state_dict"]
    assert np.shares_memory(found["base"], found["turned"]), "views of one storage stay so"
    assert (state["epoch"], state["note"], state["device"], state["dtype"], state["best"]) == (3, "x", "cpu", "float32", 0.5)
    assert state["sizes"] == (4, 6)
    np.testing.assert_array_equal(state["array"], np.arange(6, dtype=np.int16).reshape(2, 3), strict=True)


@torch_only
@pytest.mark.parametrize("new", [True, False])
def test_views_that_change_the_numbers_of_their_storage_are_refused(tmp_path, new):
    """PyTorch conjugates and negates without touching the numbers, and so they are saved; as they lie, they are others."""
    import torch
    turned = torch.tensor([1 + 2j, 3 - 4j]).conj()
    for tensor in (turned, turned.imag):
        torch.save({"w": tensor}, tmp_path / "t.pt", _use_new_zipfile_serialization=new)
        with pytest.raises(WeightsError, match="a conjugated or negated view"):
            mc.load(tmp_path / "t.pt")
        torch.save({"w": tensor.resolve_conj().resolve_neg()}, tmp_path / "t.pt", _use_new_zipfile_serialization=new)
        np.testing.assert_array_equal(mc.load(tmp_path / "t.pt")["w"], tensor.resolve_conj().resolve_neg().numpy())


@torch_only
def test_what_is_loaded_is_saved_again(tmp_path):
    """A training state has lists, tuples and None in it, and what is read of it is written with them."""
    import torch
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 60])
    whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "args": None,
             "lists": [[], (), [(1, None), {"x": torch.ones(2)}]]}
    torch.save(whole, tmp_path / "a.pth")
    state = mc.load(tmp_path / "a.pth")
    mc.save(tmp_path / "b.pth", state)
    assert repr(mc.load(tmp_path / "b.pth")) == repr(state)
    found = torch.load(tmp_path / "b.pth", weights_only=True)
    assert found["args"] is None and found["lists"][:2] == [[], ()] and found["lists"][2][0][1] is None
    (group,), betas = found["optimizer"]["param_groups"], whole["optimizer"]["param_groups"][0]["betas"]
    assert type(group["betas"]) is tuple and tuple(map(float, group["betas"])) == betas and [*map(int, group["params"])] == [0, 1]
    for name, tensor in whole["model"].items():
        assert torch.equal(found["model"][name], tensor)
    with pytest.raises(TypeError, match=r"^args: NoneType cannot be saved"):
        mc.save(tmp_path / "b.npz", {"args": state["args"]})


@torch_only
def test_pytorch_reads_newer_unsigned_integers(tmp_path):
    import torch
    state = {name: np.arange(6).astype(name).reshape(2, 3) + np.iinfo(name).max // 2 for name in ("uint16", "uint32", "uint64")}
    mc.save(tmp_path / "u.pth", {**state, "swapped": state["uint32"].astype(">u4"), "empty": np.zeros((0, 2), np.uint16)})
    same({name: mc.load(tmp_path / "u.pth")[name] for name in state}, state)
    found = torch.load(tmp_path / "u.pth", weights_only=True)
    for name, array in state.items():
        np.testing.assert_array_equal(found[name].numpy(), array, strict=True)
    np.testing.assert_array_equal(found["swapped"].numpy(), state["uint32"], strict=True)
    assert found["empty"].shape == (0, 2)


def base_size(tensors):
    return tensors["base"].size()


@torch_only
@pytest.mark.parametrize("new", [True, False])
def test_a_training_state(tmp_path, new):
    """A module's state_dict, with what it keeps beside the tensors, and an optimiser's, whose names are integers."""
    import torch
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 3, 3)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 60, 60])
    torch.save({"model": torch.nn.DataParallel(model).state_dict(), "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(), "args": None},
               tmp_path / "t.pth", _use_new_zipfile_serialization=new)
    state = mc.load(tmp_path / "t.pth")
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(state["model"][f"module.{name}"], tensor.numpy(), strict=True)
    moments = optimizer.state_dict()["state"][2]["exp_avg"].numpy()
    np.testing.assert_array_equal(state["optimizer"]["state"]["2"]["exp_avg"], moments)
    assert state["schedule"]["milestones"] == {"30": 1, "60": 2}
    assert state["args"] is None and state["optimizer"]["param_groups"][0]["lr"] == 1e-3


@torch_only
def test_pytorch_reads_what_is_written(tmp_path):
    import torch
    mc.save(tmp_path / "s.pth", STATE)
    for mapped in (False, True):
        state = torch.load(tmp_path / "s.pth", weights_only=True, mmap=mapped)
        assert [*state] == [*STATE] and (state["epoch"], state["best"], state["ok"], state["name"]) == (3, 91.5, True, "Zoë")
        for name, array in STATE["state_dict"].items():
            np.testing.assert_array_equal(state["state_dict"][name].numpy(), array, strict=True)
    transposed = np.arange(6, dtype=np.float32).reshape(2, 3).T
    mc.save(tmp_path / "t.pth", {"t": transposed, "part": np.arange(10)[::3], "turned": np.arange(4, dtype=">i4")})
    state = torch.load(tmp_path / "t.pth", weights_only=True)
    np.testing.assert_array_equal(state["t"].numpy(), transposed)
    assert state["part"].tolist() == [0, 3, 6, 9] and state["turned"].tolist() == [0, 1, 2, 3]


@torch_only
@pytest.mark.parametrize("new", [True, False])
def test_mutated_files_of_pytorch(tmp_path, new):
    import torch
    torch.save({"state_dict": of_every_kind(torch) if new else {"w": torch.randn(3)}, "best": np.float64(1)}, tmp_path / "t.pt",
               _use_new_zipfile_serialization=new)
    whole, rng = (tmp_path / "t.pt").read_bytes(), random.Random(0)
    for _ in range(500):
        try:
            loaded(mutated(whole, rng), tmp_path)
        except WeightsError:
            pass


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="MINICNN_DATA names no folder with resnet20-12fca82f.th")
def test_a_published_checkpoint(tmp_path):
    state = mc.load(PUBLISHED)
    assert state["best_prec1"].round(2) == 91.78 and state["state_dict"]["module.conv1.weight"].shape == (16, 3, 3, 3)
    model = mc.models.resnet20()
    assert str(model.load_state_dict(state)) == "everything fits"
    for suffix in (".pth", ".npz"):
        mc.save(tmp_path / f"r{suffix}", model.state_dict())
        again = mc.models.resnet20(seed=1)
        again.load_state_dict(mc.load(tmp_path / f"r{suffix}"))
        for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
            np.testing.assert_array_equal(a, b, strict=True, err_msg=name)


@torch_only
def test_safetensors_files_of_pytorch(tmp_path):
    """With bfloat16, of which NumPy knows nothing; of the types of a byte, one line."""
    import torch
    library = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    tensors = {name: (torch.arange(6) % 2).to(getattr(torch, name)).reshape(2, 3)
               for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")}
    tensors["more"] = torch.tensor([1.5, -2.0, float("inf"), 1e-40]).bfloat16()
    library.save_file(tensors, tmp_path / "t.safetensors")
    state = mc.load(tmp_path / "t.safetensors")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(state[name], as_numpy(tensor), strict=True, err_msg=name)
    library.save_file({"w": torch.zeros(3).to(torch.float8_e4m3fn)}, tmp_path / "8.safetensors")
    with pytest.raises(WeightsError, match="numbers of a type that NumPy has not"):
        mc.load(tmp_path / "8.safetensors")


@torch_only
def test_many_tensors_of_bfloat16_are_read_in_one_go(tmp_path):
    """The table of the file is parsed once, not for each of them; their order stays."""
    import torch
    library = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    tensors = {f"layers.{i:04}.weight": torch.full((2,), i % 100, dtype=torch.bfloat16 if i % 3 else torch.float16)
               for i in range(3000)}
    library.save_file(tensors, tmp_path / "t.safetensors")
    begin = time.perf_counter()
    state = mc.load(tmp_path / "t.safetensors")
    assert time.perf_counter() - begin < 5
    assert state.keys() == tensors.keys() and all((state[name] == as_numpy(tensor)).all() for name, tensor in tensors.items())


def test_a_text_of_a_safetensors_file_hides_no_array(tmp_path):
    library = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    library.save_file({"w": np.ones(3)}, tmp_path / "t.safetensors", {"w": "words", weights.MARK: "strings"})
    with pytest.raises(WeightsError, match="'w' is an array and a text"):
        mc.load(tmp_path / "t.safetensors")
