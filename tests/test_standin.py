"""The stand-in for CuPy: each of its manners, and its tables against the real CuPy where that is installed."""
import inspect
import operator
import re
import threading

import numpy as np
import pytest
import standin as xp

HOST = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


@pytest.fixture
def a():
    return xp.asarray(HOST)


def same(array, expected):
    assert type(array) is xp.ndarray
    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(array.get(), expected)


# ---------------------------------------------------------------- no way to NumPy but get()

@pytest.mark.parametrize("convert", [
    np.asarray, np.array, lambda a: np.zeros(24, np.float32).reshape(2, 3, 4).__setitem__(..., a),
    lambda a: np.testing.assert_array_equal(a, HOST), lambda a: HOST[a],
    lambda a: np.random.default_rng(0).permutation(a)])
def test_nothing_turns_it_into_a_numpy_array_silently(a, convert):
    with pytest.raises(TypeError, match="Implicit conversion"):
        convert(a)


def test_get_copies_and_so_does_asarray(a):
    host = a.get()
    host[:] = -1
    source = HOST.copy()
    uploaded = xp.asarray(source)
    source[:] = -1
    same(a, HOST)
    same(uploaded, HOST)


@pytest.mark.parametrize("mix", [
    lambda a, n: a + n, lambda a, n: n + a, lambda a, n: a @ n.T, lambda a, n: n.T @ a, lambda a, n: a > n,
    lambda a, n: n > a, lambda a, n: xp.add(a, n), lambda a, n: np.add(a, n), lambda a, n: np.add(n, n, out=a),
    lambda a, n: xp.add(a, a, out=n), lambda a, n: operator.iadd(a, n), lambda a, n: operator.iadd(n, a),
    lambda a, n: a.__setitem__(..., n), lambda a, n: xp.concatenate([a, n]), lambda a, n: np.concatenate([a, n]),
    lambda a, n: xp.where(a > 0, a, n), lambda a, n: xp.sum(n), lambda a, n: xp.reshape(n, (24,)),
    lambda a, n: a.sum(out=n.sum(0)), lambda a, n: xp.zeros_like(n), lambda a, n: a + np.array(1.0, np.float32),
    lambda a, n: a.fill(n), lambda a, n: xp.copyto(a, n), lambda a, n: xp.dot(a, n)])
def test_mixing_with_a_numpy_array_is_a_type_error(a, mix):
    with pytest.raises(TypeError):
        mix(a, HOST.copy())


@pytest.mark.parametrize("operand", [None, "x", [1.0], object()])
def test_ufuncs_take_arrays_and_scalars_only(a, operand):
    with pytest.raises(TypeError, match="Unsupported type"):
        a + operand


def test_scalars_are_welcome_and_keep_float32(a):
    for result in (a + 1, 1 - a, a * 2.0, a / 3, a**2, 2.0**a, -a, xp.maximum(a, 0), xp.where(a > 3, a, 0.0),
                   a * np.float32(2)):
        assert result.dtype == np.float32
    assert (a * np.float64(2)).dtype == np.float64  # a NumPy scalar promotes, here as in NumPy


def test_numpy_functions_hand_it_on(a):
    same(np.exp(a), np.exp(HOST))
    same(np.add(a, 1.0), HOST + 1)
    same(np.sum(a, axis=1), HOST.sum(1))
    same(np.add.reduce(a), HOST.sum(0))
    same(np.lib.stride_tricks.sliding_window_view(a, 2, 1), np.lib.stride_tricks.sliding_window_view(HOST, 2, 1))
    assert np.shape(a) == (2, 3, 4)
    with pytest.raises(TypeError):
        np.einsum_path("abc->a", a)
    with pytest.raises(TypeError):
        np.linalg.norm(a)
    with pytest.raises(TypeError):
        np.spacing(a)


