"""What stands on the last line of a notebook's cell: one screen of text, and HTML that is small, static and safe."""

import re
import sys
import tempfile
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

import undertow as ut
from undertow import display
from undertow.display import Mark, Part, Pictures, Rows, Shown, ShownTable, as_html, as_text
from undertow.recording.photographs import RecordedPhotographs
from undertow.runs.check import Fault
from undertow.sweep.folder import Failure
from undertow.sweep.reader import SweepCheck, SweepStatus

SCREEN, SMALL = 2_000, 200_000
HOSTILE = "</script><img src=x onerror=alert(1)>[red]\x1b[31m&amp;$\n"


class Reader(HTMLParser):
    """Notes every element with its attributes, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert not reader.open, "an element is not closed"
    return reader


def pictures(html: str) -> list[Image.Image]:
    data = re.findall(r'src="data:image/png;base64,([^"]*)"', html)
    return [Image.open(BytesIO(b64decode(text, validate=True))) for text in data]


def check_static(html: str) -> Reader:
    """Nothing runs, nothing is fetched, colours are the page's own, and it is small."""
    reader = read(html)
    assert {tag for tag, _ in reader.elements} <= {"div", "table", "thead", "tbody", "tr", "th", "td", "span", "img"}
    for tag, attributes in reader.elements:
        assert set(attributes) <= {"style", "src", "width", "height", "alt"}
        assert "url(" not in (attributes.get("style") or "")
        assert tag != "img" or attributes["src"].startswith("data:image/png;base64,")
        # a colour of text or ground would vanish on one of the two; marks have one, and their word beside them
        assert tag == "span" or not re.search(r"(^|[;\s])(color|background)", attributes.get("style") or "")
    assert len(html) < SMALL
    return reader


def check_shown(thing) -> Reader:
    """Check all representations, and return the HTML as read."""
    assert 0 < len(repr(thing)) < SCREEN
    assert max(len(line) for line in repr(thing).split("\n")) <= display.ITEM_WIDTH
    assert "\x1b" not in repr(thing)
    latex = thing._repr_latex_() if hasattr(thing, "_repr_latex_") else None
    html = thing._repr_html_()
    assert bool(html) != bool(latex), "a notebook shows HTML where there is both"
    if latex:
        assert latex[0] == latex[-1] == "$"
        assert "<" not in latex
    return check_static(html or "")


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 14 * 14, 5)]
    return torch.nn.Sequential(*layers).eval()


@pytest.fixture(scope="module")
def x():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def record(net, x, **options) -> str:
    folder = tempfile.mkdtemp()
    with ut.record(folder, net, sites="conv, linear", measures="histogram", **options) as recording:
        for _ in range(2):
            with recording.batch():
                torch.nn.functional.cross_entropy(net(x), torch.arange(len(x)) % 5).backward()
    return folder


@pytest.fixture(scope="module")
def run(net, x):
    return ut.Run(record(net, x, diagnose=1))


def deep(layers: int) -> torch.nn.Module:
    return torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(layers)))


