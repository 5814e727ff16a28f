"""Names of samples fit, are spread over passes, or are refused; what undertow runs for itself is not recorded."""

import numpy as np
import pytest
import torch
from torch import nn

import undertow as ut
from undertow.errors import InputError


class Reused(nn.Module):
    """Runs its layer twice in each pass."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


def samples(n):
    """Each sample has its own size, by which its row is known again."""
    return (torch.arange(1, n + 1.0)[:, None] * torch.ones(3)).requires_grad_()


def recorded(folder, model, **more):
    return ut.record(folder, model, **{"sites": "linear", "measures": "channel-norm", "phase": "forward", **more})


def named_rows(folder, call=None):
    rows = ut.Run(folder).table("channel_norm").to_pylist()
    return [(row["name"], row["sample"]) for row in rows if call is None or row["call"] == call]


@pytest.mark.parametrize("parts", [(8, 8, 8, 8), (8, 8, 5), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("reused", [False, True])
def test_names_are_spread_over_micro_batches(parts, reused, tmp_path):
    model = Reused() if reused else nn.Sequential(nn.Linear(3, 3))
    names = [f"{i}.jpg" for i in range(sum(parts))]
    with recorded(tmp_path, model, phase="both") as recording, recording.batch(samples=names):
        for x in samples(sum(parts)).split(parts):
            (model(x).sum() / len(parts)).backward()
    rows = ut.Run(tmp_path).table("channel_norm").to_pylist()
    layer = model.layer if reused else model[0]
    by_hand = dict(zip(names, layer(samples(sum(parts))).detach(), strict=True))
    for row in rows:
        assert row["name"] == names[row["sample"]]
        if row["phase"] == "forward" and row["call"] % (2 if reused else 1) == 0:
            np.testing.assert_allclose(row["values"], by_hand[row["name"]].abs(), rtol=1e-5)
    assert len(rows) == (4 if reused else 2) * len(names)
    assert ut.Run(tmp_path).table("batches")["size"].to_pylist() == [len(names)]


def test_names_are_spread_over_the_calls_of_parts_alone(tmp_path):
    model = nn.ModuleDict({"head": nn.Linear(3, 3)})
    with recorded(tmp_path, model) as recording, recording.batch(samples="abcd"[:0] or list("abcde")):
        for x in samples(5).split((3, 2)):
            model["head"](x)
    assert named_rows(tmp_path) == list(zip("abcde", range(5), strict=True))


def test_each_pass_over_the_same_samples_has_all_names(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3))
    with recorded(tmp_path, model) as recording, recording.batch(samples=["a", "b"]):
        for _ in range(2):
            model(samples(2))
    assert named_rows(tmp_path) == [("a", 0), ("b", 1)] * 2


def test_kept_samples_of_micro_batches_bear_their_names(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3))
    with recorded(tmp_path, model, measures="keep:sample") as recording, recording.batch(samples=list("abc")):
        for x in samples(3).split(1):
            model(x)
    wanted = model(samples(3)).detach()
    for name, row in zip("abc", wanted, strict=True):
        np.testing.assert_allclose(ut.Run(tmp_path).tensor(name=name), row, rtol=1e-6)


@pytest.mark.parametrize(
    ("names", "parts", "said"),
    [
        (2, (3,), "2 names were given, and the batch has 3 samples at 0"),
        (4, (3,), "4 names"),
        (1, (3,), "1 names"),
        (32, (8,), "32 names were given, and the batch has 8 samples"),
        (32, (8, 8, 8), "passes of 8, 8, 8 samples"),
        (3, (0,), "3 names"),
    ],
)
def test_other_numbers_are_refused_at_once(names, parts, said, tmp_path):
    model, loops = nn.Sequential(nn.Linear(3, 3)), []
    with recorded(tmp_path, model) as recording:
        with pytest.raises(InputError, match=said), recording.batch(samples=range(names)):
            loops.extend(model(samples(n)) for n in parts)
        with recording.batch(samples=["a", "b", "c"]):
            model(samples(3))
    assert named_rows(tmp_path) == [("a", 0), ("b", 1), ("c", 2)]


@pytest.mark.parametrize("through", ["graph", "swap", "hook"])
@pytest.mark.parametrize("diagnose", [False, 1])
def test_explanations_inside_a_batch_are_not_recorded(through, diagnose, tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = torch.randn(2, 3)
    with recorded(tmp_path, model, phase="both", diagnose=diagnose) as recording, recording.batch(samples=["a", "b"]):
        ut.explain(model, x, rule="guided", through=through)
        scores = model(x)
        ut.explain(model, x, rule="guided", through=through)
        scores.sum().backward()
        ut.explain(model, x[:1], rule="guided", estimator="smoothgrad:2")
        ut.trace(model, x[:1])
        ut.select(model, "linear", example=x[:1])
        ut.derive.from_model(model, x[:1])
    table = ut.Run(tmp_path).table("channel_norm")
    assert set(table["call"].to_pylist()) == {0}
    assert table.num_rows == 2 * 2 * 2