def test_an_object_that_opts_out_of_array_arithmetic_answers_itself(a):
    class Tensor:
        __array_ufunc__ = None
        __radd__ = __rmatmul__ = __lt__ = __rpow__ = lambda self, other: ("tensor", type(other))

    for result in (a + Tensor(), a @ Tensor(), a > Tensor(), a**Tensor(), a[0, 0, 0] + Tensor()):
        assert result == ("tensor", xp.ndarray)
    with pytest.raises(TypeError):
        a += Tensor()


# ---------------------------------------------------------------- arrays, never scalars

@pytest.mark.parametrize("reduce", [
    lambda a: a.sum(), lambda a: a.mean(), lambda a: a.max(), lambda a: a.min(), lambda a: a.var(), lambda a: a.std(),
    lambda a: a.prod(), lambda a: (a > 1).all(), lambda a: (a > 1).any(), lambda a: a.argmax(), lambda a: a.argmin(),
    xp.sum, xp.argmax, lambda a: a[0, 0, 0], lambda a: xp.dot(a[0, 0], a[0, 0]), lambda a: xp.exp(1.0),
    lambda a: a[0, 0].trace if a.ndim == 0 else xp.trace(a[0]), lambda a: a[xp.asarray(1), 0, 0]])
def test_results_without_axes_are_0d_arrays(a, reduce):
    result = reduce(a)
    assert type(result) is xp.ndarray
    assert result.shape == ()


@pytest.mark.parametrize("use", [
    lambda i: [1, 2][i], range, hash, round, np.arange, lambda i: xp.zeros(i), lambda i: xp.zeros((2, i)),
    lambda i: xp.ones(3).sum(axis=i), lambda i: xp.ones(3).reshape(i, 3), lambda i: xp.linspace(0, i, 3),
    lambda i: xp.split(xp.ones(3), [i]), len, iter, list, lambda i: "ab"[:i]])
def test_a_0d_array_is_no_index_and_no_scalar(use):
    with pytest.raises(TypeError):
        use(xp.asarray(1))


def test_indexing_an_element_gives_a_view(a):
    a[0, 0, 0][...] = 9
    assert float(a[0, 0, 0]) == 9
    a[0, 0, 1] += 5
    assert float(a[0, 0, 1]) == 6


# ---------------------------------------------------------------- waiting for the device

@pytest.mark.parametrize(("use", "name"), [
    (lambda a: float(a[0, 0, 1]), "float"), (lambda a: int(a[0, 0, 1]), "int"), (lambda a: bool(a.sum() > 0), "bool"),
    (lambda a: complex(a[0, 0, 1]), "complex"), (lambda a: a.sum().item(), "item"), (lambda a: a.tolist(), "tolist"),
    (lambda a: a.get(), "get"), (xp.asnumpy, "get"), (str, "str"), (repr, "repr"),
    (lambda a: f"{a.sum():.1f}", "format"), (lambda a: 3.0 in a, "in"), (lambda a: a[a > 3], "boolean mask"),
    (lambda a: a.__setitem__(a > 3, 0.0), "boolean mask"), (lambda a: a.nonzero(), "nonzero"),
    (lambda a: xp.nonzero(a), "nonzero"), (lambda a: np.flatnonzero(a), "flatnonzero"),
    (lambda a: xp.unique(a), "unique"), (lambda a: xp.bincount(a[0, 0].astype(int)), "bincount"),
    (lambda a: a[[0, 1]], "index from the host"), (lambda a: a[np.array([0, 1])], "index from the host")])
def test_what_waits_for_the_device_is_recorded(a, use, name):
    with xp.host_syncs() as syncs:
        use(a)
    assert syncs == [name]


def test_what_does_not_wait_is_not_recorded(a):
    with xp.host_syncs() as syncs:
        b = xp.where(a > 3, a, 0.0) @ a.transpose(0, 2, 1)
        b[0] = 1.0
        b += b.sum(axis=1, keepdims=True)
        b[xp.arange(2), xp.asarray([1, 2])] = xp.take_along_axis(b, b.argmax(2)[..., None], 2)[:, 0]
        assert b.shape == (2, 3, 3)
        assert b.dtype == np.float32
        assert len(list(b)) == 2
    assert syncs == []