THINGS = {
    "attribution": lambda net, x, run: ut.explain(net, x),
    "trace": lambda net, x, run: ut.trace(net, x),
    "call": lambda net, x, run: ut.trace(net, x)[0],
    "rows of a trace": lambda net, x, run: ut.trace(net, x).table(),
    "verdict": lambda net, x, run: ut.trust(net, x[:1]),
    "answer": lambda net, x, run: ut.trust(net, x[:1]).answers["class"],
    "run": lambda net, x, run: run,
    "check": lambda net, x, run: run.check(),
    "quantiles": lambda net, x, run: run.quantiles([0.1, 0.5, 0.9]),
    "quantiles of a site": lambda net, x, run: run.quantiles([i / 20 for i in range(1, 20)])[0],
    "comparisons": lambda net, x, run: ut.compare([run, run]),
    "comparison": lambda net, x, run: ut.compare([run, run])[0],
    "findings": lambda net, x, run: ut.diagnose(run),
    "finding": lambda net, x, run: ut.Finding("pooling", "info", ("a",), "found", {"predicted": 0.75}),
    "recording": lambda net, x, run: ut.record(tempfile.mkdtemp(), net),
    "sites": lambda net, x, run: ut.select(net, "conv, linear", example=x),
    "network": lambda net, x, run: ut.derive.Network.parse("x1>n1 n1>n2 n1>n3 n2>n4 n3>n4"),
    "derivative": lambda net, x, run: ut.derive.Network.parse("x1>n1 n1>n2").derivative("n1"),
    "blocks": lambda net, x, run: ut.derive.from_model(net, x),
    "derivative by a block": lambda net, x, run: ut.derive.from_model(net, x).derivative("0"),
    "directional": lambda net, x, run: ut.derive.directional("X*X.T", "X", {"X": ("d", "d")}),
    "matrix": lambda net, x, run: ut.derive.directional("X*X.T", "X", {"X": ("d", "d")}).derivative,
    "classifier": lambda net, x, run: ut.load("demo"),
    "folder": lambda net, x, run: ut.images.Folder(ut.images.demo_photographs()["coffee"].parent),
    "schedule": lambda net, x, run: ut.Schedule(epoch=list(range(5_000)), epochs=5_000),
    "region": lambda net, x, run: ut.targets.where(np.eye(31), 1),
    "names of sites": lambda net, x, run: run.sites,
    "calls": lambda net, x, run: ut.trace(net, x).calls,
    "classes": lambda net, x, run: ut.load("demo").classes,
    "edges": lambda net, x, run: ut.derive.Network.layered([30, 30]).edges,
    "photographs": lambda net, x, run: RecordedPhotographs(failed=[("a.png", "is empty")] * 5_000),
}


@pytest.mark.parametrize("name", THINGS)
def test_everything_shows_itself(name, net, x, run):
    check_shown(THINGS[name](net, x, run))


def test_of_a_thousand_all_fits_on_a_screen_and_what_is_left_out_is_said(tmp_path):
    model, batch = deep(1_000), torch.ones(1_000, 2)
    traced = ut.trace(model, batch[:2])
    for thing in (traced, traced.table(), ut.select(model, "linear")):
        assert "970 more rows" in check_shown(thing).text
        assert "990 more rows" in repr(thing)
    blocks = ut.derive.from_model(model, batch[:2])
    for thing in (blocks, blocks.blocks, blocks.edges, traced.calls):
        check_shown(thing)
    check_shown(blocks.derivative("0"))
    attribution = ut.explain(model.eval(), batch, rule="gradient")
    assert "970 more rows" in check_shown(attribution).text
    many = ut.explain(torch.nn.Flatten(), torch.ones(1_000, 3, 40, 40), rule="gradient", target="top:2")
    assert "the first 8" in check_shown(many).text
    check_shown(ut.derive.Network.layered([40, 40, 1]).derivative("x1"))
    faults = tuple(Fault(f"{i}.parquet", "is missing", 1, "restore it from a copy") for i in range(1_000))
    check = ut.runs.Check("run", True, 1, 1, 1, 0, faults, ("a",) * 1_000, ())
    for thing in (check, check.faults, check.orphans):
        check_shown(thing)
    failures = tuple(Failure(i, f"{i}.png", "is empty") for i in range(1_000))
    status = SweepStatus("sweep", "explain", "demo", 2_000, 1_000, 1_000, 0, 4, 4, 2.5, 0.0, failures)
    assert "970 more rows" in check_shown(status).text
    check_shown(SweepCheck("sweep", 9, 0, dict.fromkeys(range(1_000), HOSTILE), ("a",) * 1_000))
    findings = [ut.Finding("noise", "warning", ("a",) * 1_000, "it is " * 400, {"a": list(range(9_999))})] * 1_000
    check_shown(ut.diagnosis.Findings(findings, {}))
    check_shown(findings[0])


def test_of_a_thousand_sites_the_first_are_drawn():
    site = ut.runs.SiteQuantiles("conv", "backward", "magnitude", (0.1, 0.5), (1.0, 2.0), 9, 1, 0, {})
    reader = check_shown(ut.runs.Quantiles([site] * 1_000))
    assert "the first 8 sites" in reader.text
    assert len([tag for tag, _ in reader.elements if tag == "img"]) == 1


