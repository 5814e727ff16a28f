"""Measures: one contract for all, and an independent formula for each."""

import gc
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import undertow.measures
from undertow.errors import InputError
from undertow.frameworks.torch import kernels  # registers them
from undertow.measures import (
    MEASURES,
    ChannelSums,
    Histogram,
    Keep,
    Moments,
    counts,
    edges,
    finite,
    moments,
    norms,
    resolve,
    sums,
    zeros,
)

ALL = [make() for make in MEASURES.values()] + [Keep(by="sample")]


def same(measure, a, b):
    """Whether two finished measures are equal: to the last bit, but for sums of floating-point numbers.

    What a sum cancels is lost: its error is beside the magnitudes that went into it.
    """
    assert a.keys() == b.keys() == measure.columns.keys()
    added = {"mean": ("min", "max"), "m2": ("m2",), "sums": ("absolutes",), "absolutes": ("absolutes",)}
    for key in a:
        for place, (one, other) in enumerate(zip(a[key], b[key], strict=True)):
            if isinstance(measure, Moments | ChannelSums) and key in added:
                within = 1e-5 * np.max(np.abs([b[name][place] for name in added[key]]), axis=0)
                assert (np.abs(one - other) <= within).all()
            else:
                np.testing.assert_array_equal(one, other)


def values(seed, batch=6):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(batch, 3, 2, 5)) * 10.0 ** draw.integers(-8, 4, size=(batch, 3, 1, 1)) + 0.1
    return np.where(draw.random(x.shape) < 0.3, 0, x).astype(np.float32)


@pytest.mark.parametrize("way", ["numpy", "torch", "walked"])
@pytest.mark.parametrize("measure", ALL, ids=lambda m: f"{m.name}{getattr(m, 'by', '')}")
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), cuts=st.lists(st.integers(1, 5), max_size=4, unique=True), shuffle=st.randoms())
def test_any_split_merged_in_any_order_equals_the_whole(measure, way, seed, cuts, shuffle):
    x = values(seed)
    whole = measure.finish(reduced(measure, x, way))
    states = []
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(x)], strict=True):
        states.append(reduced(measure, x[start:end], way, start))
    states += [measure.init()]
    shuffle.shuffle(states)
    while len(states) > 1:
        a, b = states.pop(shuffle.randrange(len(states))), states.pop()
        states.append(measure.merge(a, b))
    same(measure, measure.finish(states[0]), whole)


@pytest.mark.parametrize("measure", ALL, ids=lambda m: f"{m.name}{getattr(m, 'by', '')}")
def test_update_is_merging_what_one_array_reduces_to(measure):
    x = values(1)
    state = measure.update(measure.update(measure.init(), x[:2]), x[2:], 2)
    same(measure, measure.finish(state), measure.finish(measure.reduce(x)))


@pytest.mark.parametrize("way", ["numpy", "torch", "walked"])
@pytest.mark.parametrize("measure", ALL, ids=lambda m: f"{m.name}{getattr(m, 'by', '')}")
def test_what_is_finished_at_once_is_what_a_state_becomes(measure, way):
    x = values(2)
    wanted = measure.finish(reduced(measure, x, way))
    with pytest.MonkeyPatch.context() as patched:
        if way == "torch":
            patched.setattr(kernels, "_walk", None)
        ours = x if way == "numpy" else walked(torch.from_numpy(x)) if measure.reads else torch.from_numpy(x)
        found = measure.finished(ours)
    assert list(found) == list(wanted) == list(measure.columns)
    same(measure, {key: [np.asarray(row) for row in rows] for key, rows in found.items()}, wanted)


@pytest.mark.parametrize("measure", ALL, ids=lambda m: f"{m.name}{getattr(m, 'by', '')}")
def test_a_state_is_a_flat_dict_of_arrays(measure):
    for state in (measure.init(), measure.reduce(values(0))):
        assert all(isinstance(value, np.ndarray) for value in state.values())


def reduced(measure, x, way, start=0):
    """The state of an array: by NumPy, by torch alone, or by torch with our walks in C."""
    if way == "numpy":
        return measure.reduce(x, start)
    x = torch.from_numpy(x)
    with pytest.MonkeyPatch.context() as patched:
        if way == "torch":
            patched.setattr(kernels, "_walk", None)
        state = measure.reduce(walked(x) if measure.reads else x, start)
    return {key: np.asarray(value) for key, value in state.items()}


