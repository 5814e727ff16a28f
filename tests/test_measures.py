"""Measures: one contract for all, and an independent formula for each."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from undertow.errors import InputError
from undertow.frameworks.torch.record.stats import _CHUNK, arranged  # registers the statistics of tensors
from undertow.measures import (
    MEASURES,
    ChannelSums,
    Histogram,
    Keep,
    Moments,
    Norm,
    code_values,
    finite,
    reduce_all,
    resolve,
    stats,
)

ALL = [make() for make in MEASURES.values()] + [Keep(by="sample")]


def same(measure, a, b):
    """Whether two finished measures are equal: to the last bit, but for sums of floating-point numbers.

    What a sum cancels is lost: its error is beside the magnitudes that went into it.
    """
    assert a.keys() == b.keys() == measure.columns.keys()
    added = {"mean": ("min", "max"), "m2": ("m2",), "norm": ("norm",)} | dict.fromkeys(
        ("sums", "absolutes"), ("absolutes",)
    )
    for key in a:
        for i, (one, other) in enumerate(zip(a[key], b[key], strict=True)):
            if isinstance(measure, Norm | Moments | ChannelSums) and key in added:
                within = 1e-5 * np.max(np.abs([b[name][i] for name in added[key]]), axis=0)
                assert (np.abs(one - other) <= within).all()
            else:
                np.testing.assert_array_equal(one, other)


def values(seed, batch=6):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(batch, 3, 2, 5)) * 10.0 ** draw.integers(-8, 4, size=(batch, 3, 1, 1)) + 0.1
    return np.where(draw.random(x.shape) < 0.3, 0, x).astype(np.float32)


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("measure", ALL, ids=lambda m: f"{m.name}{getattr(m, 'by', '')}")
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), cuts=st.lists(st.integers(1, 5), max_size=4, unique=True), shuffle=st.randoms())
def test_any_split_merged_in_any_order_equals_the_whole(measure, framework, seed, cuts, shuffle):
    x = values(seed)
    whole = measure.finish(reduced(measure, x, framework))
    states = []
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(x)], strict=True):
        states.append(reduced(measure, x[start:end], framework, start))
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


def test_measures_together_give_what_each_gives_alone():
    for x in (values(2), torch.from_numpy(values(2))):
        for measure, state in zip(ALL, reduce_all(ALL, x), strict=True):
            alone = measure.reduce(x)
            same(measure, measure.finish(on_host(state)), measure.finish(on_host(alone)))


def test_statistics_are_computed_once_and_only_where_asked_for():
    statistics = stats(torch.from_numpy(values(0)))
    assert "moments" not in vars(statistics)
    assert statistics.norms is statistics.norms


@pytest.mark.parametrize("measure", ALL, ids=lambda m: f"{m.name}{getattr(m, 'by', '')}")
def test_a_state_is_a_flat_dict_of_arrays(measure):
    for state in (measure.init(), measure.reduce(values(0))):
        assert all(isinstance(value, np.ndarray) for value in state.values())


def on_host(state):
    return {key: np.asarray(value) for key, value in state.items()}


def reduced(measure, x, framework, start=0):
    """The state of an array, by NumPy or by torch."""
    return on_host(measure.reduce(x if framework == "numpy" else torch.from_numpy(x), start))


def statistic(name, x):
    """One of an array's statistics, on the host; the counters of all codes for "histogram"."""
    value = getattr(stats(x), name)
    return dense(value) if name == "histogram" else np.asarray(value)


def dense(histogram):
    """Counters for all codes."""
    codes, counts = map(np.asarray, histogram)
    assert codes.dtype == np.uint16
    assert counts.dtype == np.int64
    assert (np.diff(codes.astype(int)) > 0).all()
    counters = np.zeros(65536, np.int64)
    counters[codes] = counts
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


@pytest.fixture(params=DTYPES)
def x(request, layout):
    drawn = torch.from_numpy(np.random.default_rng(3).normal(size=(4, 3, 6, 7)))
    drawn = torch.where(drawn.abs() < 0.4, torch.zeros(()), drawn + 0.2)
    return layout(drawn.to(DTYPES[request.param]))


def test_norms_by_hand(x):
    wanted = np.array(
        [[sum(float(v) ** 2 for v in np.ravel(channel)) ** 0.5 for channel in sample] for sample in x.double().numpy()]
    ).reshape(x.shape[:2])
    for found in (statistic("norms", x), statistic("norms", x.double().numpy())):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_zeros_by_hand(x):
    wanted = sum(value == 0 for value in x.double().flatten().tolist())
    assert int(statistic("zeros", x)) == int(statistic("zeros", x.double().numpy())) == wanted