def test_syncs_are_recorded_by_every_watcher_and_by_nobody_afterwards(a):
    with xp.host_syncs() as outer:
        with xp.host_syncs() as inner:
            threading.Thread(target=a.get).start() or float(a[0, 0, 0])
        bool(a[0, 0, 0])
    a.get()
    assert sorted(inner) == ["float", "get"]
    assert outer == [*inner, "bool"]


# ---------------------------------------------------------------- what CuPy lacks

@pytest.mark.parametrize("name", [
    "errstate", "einsum_path", "frompyfunc", "vecdot", "unstack", "block", "float128", "nosuch"])
def test_names_that_cupy_lacks(name):
    assert not hasattr(xp, name)
    with pytest.raises(AttributeError, match=name):
        getattr(xp, name)


@pytest.mark.parametrize("call", [
    lambda a: xp.add(a, a, where=a > 0), lambda a: xp.exp(a, where=True), lambda a: np.exp(a, where=a > 0),
    lambda a: xp.add(a, a, order="K"), lambda a: xp.add(a, a, subok=True), lambda a: a.sum(where=a > 0),
    lambda a: a.sum(initial=0), lambda a: xp.sum(a, where=a > 0), lambda a: a.max(initial=0),
    lambda a: np.max(a, initial=0), lambda a: a.mean(where=a > 0), lambda a: a.var(correction=1),
    lambda a: xp.var(a, correction=1), lambda a: np.std(a, mean=a), lambda a: xp.any(a, where=a > 0),
    lambda a: xp.zeros(3, device="cpu"), lambda a: xp.zeros(3, like=a), lambda a: xp.zeros_like(a, subok=False),
    lambda a: a.astype(float, subok=True), lambda a: xp.lib.stride_tricks.as_strided(a, (2,), (4,), writeable=False),
    lambda a: xp.where(a > 0), lambda a: a.argsort(0, None, None), lambda a: xp.sum([1.0, 2.0]),
    lambda a: a.get(copy=True)])
def test_keywords_that_cupy_lacks(a, call):
    with pytest.raises(TypeError):
        call(a)


def test_only_add_and_multiply_reduce_and_only_add_has_at(a):
    same(xp.add.reduce(a, axis=(0, 2)), HOST.sum((0, 2)))
    same(xp.multiply.reduce(a, axis=1, keepdims=True), HOST.prod(1, keepdims=True))
    for call in (lambda: xp.maximum.reduce(a), lambda: np.maximum.reduce(a), lambda: xp.multiply.at(a, 0, 2.0)):
        with pytest.raises(NotImplementedError):
            call()
    counts = xp.zeros(3, dtype=np.float32)
    xp.add.at(counts, xp.asarray([0, 2, 2, 5]), 1.0)  # 5 wraps around to 2
    same(counts, np.array([1, 0, 3], np.float32))
    with pytest.raises(TypeError, match="int64"):
        xp.add.at(xp.zeros(3, dtype=np.int64), xp.asarray([0]), 1)


def test_objects_and_strings_are_no_dtypes():
    for value in ("text", [object()], [None]):
        with pytest.raises(ValueError, match="Unsupported dtype"):
            xp.asarray(value)


def test_flags_cannot_be_written_and_there_is_no_setflags(a):
    assert a.flags.c_contiguous
    assert a[0].T.flags.f_contiguous
    assert a.flags.owndata
    assert not hasattr(a.flags, "writeable")
    assert not hasattr(a, "setflags")
    assert not hasattr(a, "ctypes")


# ---------------------------------------------------------------- indexing and assignment