def test_no_name_acts(net, x, run):
    network = torch.nn.Sequential()
    name = HOSTILE.replace(".", "")
    network.add_module(name, torch.nn.Flatten())
    network.add_module("b", torch.nn.Linear(3 * 16 * 16, 5))
    network.eval()
    named = ut.explain(net, x, target=0)
    attribution = ut.Attribution(named.values, named.targets, named.scores, HOSTILE, names={0: HOSTILE})
    findings = ut.diagnosis.Findings([ut.Finding(HOSTILE, "error", (HOSTILE,), HOSTILE, {HOSTILE: HOSTILE})], {})
    site = ut.runs.SiteQuantiles(HOSTILE, HOSTILE, "magnitude", (0.5,), (1.0,), 9, 1, 0, {HOSTILE: HOSTILE})
    blocks = ut.derive.from_model(network, x)
    things = [attribution, ut.trace(network, x), ut.trace(network, x)[0], findings, findings[0], site, blocks]
    things += [ut.runs.Quantiles([site]), blocks.derivative(name), ut.trust(net, x[:1], names=[HOSTILE] * 5)]
    things += [ut.select(network, "Flatten"), ut.runs.Check(HOSTILE, True, 1, 1, 1, 0, (), (HOSTILE,), ())]
    for thing in things:
        check_shown(thing)
    assert "onerror" in check_shown(attribution).text, "a name is shown, not dropped"


class Broken(Shown):
    def _shown(self):
        yield "the title"
        yield Pictures(lambda: 1 / 0)
        yield from ()
        raise ut.RunError("run/manifest.json has changed")


def test_what_fails_is_told_and_the_rest_is_shown():
    assert repr(Broken()).split("\n") == ["the title", "Broken: run/manifest.json has changed"]
    text = check_shown(Broken()).text
    assert "the title" in text
    assert "no picture: division by zero" in text
    assert "has changed" in text


def test_a_run_that_is_damaged_says_so(net, x):
    run = ut.Run(record(net, x))
    for part in (run.folder / "batches").iterdir():
        part.unlink()
    assert re.fullmatch(r"Run: .*/batches/.* is missing.*", repr(ut.Run(run.folder)))
    assert "is missing" in check_shown(ut.Run(run.folder)).text


def test_without_matplotlib_tables_remain(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for thing in (run.quantiles([0.5]), ut.compare([run, run])):
        reader = check_shown(thing)
        assert "needs matplotlib" in reader.text
        assert "median" in reader.text or "50 %" in reader.text


def test_nothing_runs_the_model_again(net, x, run):
    calls = []
    counted = net.register_forward_hook(lambda *_: calls.append(1))
    things = [THINGS[name](net, x, run) for name in ("attribution", "trace", "verdict", "blocks", "sites")]
    before = len(calls)
    for thing in things:
        repr(thing), thing._repr_html_()
    counted.remove()
    assert len(calls) == before


# --- attributions of every kind


def attributions(net):
    embed = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Flatten(), torch.nn.Linear(20, 3)).eval()
    mean = {"rule": "gradient", "target": lambda out: out}
    ids, images, grey = torch.arange(10).view(2, 5) % 9, torch.rand(2, 3, 16, 16), torch.rand(1, 1, 9, 30)
    pair = {"image": images, "age": torch.rand(2, 2)}
    return {
        "one target": (ut.explain(net, images), 2),
        "several targets": (ut.explain(net, images, target="top:3"), 6),
        "at a layer": (ut.explain(net, images, at="0"), 2),
        "a dict": (ut.explain(lambda image, age: net(image).sum(1) + age.sum(1), pair, **mean), 2),
        "grey": (ut.explain(lambda v: v.mean((1, 2, 3)), grey, **mean), 1),
        "video": (ut.explain(lambda v: v.mean((1, 2, 3, 4)), torch.rand(1, 3, 9, 8, 8), **mean), 4),
        "tokens": (ut.explain(embed, ids, rule="gradient", at="0"), 0),
        "features": (ut.explain(torch.nn.Linear(7, 3), torch.rand(2, 7), rule="gradient"), 0),
        "lines": (ut.explain(lambda v: v.mean((1, 2)), torch.rand(2, 3, 50), **mean), 0),
    }


def test_attributions_show_maps_as_pictures_and_all_else_by_its_strongest_positions(net):
    for name, (attribution, count) in attributions(net).items():
        reader = check_shown(attribution)
        shown = pictures(attribution._repr_html_())
        assert len(shown) == count, name
        assert ("strongest" in reader.text) == (count == 0 or name == "a dict"), name
        assert (attribution._repr_png_() is None) == (count == 0), name
        assert all(max(picture.size) == 128 for picture in shown), name