def test_moments_by_hand(x):
    listed = x.double().flatten().tolist()
    found, plain = statistic("moments", x), statistic("moments", x.double().numpy())
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
    for found in (statistic("channel_sums", x), statistic("channel_sums", x.double().numpy())):
        np.testing.assert_allclose(found, np.array(wanted), rtol=1e-5, atol=1e-5)


def test_counts_by_hand(x):
    wanted = np.zeros(65536, np.int64)
    for value in x.double().flatten().tolist():
        wanted[int.from_bytes(struct.pack(">f", value)[:2], "big")] += 1
    np.testing.assert_array_equal(statistic("histogram", x), wanted)
    np.testing.assert_array_equal(statistic("histogram", x.double().numpy()), wanted)
    np.testing.assert_array_equal(statistic("histogram", x), wanted)


@pytest.mark.parametrize("mean", [0.0, 1e3, -1e5, 1e7])
def test_moments_stay_accurate_beside_a_large_mean(mean):
    x = torch.randn(3, 4, 50, 60, generator=torch.Generator().manual_seed(0)) + mean
    count, wide = x.numel(), x.double()
    _, m2, _, _ = statistic("moments", x)
    assert m2 / count == pytest.approx(float(wide.var(correction=0)), rel=2e-3 if mean else 1e-6)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("measure", ALL, ids=lambda m: f"{m.name}{getattr(m, 'by', '')}")
def test_no_kernel_asks_a_device_for_values(measure, dtype):
    """On the device "meta" there are none to be had: `.item()`, a branch on a value or a copy to the host raises."""
    state = measure.reduce(torch.empty(2, 3, 40, 50, dtype=dtype, device="meta").transpose(2, 3))
    assert any(isinstance(value, torch.Tensor) and value.is_meta for value in state.values())


def test_a_nan_is_seen_in_the_moments():
    for row in (torch.tensor([[1.0, float("nan")]]), np.array([[1.0, np.nan]])):
        assert np.isnan(statistic("moments", row)[:2]).all()


