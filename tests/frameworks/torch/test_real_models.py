"""Real models: each map equals one that is not undertow's, each refusal is one line that leads to a map."""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten

import undertow as ut
from frameworks.torch.real_models import REAL_MODELS, RealModel, page
from frameworks.torch.references import at_output, grad_cam, ruled, smoothgrad

PAGE = Path(__file__).parents[3] / "docs" / "models.md"
MODELS = [
    pytest.param(row, id=row.name, marks=[pytest.mark.filterwarnings(row.warnings)] if row.warnings else [])
    for row in REAL_MODELS
]


def run(call: str, names: dict[str, Any], explain: Any = ut.explain, **options: Any) -> Any:
    """Run a call as it stands in the table, with more options."""
    stand_in = SimpleNamespace(explain=lambda *args, **more: explain(*args, **{**more, **options}), targets=ut.targets)
    return eval(call, {**names, "ut": stand_in})


def given(row: RealModel) -> tuple[dict[str, Any], Any, Any]:
    """Return what the names in a row stand for, the model that a reference explains, and the `x` of its call."""
    names = build(row)
    model, x = run(row.call, names, lambda model, x, **_: (model, x))
    return names, names.get("twin", model), x


@functools.cache
def build(row: RealModel) -> dict[str, Any]:
    return row.build()


@contextmanager
def told(rule: str, row: RealModel) -> Iterator[None]:
    """Expect the warning of what the rule leaves alone, or none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ut.UndertowWarning)
        yield
    line = f"{rule}: left alone on the way, as the gradient passes them: {row.left}"
    remedy = "" if row.activations == "all" else "; activations='all' takes the smooth ones among them"
    assert [str(w.message) for w in caught if w.category is ut.UndertowWarning] == [line + remedy] * bool(row.left)


def assert_same(values: Any, wanted: Any) -> None:
    """Compare maps in any structure, each on its own scale; at least one is not zero."""
    found, expected = tree_flatten(values)[0], tree_flatten(wanted)[0]
    assert [v is None for v in found] == [v is None for v in expected]
    largest = [v.abs().max() for v in expected if v is not None]
    assert max(largest) > 0
    for v, w in zip(found, expected, strict=True):
        if w is not None:
            scale = w.abs().max().clamp(min=torch.finfo(w.dtype).tiny)
            torch.testing.assert_close(v / scale, w / scale, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("row", MODELS)
def test_the_gradient_is_autograds(row):
    names, model, x = given(row)
    attribution = run(row.call, names, rule="gradient")
    assert_same(attribution.values, ruled(model, x, row.score)[0])
    assert attribution.rewired == 0
    with told("guided", row) if 'rule="gradient"' not in row.call else nullcontext():
        as_it_stands = run(row.call, names)
    assert as_it_stands.rewired == (0 if as_it_stands.rule == "gradient" else row.rewired)


@pytest.mark.parametrize("rule", ["guided", "deconvnet"])
@pytest.mark.parametrize("row", [row for row in MODELS if row.values[0].rewired])
def test_a_rule_reaches_every_activation(row, rule):
    names, model, x = given(row)
    with told(rule, row):
        attribution = run(row.call, names, rule=rule, activations=row.activations)
    wanted, calls = ruled(model, x, row.score, rule, row.activations)
    assert_same(attribution.values, wanted)
    assert attribution.rewired == calls == row.rewired


@pytest.mark.parametrize("row", MODELS)
def test_smoothgrad_is_a_mean_of_gradients(row):
    names, model, x = given(row)
    attribution = run(row.call, names, rule="gradient", estimator="smoothgrad:3", seed=4)
    assert_same(attribution.values, smoothgrad(model, x, row.score, 3, seed=4))


@pytest.mark.parametrize(
    ("row", "layer"),
    [pytest.param(row, layer, id=f"{row.name}: {layer[0]}") for row in REAL_MODELS for layer in row.layers],
)
def test_grad_cam_of_a_layer(row, layer):
    names, model, x = given(row)
    name, as_planes = layer
    attribution = run(row.call, names, rule="gradient", estimator=f"grad-cam:{name}")
    leaves = tree_flatten(x)[0]
    image = next(leaf for leaf in leaves if leaf.is_floating_point())
    has_channels = image.ndim > 2
    size = tuple(image.shape[2:] if has_channels else image.shape[1:])
    wanted = grad_cam(model, x, row.score, model.get_submodule(name), as_planes, size)
    assert_same(
        attribution.values, [(wanted if has_channels else wanted[:, 0]) if t is image else None for t in leaves]
    )


@pytest.mark.parametrize(
    ("row", "also"),
    [pytest.param(row, also, id=f"{row.name}: {also.call[17:]}") for row in REAL_MODELS for also in row.also],
)
def test_tokens_places_boxes_and_layers(row, also):
    names, model, _ = given(row)
    x = run(also.call, names, lambda model, x, **_: x)
    values = run(also.call, names, rule="gradient").values
    if also.at is None:
        assert_same(values, ruled(model, x, also.score)[0])
    else:
        layer, call = also.at
        assert_same(values, at_output(model, x, also.score, model.get_submodule(layer), call))


@pytest.mark.parametrize(
    ("row", "refused"),
    [
        pytest.param(*row.values, refused, id=f"{row.id}: {refused.line[:60]}", marks=row.marks)
        for row in MODELS
        for refused in row.values[0].refused
    ],
)
def test_what_is_refused_is_said_in_one_line_that_leads_to_a_map(row, refused):
    names = build(row)
    with pytest.raises(ut.UndertowError) as caught:
        run(refused.call, names)
    assert str(caught.value) == refused.line
    assert "\n" not in refused.line
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ut.UndertowWarning)
        instead = run(refused.instead, names)
    maps = [v for v in tree_flatten(instead.values)[0] if v is not None]
    assert max(v.abs().max() for v in maps) > 0


def test_the_page_is_printed_from_the_table():
    assert PAGE.read_text() == page(), "run `python -m frameworks.torch.real_models > ../docs/models.md` in tests/"
