"""Choosing sites: kinds, names, globs, slices in order of execution, and errors that help."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from undertow.errors import InputError, ModelError
from undertow.sites import Selection, select, selection


class Backwards(nn.Module):
    """Defines its layers in another order than it runs them, uses one twice and one never."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(4, 2, 1)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.again = nn.Conv2d(4, 4, 1)
        self.unused = nn.Conv2d(1, 1, 1)
        self.same = self.again
        self.layer4 = nn.Sequential(nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
        self.layer4[0].conv2 = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        x = self.again(self.again(self.body(x)))
        return self.layer4[0].conv2(self.last(x))


X = torch.arange(2 * 3 * 5 * 6.0).view(2, 3, 5, 6).sin()


def names(*args, **more):
    return [site.name for site in select(Backwards(), *args, **more)]


@pytest.mark.parametrize(
    ("what", "wanted"),
    [
        ("conv", ["body.0", "again", "last", "layer4.0.conv2", "unused"]),
        ("conv[:2]", ["body.0", "again"]),
        ("conv[0]", ["body.0"]),
        ("conv[-1]", ["layer4.0.conv2"]),
        ("conv[::2]", ["body.0", "last"]),
        ("conv[1:3]", ["again", "last"]),
        ("Conv2d", ["body.0", "again", "last", "layer4.0.conv2", "unused"]),
        ("_BatchNorm", ["body.1"]),
        ("norm, relu", ["body.1", "body.2"]),
        ("relu,conv[:1]", ["body.0", "body.2"]),
        ("body.*", ["body.0", "body.1", "body.2"]),
        ("body.?", ["body.0", "body.1", "body.2"]),
        ("layer4.**.conv2", ["layer4.0.conv2"]),
        ("layer4.**", ["layer4.0.conv2", "layer4.0", "layer4.0.0", "layer4.0.1"]),
        ("**.conv2", ["layer4.0.conv2"]),
        ("*", ["body", "again", "last", "unused", "layer4"]),
        ("same", ["again"]),
        ("linear", ["layer4.0.1"]),
        (["last", "body.0"], ["body.0", "last"]),
        (lambda name, module: getattr(module, "kernel_size", 0) == (3, 3), ["body.0"]),
    ],
    ids=lambda value: "predicate" if callable(value) else str(value),
)
def test_selects_in_order_of_execution(what, wanted):
    found = names(what, example=X)
    if what == "layer4.**":
        found.sort(key=wanted.index)  # which of the uncalled comes first is of no matter
    assert found == wanted


def test_without_an_example_the_order_is_that_of_definition():
    assert names("conv[:2]") == ["last", "body.0"]
    assert {site.calls for site in select(Backwards(), "conv")} == {None}


def test_shapes_and_calls():
    sites = {
        site.name: (site.kind, site.type, site.shape, site.calls) for site in select(Backwards(), "conv", example=X)
    }
    assert sites["again"] == ("conv", "Conv2d", (2, 4, 3, 4), 2)
    assert sites["unused"] == ("conv", "Conv2d", None, 0)


def test_running_an_example_leaves_nothing_behind():
    model = Backwards().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    select(model, "conv[:2]", example=X)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training


def test_keywords_are_joined_by_and():
    assert names(kind="conv", name="layer4.**") == ["layer4.0.conv2"]
    assert names("conv[:2]", name="a*", example=X) == ["again"]
    assert names(name="last") == ["last"]


def test_a_name_that_is_a_kind():
    model = nn.ModuleDict({"conv": nn.Linear(1, 1), "other": nn.Conv2d(1, 1, 1)})
    assert [site.name for site in select(model, "conv")] == ["other"]
    assert [site.name for site in select(model, name="conv")] == ["conv"]


def test_a_model_that_is_one_layer():
    assert [site.name for site in select(nn.Linear(1, 1), "linear")] == [""]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("covn", "did you mean conv"),
        ("boddy.0", "did you mean body.0"),
        ("conv[9:]", "beyond the 5 matches"),
        ("conv[7]", "beyond"),
        ("conv[-9]", "beyond"),
        ("conv, linaer", "did you mean linear"),
        ("conv[", "not understood"),
        ("conv[]", "empty slice"),
        ("conv[::0]", "step of 0"),
        ("conv,,relu", "not understood"),
        ("", "not understood"),
        ([], "must be a selection"),
        (["bodi.0"], "did you mean body.0"),
        (lambda name, module: False, "predicate selects none"),
        (None, "nothing says which sites"),
    ],
    ids=lambda value: "predicate" if callable(value) else str(value),
)
def test_selecting_nothing_is_an_error_with_a_hint(what, said):
    with pytest.raises(InputError, match=said):
        names(what, example=X)


def test_what_is_no_model():
    with pytest.raises(InputError, match="is a dict"):
        select({}, "conv")


def test_a_compiled_model_is_refused():
    model = Backwards()
    model.compile(backend="eager")
    with pytest.raises(ModelError, match="never fire"):
        select(model, "conv")
    with pytest.raises(ModelError, match="never fire"):
        select(torch.compile(Backwards(), backend="eager"), "conv")


def test_a_selection_is_read_once():
    asked = selection("conv[:2]")
    assert isinstance(asked, Selection)
    assert asked.sliced
    assert selection(asked) is asked


def test_imports_no_framework():
    code = (
        "import sys, undertow.sites, undertow.measures, undertow.runs, undertow.recording;"
        "sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