@pytest.mark.parametrize("place", [0, 1, 17, 99])
def test_what_is_not_finite_is_seen_wherever_it_lies(place):
    x = torch.ones(2, 2, 5, 5)
    x.view(-1)[place] = float("inf")
    np.testing.assert_array_equal(statistic("moments", x), [np.inf, np.nan, 1, np.inf])
    x.view(-1)[place] = float("nan")
    assert np.isnan(statistic("moments", x)).all()
    assert np.isnan(statistic("norms", x)).sum() == 1
    assert np.isnan(statistic("channel_sums", x)).sum() == 2


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
def test_rows_of_any_length(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu()
    plain = x.double().numpy()
    np.testing.assert_allclose(statistic("norms", x), statistic("norms", plain), rtol=1e-6)
    np.testing.assert_allclose(statistic("channel_sums", x), statistic("channel_sums", plain), rtol=1e-5)
    np.testing.assert_allclose(statistic("moments", x), statistic("moments", plain), rtol=1e-5)
    assert int(statistic("zeros", x)) == statistic("zeros", plain)


CONV, CONV1, LINEAR, ANY = torch.nn.Conv2d(1, 1, 1), torch.nn.Conv1d(1, 1, 1), torch.nn.Linear(1, 1), torch.nn.ReLU()
DRAWN = torch.randn(4, 3, 6, 7, generator=torch.Generator().manual_seed(0)).relu()
GRADIENTS = {
    "convolution": (CONV, DRAWN),
    "single sample": (CONV, DRAWN[1]),
    "single sample of one axis": (CONV1, DRAWN[1, 1]),
    "features": (LINEAR, DRAWN.reshape(4, -1)),
    "features behind tokens": (LINEAR, DRAWN.reshape(4, 6, 21)),
    "tokens": (ANY, DRAWN.reshape(4, 6, 21)),
    "one axis": (ANY, DRAWN[0, 0, 0]),
    "number": (ANY, torch.tensor(-3.0)),
    "large": (ANY, DRAWN.reshape(4, 1, 126).expand(4, 9, 126).contiguous().repeat(40, 1, 1)),
    "later in memory": (CONV, DRAWN[2:]),
    "not a number": (CONV, DRAWN / DRAWN),
    "one sample of several": (CONV, DRAWN[::4]),
    "every second sample": (CONV, DRAWN[::2]),
    "part": (CONV, DRAWN[..., :4]),
    "transposed": (CONV, DRAWN.transpose(2, 3)),
    "repeated": (CONV, DRAWN[:, :1].expand(4, 3, 6, 7)),
    "channels last": (CONV, DRAWN.to(memory_format=torch.channels_last)),
    "opposite": (CONV, torch._neg_view(DRAWN)),
    "one value, opposite": (ANY, torch.conj(torch.complex(DRAWN, DRAWN + 1)).imag[:1, :1, 0, 0]),
    "zero without memory": (CONV, torch._efficientzerotensor((4, 3, 6, 7))),
    "empty": (CONV, DRAWN[:0]),
    "sparse": (LINEAR, DRAWN[0, 0].to_sparse()),
    "wide": (CONV, DRAWN.double()),
    "narrow": (CONV, DRAWN.bfloat16()),
    "parameter": (CONV, torch.nn.Parameter(DRAWN)),
    "with a graph": (CONV, DRAWN.clone().requires_grad_()),
}


@pytest.mark.parametrize(("module", "gradient"), GRADIENTS.values(), ids=GRADIENTS)
def test_gradients_of_any_layout_equal_numpys_statistics(module, gradient):
    x = arranged(module, gradient.detach())
    wide = stats(x.double().numpy())
    for name in ("norms", "zeros", "moments", "channel_sums"):
        np.testing.assert_allclose(
            statistic(name, x), np.asarray(getattr(wide, name)), rtol=1e-5, atol=1e-4, equal_nan=True
        )
    np.testing.assert_array_equal(statistic("histogram", x), dense(wide.histogram))


def test_more_values_than_one_chunk():
    x = torch.randn(_CHUNK * 2 + 17, generator=torch.Generator().manual_seed(0)).view(1, -1)
    np.testing.assert_array_equal(statistic("histogram", x), statistic("histogram", x.numpy()))


def test_zero_infinity_and_nan_have_cells_of_their_own():
    tiny = 1e-41
    x = torch.tensor([[0.0, -0.0, tiny, float("inf"), -float("inf"), float("nan"), 3.4e38, -(2.0**-126)]])
    counted = statistic("histogram", x)
    found = {int(code): int(counted[code]) for code in np.flatnonzero(counted)}
    assert found[0] == 2  # below 2**-133 a magnitude shares the cell of zero
    assert found[0x8000] == found[0x7F80] == found[0xFF80] == found[0x7FC0] == found[0x7F7F] == found[0x8080] == 1
    assert finite(np.array(list(found))).sum() == len(found) - 3


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=30), st.integers(1, 6000), st.integers(0, 6000))
@settings(max_examples=100, deadline=None)
def test_any_bit_patterns_are_counted(patterns, times, filling):
    x = np.array(patterns * times + [0] * filling, np.uint32).view(np.float32)
    found = statistic("histogram", torch.from_numpy(x))
    np.testing.assert_array_equal(found, np.bincount(x.view(np.uint32) >> np.uint32(16), minlength=65536))


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
@settings(max_examples=300, deadline=None)
def test_what_stands_for_a_code_is_within_two_to_the_minus_eight(value):
    (code,), _ = stats(np.array([value], np.float32)).histogram
    found = code_values()[code]
    if abs(value) >= 2.0**-126:
        assert abs(found - value) <= abs(value) * 2.0**-8
    else:
        assert abs(found - value) <= 2.0**-133


def test_what_stands_for_a_code_is_exact_for_bfloat16():
    every = torch.arange(65536).to(torch.int32).to(torch.uint16).view(torch.bfloat16)
    np.testing.assert_array_equal(code_values(exact=True), every.double().numpy())


def test_a_histogram_is_sparse_when_finished():
    counters = np.zeros(65536, np.int64)  # all of them, as a device counts
    counters[[0x3F80, 0xC000]] = 2, 1
    row = Histogram().finish({"codes": np.arange(65536, dtype=np.uint16), "counts": counters})
    assert [column[0].tolist() for column in row.values()] == [[0x3F80, 0xC000], [2, 1]]


def test_names_of_measures():
    assert [m.name for m in resolve("moments")] == ["moments"]
    assert [m.to_dict() for m in resolve(["keep:sample", "zero_fraction"])] == [
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