def test_a_list_of_images_shows_each():
    class Detector(torch.nn.Module):
        def forward(self, images):
            return torch.stack([image.relu().mean((1, 2)) for image in images])

    images = [torch.randn(3, 8, 9), torch.randn(3, 7, 6)]
    for target, count in (0, 2), ("top:2", 4):
        attribution = ut.explain(Detector().eval(), images, rule="gradient", target=target)
        assert len(pictures(attribution._repr_html_())) == count


def test_the_strongest_positions_are_those_of_numpy():
    values = np.array([[0.5, -3.0, 1.0, 2.0]])
    attribution = ut.Attribution(values, np.array([1]), np.array([0.25]), "gradient")
    assert "[1] -3, [3] 2, [2] 1, [0] 0.5" in repr(attribution)
    tokens = np.array([[[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]]])
    at = ut.Attribution(tokens, np.array([1]), np.array([0.25]), "gradient", at=("embedding",))
    assert "[2] 10, [0] 5, [1] 1" in repr(at)


def test_a_tile_is_brightest_where_the_map_is_strongest():
    values = np.zeros((1, 3, 4, 8))
    values[0, 1, 1, 6] = -5
    attribution = ut.Attribution(values, np.array([7]), np.array([0.5]), "gradient", names={7: "otter"})
    (picture,) = pictures(attribution._repr_html_())
    assert picture.size == (128, 64)
    grey = np.asarray(picture.convert("L"))
    assert np.unravel_index(grey.argmax(), grey.shape) == (16, 96)
    assert (grey > 128).sum() == 16 * 16
    assert "otter (7)" in check_shown(attribution).text
    with Image.open(BytesIO(attribution._repr_png_())) as strip:
        assert strip.size == (128, 64)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_maps_that_are_not_finite_are_shown(value):
    values = np.ones((1, 3, 4, 4))
    values[0, 0, 0] = value
    check_shown(ut.Attribution(values, np.array([0]), np.array([value]), "gradient"))
    flat = ut.Attribution(values.reshape(1, -1), np.array([0]), np.array([value]), "gradient")
    assert str(value) in repr(flat)


def test_odd_attributions_are_shown():
    nothing = ut.Attribution(None, None, np.zeros(2), "gradient")
    empty = ut.Attribution(np.zeros((0, 3, 4, 4)), np.zeros(0, int), np.zeros(0), "gradient")
    half = ut.Attribution(torch.ones(1, 3, 8, 8, dtype=torch.bfloat16), torch.tensor([0]), torch.ones(1), "gradient")
    closed = ut.Attribution("no array", None, None, "gradient")
    for attribution in (nothing, empty, half, closed):
        check_shown(attribution)


def test_class_names_are_kept_on_the_disk(tmp_path):
    a = ut.Attribution(np.ones((1, 2)), np.array([3]), np.array([0.5]), "guided", names={3: "otter"})
    assert ut.Attribution.load(a.save(tmp_path / "a.safetensors")).names == {3: "otter"}


def test_a_classifier_names_what_it_explains():
    classifier = ut.load("demo")
    a = ut.explain(classifier, classifier.prepare(ut.images.demo_photographs()["coffee"]), target="top:2")
    assert a.names[967] == "espresso"
    assert set(a.names) == set(a.targets[0].tolist())


def test_an_overlay_has_the_photograph_and_the_map():
    values = np.zeros((1, 1, 6, 5), np.float32)
    values[0, 0, 2, 3] = 1
    photograph = np.full((6, 5, 3), 200, np.uint8)
    attribution = ut.Attribution(values, np.array([0]), np.array([1.0]), "gradient")
    mixed = np.asarray(attribution.overlay(photograph))
    assert mixed.shape == (6, 5, 3)
    assert mixed[0, 0].tolist() == [120] * 3
    assert mixed[2, 3].tolist() == [252, 255, 164]
    with pytest.raises(ut.InputError, match="the photograph"):
        attribution.overlay(photograph[:4])


# --- lists that are still lists