FUNCTIONS = frozenset({"norms", "zeros", "moments", "sums", "counts"})


def walked(x):
    """What the recorder gives to measures: a walk, where it can be made."""
    found = kernels.walked(x, FUNCTIONS)
    return x if found is None else found


def kernel(function, x):
    found = function(walked(x))
    return dense(found) if function is counts else np.asarray(found)


def dense(found):
    """Counters for all codes."""
    codes, often = map(np.asarray, found)
    assert codes.dtype == np.uint16
    assert often.dtype == np.int64
    assert (np.diff(codes.astype(int)) > 0).all()
    counters = np.zeros(65536, np.int64)
    counters[codes] = often
    return counters


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
    "expanded": lambda x: x[:, :1, :1, :1].expand(4, 3, 5, 7),
    "strided": lambda x: x[:, :, ::2],
    "flat": lambda x: x.flatten(1),
    "one axis of space": lambda x: x.flatten(2),
    "empty": lambda x: x[:0],
}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


@pytest.fixture(params=["torch", "walked"])
def way(request, monkeypatch):
    assert kernels._walk is not None, "the C of undertow was not built: reinstall it where there is a compiler"
    if request.param == "torch":
        monkeypatch.setattr(kernels, "_walk", None)
    return request.param


@pytest.fixture(params=DTYPES)
def x(request, layout, way):
    drawn = torch.from_numpy(np.random.default_rng(3).normal(size=(4, 3, 6, 7)))
    drawn = torch.where(drawn.abs() < 0.4, torch.zeros(()), drawn + 0.2)
    return layout(drawn.to(DTYPES[request.param]))


def test_norms_by_hand(x):
    wanted = np.array(
        [[sum(float(v) ** 2 for v in np.ravel(channel)) ** 0.5 for channel in sample] for sample in x.double().numpy()]
    ).reshape(x.shape[:2])
    for found in (kernel(norms, x), norms(x.double().numpy())):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_zeros_by_hand(x):
    wanted = sum(value == 0 for value in x.double().flatten().tolist())
    assert int(kernel(zeros, x)) == int(zeros(x.double().numpy())) == wanted


def test_moments_by_hand(x):
    listed = x.double().flatten().tolist()
    found, plain = kernel(moments, x), moments(x.double().numpy())
    if not listed:
        assert found.tolist() == plain.tolist() == [0, 0, np.inf, -np.inf]
        return
    mean = sum(listed) / len(listed)
    wanted = [mean, sum((value - mean) ** 2 for value in listed), min(listed), max(listed)]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(plain, wanted, rtol=1e-12, atol=1e-12)


def test_channel_sums_by_hand(x):
    channels = [np.ravel(x.double().numpy()[:, place]).tolist() for place in range(x.shape[1])]
    wanted = [[sum(channel) for channel in channels], [sum(map(abs, channel)) for channel in channels]]
    for found in (kernel(sums, x), sums(x.double().numpy())):
        np.testing.assert_allclose(found, np.array(wanted), rtol=1e-5, atol=1e-5)


def test_counts_by_hand(x):
    wanted = np.zeros(65536, np.int64)
    for value in x.double().flatten().tolist():
        wanted[int.from_bytes(struct.pack(">f", value)[:2], "big")] += 1
    np.testing.assert_array_equal(kernel(counts, x), wanted)
    np.testing.assert_array_equal(dense(counts(x.double().numpy())), wanted)
    np.testing.assert_array_equal(dense(counts(x)), wanted)


@pytest.mark.parametrize("mean", [0.0, 1e3, -1e5, 1e7])
def test_moments_stay_accurate_beside_a_large_mean(mean, way):
    x = torch.randn(3, 4, 50, 60, generator=torch.Generator().manual_seed(0)) + mean
    count, wide = x.numel(), x.double()
    _, m2, _, _ = kernel(moments, x)
    assert m2 / count == pytest.approx(float(wide.var(correction=0)), rel=2e-3 if mean else 1e-6)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("measure", ALL, ids=lambda m: f"{m.name}{getattr(m, 'by', '')}")
def test_no_kernel_asks_a_device_for_values(measure, dtype):
    """On the device "meta" there are none to be had: `.item()`, a branch on a value or a copy to the host raises."""
    state = measure.reduce(torch.empty(2, 3, 40, 50, dtype=dtype, device="meta").transpose(2, 3))
    assert any(isinstance(value, torch.Tensor) and value.is_meta for value in state.values())


