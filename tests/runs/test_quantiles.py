"""Quantiles and comparisons of runs, against NumPy on the values themselves."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from undertow.errors import InputError
from undertow.recording import record
from undertow.runs import Run, compare, quantiles
from undertow.runs.quantiles import STEPS, weighted

Q = [0.0, 0.05, 0.3, 0.5, 0.7, 0.95, 1.0]


class Factors(nn.Module):
    """Multiplies by numbers that are then the gradients, so that any gradients can be made."""

    def __init__(self, names=("first", "second")):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Identity())

    def forward(self, gradients):
        return sum(
            (m(torch.ones_like(g, requires_grad=True) * 1.0) * g).sum()
            for m, g in zip(self.children(), gradients, strict=True)
        )


def run_of(folder, *batches, names=("first", "second"), measures=("histogram", "channel-norm"), **more):
    """A run with these gradients: for each batch, one tensor a site."""
    model = Factors(names)
    with record(folder, model, sites="Identity", measures=measures, **more) as recording:
        for number, gradients in enumerate(batches):
            with recording.batch(epoch=number // 2):
                model(gradients).backward()
    return Run(folder)


def drawn(seed, *shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 5 - 3)
    return torch.where(x.abs() < 0.2 * x.std(), torch.zeros(()), x)


@pytest.fixture(scope="module")
def batches():
    return [(drawn(4 * n, 3, 4, 5), drawn(4 * n + 1, 3 + n, 2)) for n in range(3)]


@pytest.fixture(scope="module")
def run(batches, tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("run") / "a", *batches)


@pytest.mark.parametrize("of", ["magnitude", "value"])
def test_of_histograms_against_numpy(run, batches, of):
    for place, found in enumerate(quantiles(run, Q, of=of)):
        values = np.concatenate([pair[place].double().flatten() for pair in batches])
        wanted = np.quantile(np.abs(values) if of == "magnitude" else values, Q, method="inverted_cdf")
        np.testing.assert_allclose(found.values, wanted, rtol=2.0**-8, atol=0)
        assert (found.count, found.zeros, found.nonfinite) == (len(values), (values == 0).sum(), 0)
    assert [found.site for found in quantiles(run, Q)] == ["first", "second"]


def test_of_channel_norms_against_numpy(run, batches):
    for place, found in enumerate(run.quantiles(Q, of="channel_norm")):
        norms = [pair[place].flatten(2).norm(dim=2) if pair[place].ndim > 2 else pair[place].abs() for pair in batches]
        wanted = np.quantile(np.concatenate([n.flatten() for n in norms]), Q, method="inverted_cdf")
        np.testing.assert_allclose(found.values, wanted, rtol=1e-6)


def test_bfloat16_is_exact(tmp_path, batches):
    narrow = [tuple(g.bfloat16() for g in pair) for pair in batches]
    for place, found in enumerate(run_of(tmp_path, *narrow).quantiles(Q, of="value")):
        values = np.concatenate([pair[place].double().flatten() for pair in narrow])
        np.testing.assert_array_equal(found.values, np.quantile(values, Q, method="inverted_cdf"))


def test_nan_and_infinity_are_counted_and_left_out(tmp_path):
    x = torch.tensor([[1.0, float("inf"), -float("inf"), float("nan"), -2.0, 0.0]])
    for of, wanted in (("value", (-2.0, 0.0, 1.0)), ("magnitude", (0.0, 1.0, 2.0)), ("channel_norm", (0.0, 1.0, 2.0))):
        (found,) = run_of(tmp_path / of, (x,), names=["only"]).quantiles([0.0, 0.5, 1.0], of=of)
        np.testing.assert_allclose(found.values, wanted, rtol=2.0**-8)
        assert (found.count, found.zeros, found.nonfinite) == (3, 1, 3)


def test_nothing_but_nan_has_no_quantiles(tmp_path):
    x = torch.full((1, 2), float("nan"))
    (found,) = run_of(tmp_path, (x,), names=["only"]).quantiles([0.5])
    assert np.isnan(found.values[0])
    assert found.count == 0


def test_by_further_columns(run, batches):
    found = run.quantiles([0.5], by=["epoch", "batch"])
    assert [(one.site, one.by) for one in found] == [
        (site, {"epoch": number // 2, "batch": batch})
        for site in ("first", "second")
        for number, batch in ((0, 0), (0, 1), (2, 0))
    ]
    for one, (place, number) in zip(found, [(p, n) for p in (0, 1) for n in range(3)], strict=True):
        wanted = np.quantile(batches[number][place].abs().numpy(), 0.5, method="inverted_cdf")
        assert one.values[0] == pytest.approx(wanted, rel=2.0**-8)
    assert [one.by for one in run.quantiles([0.5], by="call")] == [{"call": 0}] * 2


@pytest.mark.parametrize("of", ["value", "channel_norm"])
def test_the_mean_of_a_loss_is_undone(run, batches, of):
    """Batches differ in size, so each is multiplied by its own."""
    sizes = [max(len(g) for g in pair) for pair in batches]
    undone = [tuple(g * size for g in pair) for pair, size in zip(batches, sizes, strict=True)]
    for place, found in enumerate(run.quantiles(Q, of=of, per_sample=True)):
        if of == "value":
            values = np.concatenate([pair[place].double().flatten() for pair in undone])
        else:
            norms = [pair[place].flatten(2).norm(dim=2) if place == 0 else pair[place].abs() for pair in undone]
            values = np.concatenate([n.flatten() for n in norms])
        wanted = np.quantile(values, Q, method="inverted_cdf")
        np.testing.assert_allclose(found.values, wanted, rtol=2.0**-8)


def test_a_sum_needs_no_undoing_and_outputs_neither(tmp_path, batches):
    summed = run_of(tmp_path / "sum", *batches, loss_reduction="sum")
    assert summed.quantiles(Q, per_sample=True) == summed.quantiles(Q)
    both = run_of(tmp_path / "both", *batches, phase="both")
    plain, undone = both.quantiles(Q), both.quantiles(Q, per_sample=True)
    assert [one.phase for one in plain] == ["backward", "forward"] * 2
    assert [a == b for a, b in zip(plain, undone, strict=True)] == [False, True] * 2


@given(
    st.lists(st.tuples(st.integers(-50, 50), st.integers(0, 5)), min_size=1, max_size=30),
    st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 1.0]), min_size=1, max_size=5),
)
@settings(max_examples=200, deadline=None)
def test_weighted_quantiles_against_numpy(pairs, q):
    values, weights = (np.array(column) for column in zip(*pairs, strict=True))
    found = weighted(values.astype(float), weights, q)
    if weights.sum() == 0:
        assert np.isnan(found).all()
    else:
        assert found == np.quantile(np.repeat(values, weights), q, method="inverted_cdf").tolist()


def test_as_plain_rows(run):
    row = quantiles(run, [0.05, 0.5, 0.975])[0].to_dict()
    assert list(row) == ["site", "phase", "of", "count", "zeros", "nonfinite", "p5", "p50", "p97.5"]
    assert len(quantiles(run)[0].values) == len(STEPS) == 19


@pytest.mark.parametrize(
    ("q", "more", "said"),
    [
        ([], {}, "fractions"),
        ([50], {}, "fractions"),
        ([0.5], {"of": "magnitud"}, "did you mean magnitude"),
        ([0.5], {"by": "colour"}, "by 'colour'"),
    ],
)
def test_what_is_not_understood(run, q, more, said):
    with pytest.raises(InputError, match=said):
        run.quantiles(q, **{"of": "value", **more})


def test_a_measure_that_is_not_there(tmp_path, batches):
    run = run_of(tmp_path, *batches, measures="channel-norm")
    with pytest.raises(InputError, match="holds no histogram"):
        run.quantiles([0.5])
    assert quantiles(run)[0].of == "channel_norm"


def test_sites_are_paired_by_name_or_by_order(tmp_path, run, batches):
    turned = run_of(tmp_path / "b", *[(b, a) for a, b in batches], names=("second", "first"))
    for row in compare([run, turned], [0.5, 0.9]):
        assert row.sites[0] == row.sites[1]
        assert row.ratios == ((1.0, 1.0), (1.0, 1.0))
    other = run_of(tmp_path / "c", *[(4 * a, 2 * b, a) for a, b in batches], names=("one", "two", "three"))
    rows = compare([run, other], [0.5, 0.9])
    assert [row.sites for row in rows] == [("first", "one"), ("second", "two"), (None, "three")]
    assert [row.ratios[1] for row in rows[:2]] == [(4.0, 4.0), (2.0, 2.0)]
    assert np.isnan(rows[2].ratios[1]).all()
    assert rows[2].quantiles[0] is None
    assert [row.place for row in rows] == [0, 1, 2]


def test_spread_is_the_highest_over_the_lowest(tmp_path):
    x = torch.arange(1, 101.0).view(1, -1)
    run = run_of(tmp_path / "a", (x.bfloat16(),), names=["only"])
    zeros = run_of(tmp_path / "b", (torch.where(x < 20, 0.0, x),), names=["only"])
    (row,) = compare([run, zeros], [0.5])
    assert row.spreads == (95 / 5, np.inf)
    with pytest.raises(InputError, match="two or more"):
        compare([run])