def test_results_are_still_lists(run, net):
    quantiles = run.quantiles([0.5])
    assert isinstance(quantiles, list)
    assert quantiles == list(quantiles)
    assert type(quantiles[:1]) is type(quantiles)
    assert quantiles[0] == quantiles[:1][0]
    compared = ut.compare([run, run])[1:]
    assert compared.runs == (str(run.folder),) * 2
    findings = ut.diagnose(run)
    assert findings[:0].checked == findings.checked
    assert [*ut.select(net, "conv")] == ut.select(net, "conv")
    assert repr(Rows()) == "[]"
    assert repr(run.sites) == "['0', '3']"
    assert len(repr(Rows(map(str, range(9_999))))) < SCREEN
    calls = ut.trace(net, torch.zeros(1, 3, 16, 16)).calls
    assert isinstance(calls, tuple)
    assert calls == (*calls,)


def test_plots_are_figures_that_show_themselves_and_can_be_written(run, tmp_path):
    quantiles, compared = run.quantiles([0.1, 0.5, 0.9]), ut.compare([run, run], [0.1, 0.5])
    for i, thing in enumerate((quantiles, compared, ut.derive.Network.parse("x1>n1 n1>n2").derivative("n1"))):
        figure = thing.plot(tmp_path / f"{i}.png", ground="dark")
        for file in (tmp_path / f"{i}.png", BytesIO(figure._repr_png_())):
            with Image.open(file) as picture:
                assert picture.width > 100
                assert len(np.unique(np.asarray(picture.convert("L")))) > 10
    lines = [line for axis in compared.plot(panels="layer").axes for line in axis.lines if len(line.get_xdata()) > 1]
    assert [line.get_ydata().tolist() for line in lines[::2]] == [list(row.quantiles[0].values) for row in compared]
    with pytest.raises(ut.InputError, match="must end in"):
        quantiles.plot(tmp_path / "a.bmp")


def test_a_run_draws_its_quantiles(run, tmp_path):
    figure = run.plot(tmp_path / "q.svg", [0.5, 0.9])
    assert (tmp_path / "q.svg").stat().st_size > 1000
    assert [axis.get_title() for axis in figure.axes] == ["50 % quantile", "90 % quantile"]
    assert len(figure.axes[0].patches) == len(run.quantiles([0.5]))


def test_a_verdict_is_a_picture(net, x):
    verdict = ut.trust(net, x[:1])
    assert verdict.image().width == 1350
    photograph = np.full((16, 16, 3), 250, np.uint8)
    axes = verdict.plot(photograph=Image.fromarray(photograph)).axes
    shown = [axis.images[0].get_array() for axis in axes if axis.images]
    assert np.array_equal(shown[0], photograph)
    assert len(shown) == 1 + len([axis for axis in verdict.plot().axes if axis.images])
    with pytest.raises(ut.InputError, match="no map"):
        ut.Verdict({}, {}, "", "", "", 0, "", 0, 0).plot()


# --- the renderer


def test_pictures_beyond_the_budget_are_left_out_and_that_is_said():
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    html = as_html([Pictures(lambda: [(str(i), Image.fromarray(noise)) for i in range(5)])])
    assert 0 < len(pictures(html)) < 5
    assert "left out, to stay small" in check_static(html).text


def test_numbers_are_set_to_the_right_and_marks_have_their_word():
    html = as_html([ShownTable(("a", "b"), [("x", "1,000"), (Mark("bad", "#D55E00"), "-")], 2)])
    reader = check_static(html)
    sides = [a["style"].partition(";")[0] for tag, a in reader.elements if tag == "td"]
    assert sides == ["text-align:left", "text-align:right"] * 2
    names = read(as_html([ShownTable(("site", "zeros"), [("0", "1"), ("4", "2")], 2)])).elements
    assert [a["style"].partition(";")[0] for tag, a in names if tag == "td"] == sides
    assert "bad" in reader.text


def test_a_picture_keeps_its_colours_on_its_way_into_a_cell():
    rng = np.random.default_rng(0)
    photograph = rng.integers(60, 200, (120, 120, 3)).astype(np.uint8)  # more colours than a palette has
    photograph[:, 50:53] = 0, 114, 178
    shown = np.asarray(Image.open(BytesIO(display.png(Image.fromarray(photograph)))).convert("RGB"))
    assert np.abs(shown[:, 50:53].astype(int) - photograph[:, 50:53]).max() < 40


def test_text_never_exceeds_a_screen():
    wide = ShownTable(["column " * 9] * 40, [["cell " * 90] * 40] * 90, 90)
    parts: list[Part] = ["word " * 900, "x" * 9_000, wide, *["line"] * 90]
    assert len(as_text(parts)) < SCREEN
    assert as_text(parts).endswith("...")