def test_a_nan_is_seen_in_the_moments():
    for row in (torch.tensor([[1.0, float("nan")]]), np.array([[1.0, np.nan]])):
        assert np.isnan(np.asarray(moments(row))[:2]).all()


@pytest.mark.parametrize("place", [0, 1, 17, 99])
def test_what_is_not_finite_is_seen_wherever_it_lies(place, way):
    x = torch.ones(2, 2, 5, 5)
    x.view(-1)[place] = float("inf")
    np.testing.assert_array_equal(kernel(moments, x), [np.inf, np.nan, 1, np.inf])
    x.view(-1)[place] = float("nan")
    assert np.isnan(kernel(moments, x)).all()
    assert np.isnan(kernel(norms, x)).sum() == 1
    assert np.isnan(kernel(sums, x)).sum() == 2


@pytest.mark.parametrize(
    "shape",
    [
        (3, 5),
        (70_000, 1),
        (2, 3, 3),
        (5, 3, 16),
        (3, 7, 1, 17),
        (4, 2, 50, 41),
        (1, 1, 40_000),
        (300, 30, 21),
        (67, 3, 2050),
    ],
)
def test_rows_of_any_length(shape, way):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu()
    plain = x.double().numpy()
    np.testing.assert_allclose(kernel(norms, x), norms(plain), rtol=1e-6)
    np.testing.assert_allclose(kernel(sums, x), sums(plain), rtol=1e-5)
    np.testing.assert_allclose(kernel(moments, x), moments(plain), rtol=1e-5)
    assert int(kernel(zeros, x)) == zeros(plain)


CONV, CONV1, LINEAR, ANY = torch.nn.Conv2d(1, 1, 1), torch.nn.Conv1d(1, 1, 1), torch.nn.Linear(1, 1), torch.nn.ReLU()
DRAWN = torch.randn(4, 3, 6, 7, generator=torch.Generator().manual_seed(0)).relu()
GRADIENTS = {
    "convolution": (CONV, DRAWN, True),
    "single sample": (CONV, DRAWN[1], True),
    "single sample of one axis": (CONV1, DRAWN[1, 1], True),
    "features": (LINEAR, DRAWN.reshape(4, -1), True),
    "features behind tokens": (LINEAR, DRAWN.reshape(4, 6, 21), False),
    "tokens": (ANY, DRAWN.reshape(4, 6, 21), True),
    "one axis": (ANY, DRAWN[0, 0, 0], True),
    "number": (ANY, torch.tensor(-3.0), False),
    "large": (ANY, DRAWN.reshape(4, 1, 126).expand(4, 9, 126).contiguous().repeat(40, 1, 1), True),
    "later in memory": (CONV, DRAWN[2:], True),
    "not a number": (CONV, DRAWN / DRAWN, True),
    "one sample of several": (CONV, DRAWN[::4], True),
    "every second sample": (CONV, DRAWN[::2], False),
    "part": (CONV, DRAWN[..., :4], False),
    "transposed": (CONV, DRAWN.transpose(2, 3), False),
    "repeated": (CONV, DRAWN[:, :1].expand(4, 3, 6, 7), False),
    "channels last": (CONV, DRAWN.to(memory_format=torch.channels_last), False),
    "opposite": (CONV, torch._neg_view(DRAWN), False),
    "one value, opposite": (ANY, torch.conj(torch.complex(DRAWN, DRAWN + 1)).imag[:1, :1, 0, 0], False),
    "zero without memory": (CONV, torch._efficientzerotensor((4, 3, 6, 7)), False),
    "empty": (CONV, DRAWN[:0], False),
    "sparse": (LINEAR, DRAWN[0, 0].to_sparse(), False),
    "wide": (CONV, DRAWN.double(), False),
    "narrow": (CONV, DRAWN.bfloat16(), False),
    "parameter": (CONV, torch.nn.Parameter(DRAWN), False),
    "with a graph": (CONV, DRAWN.clone().requires_grad_(), True),
}