@pytest.mark.parametrize("key", [
    0, -1, (0, 1), (0, 1, 2), slice(1, None), (slice(None), slice(None, None, -1)), (..., 0), (0, ..., slice(1, 3)),
    None, (slice(None), None, 0), (..., None), [1, 0], ([0, 1], [2, 0]), (slice(None), [2, 0]),
    (0, slice(None), [1, 3]), ([0, 1], 0, [1, 3]), ([0, 1], slice(None), [1, 3]),
    (np.array([[0], [1]]), np.array([0, 2])), ([], 0), HOST > 7, (0, HOST[0] > 3),
    (slice(None), np.array([True, False, True])), (..., np.array([3, 0])), ()], ids=str)
def test_indexing_is_numpys(a, key):
    def on_device(part):
        return xp.asarray(part) if isinstance(part, np.ndarray) else part

    device_key = tuple(map(on_device, key)) if isinstance(key, tuple) else on_device(key)
    np.testing.assert_array_equal(a[device_key].get(), HOST[key])
    assert a[device_key].shape == HOST[key].shape
    for value in (5.0, np.float32(7), xp.asarray(np.float32(8))):
        expected = HOST.copy()
        expected[key] = float(value)
        a[device_key] = value
        same(a, expected)
    a[device_key] = xp.asarray(HOST[key])
    same(a, np.where(expected == 8, HOST, expected))


def test_index_arrays_outside_wrap_around_and_integers_outside_raise(a):
    same(a[xp.asarray([2, -3])], HOST[[0, 1]])
    same(a[:, xp.asarray([0, 4])], HOST[:, [0, 1]])
    same(a[0, ..., xp.asarray([5])], HOST[0, :, [1]])
    same(a[xp.arange(2), xp.asarray([3, 7], dtype=np.uint8)], HOST[[0, 1], [0, 1]])
    same(xp.take(a, xp.asarray([4, -1]), 1), HOST[:, [1, 2]])
    same(a.take([0, 25]), np.array([0, 1], np.float32))
    same(xp.take_along_axis(a, xp.full((2, 3, 1), 6), 2), HOST[..., 2:3])
    xp.put_along_axis(a, xp.full((2, 3, 1), 6), -1.0, 2)
    assert (a.get()[..., 2] == -1).all()
    for key in (2, -3, (0, 3)):
        with pytest.raises(IndexError):
            a[key]
    with pytest.raises(IndexError):
        a[xp.asarray([0.0])]
    with pytest.raises(TypeError):
        a[0] = [1.0, 2.0, 3.0, 4.0]


# ---------------------------------------------------------------- views, layouts, in-place, out=

@pytest.mark.parametrize("view", [
    lambda a: a[1:, ::2], lambda a: a.T, lambda a: a.reshape(4, 6), lambda a: a.reshape((6, -1)),
    lambda a: a.transpose(0, 2, 1), lambda a: a.transpose((1, 0, 2)), lambda a: a.swapaxes(0, 1),
    lambda a: a[:1].squeeze(0), lambda a: a.ravel(), lambda a: a.mT, lambda a: np.moveaxis(a, 0, -1),
    lambda a: np.broadcast_to(a, (5, 2, 3, 4)), lambda a: np.expand_dims(a, 1), lambda a: np.flip(a, 1),
    lambda a: np.lib.stride_tricks.sliding_window_view(a, (2, 2), (1, 2)), lambda a: np.split(a, 2)[1],
    lambda a: a.view(np.int32), lambda a: np.squeeze(a[:1])])
def test_views_share_memory_and_have_numpys_strides(a, view):
    ours, numpys = view(a), view(HOST)
    same(ours, numpys)
    assert ours.strides == numpys.strides
    assert xp.shares_memory(ours, a)
    assert ours.base is not None


def test_new_results_are_c_contiguous_whatever_their_inputs(a):
    channels_last = a.transpose(0, 2, 1)
    for result in (channels_last + 1, channels_last > 1, -channels_last, xp.where((a[0] > 1).T, a[0].T, a[0].T),
                   channels_last.sum(0), xp.max(channels_last, axis=1), xp.exp(channels_last)):
        assert result.flags.c_contiguous
        assert result.base is None
    assert (HOST.transpose(0, 2, 1) + 1).strides == HOST.transpose(0, 2, 1).strides  # NumPy keeps the layout