@pytest.mark.parametrize("wanted", [FUNCTIONS, FUNCTIONS - {"sums"}, FUNCTIONS - {"counts"}, frozenset({"counts"})])
@pytest.mark.parametrize(("module", "gradient", "dense_"), GRADIENTS.values(), ids=GRADIENTS)
def test_a_hook_in_c_walks_over_what_lies_dense_and_hands_on_all_else(module, gradient, dense_, wanted):
    taken, otherwise = [], []
    how = kernels.hooking(wanted, 2, taken, lambda *given: otherwise.append(given))
    assert kernels.hook(how, "facts", module)(gradient) is None
    assert (len(taken), len(otherwise)) == ((1, 0) if dense_ else (0, 1))
    assert all((facts, at, shape) == ("facts", module, None) and x is gradient for facts, at, shape, x in otherwise)
    x = kernels.arranged(module, gradient.detach())
    for facts, found, rest in taken:
        assert (facts, rest) == ("facts", None)
        walk_ = kernels.Walked(*found)
        assert (walk_.shape[:2], math.prod(walk_.shape)) == (tuple(x.shape[:2]), x.numel())
        for function in FUNCTIONS & wanted:
            got, plain = function_of(function, walk_), function_of(function, x.numpy())
            np.testing.assert_allclose(got, plain, rtol=1e-5, atol=1e-4, equal_nan=True)
        assert kernels.held(found) > 0


def test_no_hook_walks_without_our_c_or_a_torch_that_tells_it_of_tensors(monkeypatch):
    assert kernels.hooking(frozenset(), 2, [], print) is None
    for missing in ("_walk", "_EXCHANGE"):
        with monkeypatch.context() as patched:
            patched.setattr(kernels, missing, None)
            assert kernels.hooking(FUNCTIONS, 2, [], print) is None
    assert kernels.hooking(FUNCTIONS, 2, [], print) is not None


def test_a_hook_that_fails_raises_and_takes_nothing():
    def fails(*given):
        raise KeyError("mine")

    taken = []
    how = kernels.hooking(FUNCTIONS, 2, taken, fails)
    with pytest.raises(KeyError, match="mine"):
        kernels.hook(how, "facts", CONV)(DRAWN.double())
    with pytest.raises(TypeError):
        kernels.hook(("no list", *how[1:]), "facts", CONV)
    assert not taken


def function_of(name, x):
    found = getattr(undertow.measures, name)(x)
    return dense(found) if name == "counts" else np.asarray(found)


@pytest.mark.parametrize("shape", [(5, 7, 31, 37), (9, 30, 21, 53)], ids=["at one place", "at several"])
def test_the_number_of_threads_changes_no_bit(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu()
    found = []
    for threads in (1, 2, 3, 8):
        tables = np.zeros((threads, 65536, 4), np.uint32)
        reduced_ = [kernels._walk.reduce((x + mean).numpy(), shape[0] * shape[1], True, threads) for mean in (0, 1e7)]
        found.append((*reduced_, kernels._walk.count(x.numpy(), tables)))
        assert not tables.any()
    assert all(one == found[0] for one in found)


def test_what_walks_found_shares_memory_and_never_the_same():
    """Several pieces' worth, of all sizes up to those that lie alone, all of it kept until the end."""
    draw = np.random.default_rng(0)
    inputs = [draw.normal(size=(rows, 3)).astype(np.float32) for rows in (1, 500, 8000, 32768, 32769, 40000) * 8]
    found = []
    for x in inputs:
        reduced_ = kernels._walk.reduce(x, len(x), True, 2)
        found.append((reduced_[0], reduced_[-1], *kernels._walk.count(x, np.zeros((2, 65536, 4), np.uint32))))
    for x, (lengths, added, codes, often) in zip(inputs, found, strict=True):
        np.testing.assert_allclose(np.frombuffer(lengths, np.float32), np.linalg.norm(x, axis=1), rtol=1e-6)
        two = np.stack([x.sum(1, np.float64), np.abs(x).sum(1, np.float64)], 1)
        np.testing.assert_allclose(np.frombuffer(added).reshape(-1, 2), two, rtol=1e-9, atol=1e-12)
        wanted = np.unique(x.view(np.uint32) >> 16, return_counts=True)
        np.testing.assert_array_equal(np.frombuffer(codes, np.uint16), wanted[0])
        np.testing.assert_array_equal(np.frombuffer(often, np.int64), wanted[1])


def test_a_walk_within_a_walk_has_memory_of_its_own():
    """As another thread's may be: what Python allocates may collect garbage, and a finaliser may do anything."""
    x, held = [np.full((64, 2), value, np.float32) for value in (1, 2)], []

    class Garbage:
        def __init__(self):
            self.itself = self

        def __del__(self):
            held.append((kernels._walk.reduce(x[0], 64, False, 1)[0], 2**0.5))

    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(20):
            gc.disable()
            Garbage()
            gc.enable()  # the next thing that Python allocates collects it
            found = kernels._walk.reduce(x[1], 64, False, 1)[0]
            held.append((found, 8**0.5))
    finally:
        gc.enable()
        gc.set_threshold(*before)
    assert len(held) == 40
    for lengths, wanted in held:
        np.testing.assert_allclose(np.frombuffer(lengths, np.float32), wanted, rtol=1e-6)


@pytest.mark.parametrize("sizes", [(24, 7, 1), (24, 0, 1), (24, 6, 0)], ids=["rows", "none", "threads"])
def test_a_walk_refuses_arrays_that_do_not_fit(sizes):
    values, rows, threads = sizes
    with pytest.raises(ValueError, match="do not fit"):
        kernels._walk.reduce(np.zeros(values, np.float32), rows, True, threads)
    with pytest.raises(ValueError, match="right size"):
        kernels._walk.count(np.zeros(values, np.float32), np.zeros(65536, np.uint32))


def test_more_values_than_one_chunk(way):
    x = torch.randn(kernels._CHUNK * 2 + 17, generator=torch.Generator().manual_seed(0)).view(1, -1)
    np.testing.assert_array_equal(kernel(counts, x), dense(counts(x.numpy())))


def test_zero_infinity_and_nan_have_cells_of_their_own(way):
    tiny = 1e-41
    x = torch.tensor([[0.0, -0.0, tiny, float("inf"), -float("inf"), float("nan"), 3.4e38, -(2.0**-126)]])
    counted = kernel(counts, x)
    found = {int(code): int(counted[code]) for code in np.flatnonzero(counted)}
    assert found[0] == 2  # below 2**-133 a magnitude shares the cell of zero
    assert found[0x8000] == found[0x7F80] == found[0xFF80] == found[0x7FC0] == found[0x7F7F] == found[0x8080] == 1
    assert finite(np.array(list(found))).sum() == len(found) - 3


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=30), st.integers(1, 6000), st.integers(0, 6000))
@settings(max_examples=100, deadline=None)
def test_any_bit_patterns_are_counted(patterns, times, filling):
    x = np.array(patterns * times + [0] * filling, np.uint32).view(np.float32)
    found = dense(counts(torch.from_numpy(x)))
    np.testing.assert_array_equal(found, np.bincount(x.view(np.uint32) >> np.uint32(16), minlength=65536))


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
@settings(max_examples=300, deadline=None)
def test_what_stands_for_a_code_is_within_two_to_the_minus_eight(value):
    (code,), _ = counts(np.array([value], np.float32))
    found = edges()[code]
    if abs(value) >= 2.0**-126:
        assert abs(found - value) <= abs(value) * 2.0**-8
    else:
        assert abs(found - value) <= 2.0**-133


def test_what_stands_for_a_code_is_exact_for_bfloat16():
    every = torch.arange(65536).to(torch.int32).to(torch.uint16).view(torch.bfloat16)
    np.testing.assert_array_equal(edges(exact=True), every.double().numpy())


def test_a_histogram_is_sparse_when_finished():
    counters = np.zeros(65536, np.int64)  # all of them, as a device counts
    counters[[0x3F80, 0xC000]] = 2, 1
    row = Histogram().finish({"codes": np.arange(65536, dtype=np.uint16), "counts": counters})
    assert [column[0].tolist() for column in row.values()] == [[0x3F80, 0xC000], [2, 1]]


def test_names_of_measures():
    assert [m.name for m in resolve("moments")] == ["moments"]
    assert [m.settings() for m in resolve(["keep:sample", "zero_fraction"])] == [
        {"name": "keep", "by": "sample"},
        {"name": "zero-fraction"},
    ]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("histogramm", "did you mean histogram"),
        ([], "no measure"),
        (["moments", "moments"], "twice"),
        ("keep:epoch", "not for each 'epoch'"),
        ("moments:4", "no options"),
    ],
)
def test_measures_that_are_not_understood(what, said):
    with pytest.raises(InputError, match=said):
        resolve(what)