def test_overlapping_views_are_not_written_to(a):
    for view in (xp.lib.stride_tricks.sliding_window_view(a, 2, 2), xp.lib.stride_tricks.as_strided(a, (2, 2), (4, 4)),
                 xp.broadcast_to(a, (2, 2, 3, 4))):
        with pytest.raises(ValueError, match="read-only"):
            view[...] = 0.0
        with pytest.raises(ValueError, match="read-only"):
            view += 1.0


@pytest.mark.parametrize("name", ["iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"])
def test_operators_in_place_and_not(a, name):
    alias, operate = a, getattr(operator, name)
    expected = operate(HOST.copy(), 3)
    a = operate(a, 3)
    assert a is alias
    same(a, expected)
    same(getattr(operator, name[1:])(xp.asarray(HOST), 3), expected)
    same(getattr(operator, name[1:])(3, xp.asarray(HOST) + 1), getattr(operator, name[1:])(3, HOST + 1))


def test_bitwise_and_comparison_operators(a):
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        same(getattr(operator, name)(a, 3), getattr(operator, name)(HOST, 3))
        same(getattr(operator, name)(3, a), getattr(operator, name)(3, HOST))
    low, high = a > 3, a < 9
    for name in ("and_", "or_", "xor"):
        same(getattr(operator, name)(low, high), getattr(operator, name)(HOST > 3, HOST < 9))
    same(~low, HOST <= 3)
    same(abs(-a), HOST)


def test_out_is_written_and_returned(a):
    buffer = xp.empty_like(a)
    assert xp.multiply(a, 2.0, out=buffer) is buffer
    assert xp.add(buffer, 1.0, buffer) is buffer
    assert np.subtract(buffer, 1.0, out=buffer) is buffer
    same(buffer, HOST * 2)
    total = xp.zeros(4, dtype=np.float32)
    assert a.sum((0, 1), out=total) is total
    same(total, HOST.sum((0, 1)))
    product = xp.empty((2, 3, 3), dtype=np.float32)
    assert xp.matmul(a, a.transpose(0, 2, 1), out=product) is product
    same(product, HOST @ HOST.transpose(0, 2, 1))
    with pytest.raises(TypeError):
        xp.add(a, a, out=xp.zeros((2, 3, 4), dtype=int))  # a float does not fit an int


def test_the_same_array_comes_back_where_nothing_is_to_do(a):
    assert xp.asarray(a) is a
    assert a.astype(np.float32, copy=False) is a
    assert a.astype(np.float32) is not a
    assert xp.ascontiguousarray(a) is a
    assert xp.ascontiguousarray(xp.asarray(1.0)).shape == (1,)
    assert xp.ascontiguousarray(a.T).flags.c_contiguous


def test_no_floating_point_warnings():
    zero = xp.zeros(2, dtype=np.float32)
    same(1 / zero, np.full(2, np.inf, np.float32))
    assert np.isnan((zero / zero).get()).all()
    same(xp.log(zero), np.full(2, -np.inf, np.float32))
    xp.zeros(2, dtype=int)[:] = zero / zero


def test_the_functions_compute_what_numpy_computes(a):
    for call in (lambda m, x: m.concatenate([x, x], axis=1), lambda m, x: m.stack([x, x], axis=-1),
                 lambda m, x: m.pad(x, ((0, 0), (1, 2), (1, 1)), constant_values=-1),
                 lambda m, x: m.tensordot(x, x, ((1, 2), (1, 2))), lambda m, x: m.einsum("abc,abc->a", x, x),
                 lambda m, x: m.argsort(-x, axis=2), lambda m, x: m.repeat(x, 2, axis=1),
                 lambda m, x: m.tile(x, (1, 2, 1)), lambda m, x: m.clip(x, 3, 7), lambda m, x: m.roll(x, 1, axis=2),
                 lambda m, x: m.cumsum(x, axis=1), lambda m, x: m.isfinite(x), lambda m, x: m.full_like(x, 3),
                 lambda m, x: m.arange(3, dtype=np.int32), lambda m, x: m.eye(3), lambda m, x: m.sign(x - 5)):
        same(call(xp, a), call(np, HOST))


# ---------------------------------------------------------------- the tables against the real CuPy

@pytest.fixture(scope="module")
def cupy():
    return pytest.importorskip("cupy", reason="compares the stand-in's tables with CuPy's; it needs no GPU")


def test_ufuncs_and_plain_names_are_cupys(cupy):
    for name in xp.UFUNCS.split():
        assert isinstance(getattr(cupy, name), cupy.ufunc), name
    for name in xp.PLAIN.split():
        ours, theirs = getattr(xp, name), getattr(cupy, name)
        assert theirs is ours or theirs == ours, name
    for name in ("ndarray", "array", "asarray", "asnumpy", "ascontiguousarray", "take", "take_along_axis",
                 "put_along_axis", "where"):
        assert hasattr(cupy, name)


def accepted(parameters, position, keyword, name):
    """Whether `parameters` (of an inspect.Signature) take these, in this order."""
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_any = {p.kind for p in parameters}
    if inspect.Parameter.VAR_POSITIONAL not in takes_any:
        assert position == names[:len(position)], f"{name}: {position} against CuPy's {names}"
    if inspect.Parameter.VAR_KEYWORD not in takes_any:
        assert {*keyword} <= {p.name for p in parameters}, f"{name}: {keyword} against CuPy's {parameters}"


def test_functions_and_their_keywords_are_cupys(cupy):
    for name, (position, keyword) in xp.signatures(xp.FUNCTIONS + xp.REDUCTIONS[1:]).items():
        try:
            parameters = inspect.signature(getattr(cupy, name)).parameters.values()
        except ValueError:  # of NumPy's own compiled helpers CuPy re-exports, such as promote_types
            assert getattr(cupy, name) is getattr(np, name), name
        else:
            accepted(parameters, position, keyword, name)


def test_methods_and_their_keywords_are_cupys(cupy):
    table = {name: (position[1:], keyword) for name, (position, keyword) in xp.signatures(xp.REDUCTIONS).items()}
    table.update(xp.signatures(xp.METHODS), get=([], []), take=(["indices", "axis"], []))
    for name, (position, keyword) in table.items():
        docstring = getattr(cupy.ndarray, name).__doc__.strip() + "\n"
        declared = re.match(r"\w+\.\w+\((?:self, )?(.*?)\)( ->|\n|$)", docstring)
        if declared is None:  # view is written in Python
            parameters = list(inspect.signature(getattr(cupy.ndarray, name)).parameters.values())[1:]
        else:  # compiled: its docstring begins with a declaration, partly in C's way
            text = re.sub(r"(?:int|bint|Py_ssize_t|_ndarray_base) (?=\w)", "", declared[1])
            parameters = inspect.signature(eval(f"lambda {text.removeprefix('self')}: 0")).parameters.values()
        accepted(list(parameters), position, keyword, name)
    for name in xp.ATTRIBUTES.split():
        assert hasattr(cupy.ndarray, name), name
    assert not hasattr(cupy.ndarray, "__index__")
    assert not hasattr(cupy.ndarray, "__round__")


def test_ndarray_has_no_method_that_cupys_lacks(cupy):
    assert {name for name in dir(xp.ndarray) if not name.startswith("_")} <= set(dir(cupy.ndarray))


@pytest.fixture(scope="module")
def real(cupy):
    """A CuPy array of HOST's values: on the device, or, without one, laid over HOST's own memory, for views only."""
    if cupy.is_available():
        return cupy.asarray(HOST)
    memory = cupy.cuda.UnownedMemory(HOST.ctypes.data, HOST.nbytes, HOST, device_id=0)
    return cupy.ndarray(HOST.shape, HOST.dtype, cupy.cuda.MemoryPointer(memory, 0))


@pytest.mark.parametrize("view", [
    lambda m, a: a[0], lambda m, a: a[0, 1, 2], lambda m, a: a[..., ::2], lambda m, a: a[:, ::-1],
    lambda m, a: a[:, 0], lambda m, a: a.T, lambda m, a: a.mT, lambda m, a: a.transpose(0, 2, 1),
    lambda m, a: a.transpose((1, 0, 2)), lambda m, a: a.reshape(4, 6), lambda m, a: a.reshape((6, -1)),
    lambda m, a: a.ravel(), lambda m, a: a.swapaxes(0, 2), lambda m, a: m.moveaxis(a, 0, -1),
    lambda m, a: m.broadcast_to(a, (5, 2, 3, 4)), lambda m, a: m.flip(a, 1),
    lambda m, a: m.lib.stride_tricks.as_strided(a, (2, 2), (4, 4)), lambda m, a: np.transpose(a),
    lambda m, a: np.reshape(a, (4, 6))])
def test_views_have_cupys_strides(cupy, real, a, view):
    ours, cupys = view(xp, a), view(cupy, real)
    assert (ours.shape, ours.strides, ours.flags.c_contiguous) == (cupys.shape, cupys.strides, cupys.flags.c_contiguous)


@pytest.mark.parametrize("call", [
    lambda m, a: np.asarray(a), lambda m, a: np.array(a), lambda m, a: HOST.copy().__setitem__(..., a),
    lambda m, a: HOST[a], lambda m, a: a @ HOST.transpose(0, 2, 1), lambda m, a: HOST @ a.transpose(0, 2, 1),
    lambda m, a: m.stack([a, HOST]), lambda m, a: m.dot(a, HOST), lambda m, a: m.sum(a, out=HOST),
    lambda m, a: m.isfinite(a, where=True), lambda m, a: m.add(a, a, where=True), lambda m, a: m.add(a, a, order="K"),
    lambda m, a: m.add(a, a, subok=True), lambda m, a: a.sum(where=True), lambda m, a: a.max(initial=0),
    lambda m, a: a.var(correction=1), lambda m, a: m.any(a, where=True), lambda m, a: m.maximum.reduce(a),
    lambda m, a: np.maximum.reduce(a), lambda m, a: m.multiply.at(a, 0, 1.0), lambda m, a: [1, 2][a[0, 0, 0]],
    lambda m, a: range(a[0, 0, 0]), lambda m, a: round(a[0, 0, 0]), lambda m, a: hash(a),
    lambda m, a: len(a[0, 0, 0]), lambda m, a: m.zeros(a), lambda m, a: m.zeros(3, device="cpu"), lambda m, a: a[2],
    lambda m, a: bool(a), lambda m, a: m.lib.stride_tricks.as_strided(a, (2,), (4,), writeable=False),
    lambda m, a: np.einsum_path("abc->a", a), lambda m, a: m.errstate, lambda m, a: a.setflags(write=False),
    lambda m, a: a.flags.writeable, lambda m, a: m.array(["x"])])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_what_the_stand_in_refuses_cupy_refuses_alike(cupy, real, a, call):
    with pytest.raises(Exception) as ours:
        call(xp, a)
    with pytest.raises(type(ours.value)):
        call(cupy, real)


def test_arithmetic_with_an_object_that_opts_out_is_cupys(real):
    class Tensor:
        __array_ufunc__ = None
        __radd__ = __rmatmul__ = __lt__ = __eq__ = __hash__ = lambda self, other: "tensor"

    assert [real + Tensor(), real @ Tensor(), real > Tensor(), real == Tensor()] == ["tensor"] * 4
