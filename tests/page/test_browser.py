"""The page in Debian's Chromium: every control is used, and what it shows is held to the data."""

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import undertow as ut
from page.making import command, recorded, small_net, write_nets
from undertow.runs.quantiles import OF, default_of
from undertow.show import heatmap

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("browser")]

CLASSES = ["cat", "coffee cup", "rocket", "tripod"]
BFLOAT16 = 2.0**-7


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two photographs under two rules and two classes, judged; a watched run; a traced network; a text."""
    folder = tmp_path_factory.mktemp("page")
    photographs = ut.images.demo_photographs()
    command("explain", photographs["chelsea"], photographs["coffee"], "--model", write_nets(folder, CLASSES),
            "--target", "top:2", "--rule", "gradient", "--rule", "guided", "--trust",
            "--out", folder / "maps")  # fmt: skip
    run = recorded(folder / "first", small_net(), diagnose=1)
    net, x = small_net(), torch.randn(2, 1, 10, 10, generator=torch.Generator().manual_seed(1))
    trace = ut.trace(net, x)
    text = ut.Text(["The", " cat", " sat"], [0.5, 2.0, -2.0], title="positive, 0.98")
    blocks = ut.derive.from_model(net, x)
    path = ut.report(folder / "maps", run, (blocks, trace), text, path=folder / "page.html", title="a page")
    return SimpleNamespace(path=path, maps=folder / "maps", run=run, trace=trace, text=text, blocks=blocks)


def card(page, name):
    return page.locator("#explanations article").filter(has=page.get_by_role("heading", name=name))


def facts_of(made, name):
    return json.loads((made.maps / Path(name).stem / "result.json").read_text())


def map_of(made, name, rule, k):
    return ut.Attribution.load(made.maps / Path(name).stem / f"{rule}.safetensors").map(0, k)


def pixels(card):
    """The canvas of a card, (H, W, 4)."""
    canvas = card.locator("canvas")
    size = canvas.evaluate("c => [c.height, c.width, 4]")
    data = canvas.evaluate("c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]")
    return np.array(data, np.int64).reshape(size)


def slide(page, percent):
    page.get_by_label("Map over photograph").fill(str(percent))


def choose(page, rule=None, style=None, target=None):
    if rule:
        page.get_by_role("group", name="Rule").get_by_label(rule).check()
    if style:
        page.get_by_role("group", name="Drawn as").get_by_label(style).check()
    if target is not None:
        page.get_by_role("combobox", name="Class").select_option(str(target))
    page.wait_for_timeout(50)


def shows(card, text):
    card.locator("p").filter(has=card.page.locator(".note")).filter(has_text=text).first.wait_for()


# explanations


@pytest.mark.parametrize("style", ["magnitude", "signed", "colour"])
def test_a_canvas_has_the_pixels_that_python_draws(made, opened, style):
    page = opened(made.path)
    one = card(page, "chelsea.png")
    slide(page, 100)
    for rule in ("gradient", "guided"):
        for k in (0, 1):
            choose(page, rule, style, k)
            shows(one, rule)
            got = pixels(one)
            expected = np.asarray(heatmap.draw(map_of(made, "chelsea.png", rule, k), style).convert("RGB"), np.int64)
            # bfloat16 is within 2⁻⁷ of a value, and the steepest ramp has 75 levels in a seventh of the scale
            assert np.abs(got[..., :3] - expected).max() <= 525 * BFLOAT16 + 1
            assert np.abs(got[..., :3] - expected).mean() < 1
            assert (got[..., 3] == 255).all()


def test_the_opacity_lets_the_photograph_through_where_the_map_is_weak(made, opened):
    page = opened(made.path)
    one = card(page, "coffee.png")
    strength = heatmap.magnitude(map_of(made, "coffee.png", "gradient", 0))
    for percent in (0, 30, 65, 100):
        slide(page, percent)
        page.wait_for_timeout(50)
        expected = 255 * (percent / 100) ** (1 + 3 * (1 - np.sqrt(strength)))
        assert np.abs(pixels(one)[..., 3] - expected).max() <= 4


def test_pointer_and_arrow_keys_read_the_values_of_a_pixel(made, opened):
    page = opened(made.path)
    one = card(page, "chelsea.png")
    values = map_of(made, "chelsea.png", "gradient", 0)
    canvas, probe = one.locator("canvas"), one.locator("output")
    box = canvas.bounding_box()

    def read():
        x, y, largest, total = re.fullmatch(
            r"x (\d+), y (\d+): largest \|value\| (\S+), sum (\S+)", probe.inner_text()
        ).groups()
        number = [float(text.replace("−", "-")) for text in (largest, total)]
        column = values[:, int(y), int(x)]
        assert number[0] == pytest.approx(np.abs(column).max(), rel=0.02)
        assert number[1] == pytest.approx(column.sum(), rel=0.02, abs=0.02 * float(np.abs(column).max()))
        return int(x), int(y)

    canvas.hover(position={"x": box["width"] * (7.5 / 40), "y": box["height"] * (11.5 / 40)})
    assert read() == (7, 11)
    canvas.focus()
    for key, place in [("ArrowRight", (8, 11)), ("ArrowDown", (8, 12)), ("ArrowUp", (8, 11)), ("ArrowLeft", (7, 11)),
                       ("Shift+ArrowDown", (7, 21)), ("Shift+ArrowLeft", (0, 21))]:  # fmt: skip
        page.keyboard.press(key)
        assert read() == place


def test_downloads_are_the_map(made, opened):
    page = opened(made.path)
    one = card(page, "coffee.png")
    choose(page, "guided", "signed", 1)
    shows(one, "guided")
    name = facts_of(made, "coffee.png")["targets"][1]["name"]
    with page.expect_download() as waiting:
        one.get_by_role("button", name="Download values").click()
    assert waiting.value.suggested_filename == f"coffee.png-guided-{name.replace(' ', '_')}.npy"
    values, expected = np.load(waiting.value.path()), map_of(made, "coffee.png", "guided", 1)
    assert (values.dtype, values.shape) == (np.float32, expected.shape)
    assert np.abs(values - expected).max() <= BFLOAT16 * np.abs(expected).max()
    assert (np.abs(values - expected) <= BFLOAT16 * np.abs(expected) + 1e-38).all()
    slide(page, 100)
    with page.expect_download() as waiting:
        one.get_by_role("button", name="Download PNG").click()
    picture = np.asarray(Image.open(io.BytesIO(waiting.value.path().read_bytes())).convert("RGB"), np.int64)
    assert np.abs(picture - np.asarray(heatmap.draw(expected, "signed"), np.int64)).mean() < 1


def test_predictions_are_bars_as_long_as_their_probability(made, opened):
    page = opened(made.path)
    for name in ("chelsea.png", "coffee.png"):
        facts = facts_of(made, name)["predictions"]
        rows = card(page, name).locator(".predictions li")
        assert rows.count() == len(facts)
        for row, fact in zip(rows.all(), facts, strict=True):
            text, percent = row.locator("span").all_inner_texts()
            assert text == fact["name"]
            assert float(percent.removesuffix(" %")) == pytest.approx(100 * fact["probability"], rel=0.01)
            width = row.evaluate("li => parseFloat(getComputedStyle(li, '::before').width) / li.clientWidth")
            assert width == pytest.approx(fact["probability"], abs=0.01)


def test_a_verdict_stands_by_the_map_that_it_is_of_and_by_no_other(made, opened):
    page = opened(made.path)
    for name in ("chelsea.png", "coffee.png"):
        one = card(page, name)
        facts = facts_of(made, name)
        for rule in ("gradient", "guided"):
            sentence = facts["verdicts"][rule]["sentence"].replace("*", "")
            for k in (0, 1):
                choose(page, rule, target=k)
                shows(one, rule)
                said = one.locator(".verdict").inner_text()
                judged = facts["targets"][k]["class"] == facts["verdicts"][rule]["target"]
                assert (
                    said
                    == f"May it be believed? {sentence if judged else 'Not asked of this class' + chr(39) + 's map.'}"
                )
                assert one.locator("p b").first.inner_text() == facts["targets"][k]["name"]
        choose(page, "gradient", target=0)
        shows(one, "gradient")
        one.get_by_text("the answers to each question").click()
        answers = facts["verdicts"]["gradient"]["answers"]
        for question, answer in answers.items():
            assert one.locator("dt").filter(has_text=question).inner_text() == f"{question} {answer['level']}"
            assert one.get_by_text(answer["sentence"], exact=True).is_visible()


# gradients


def chart(page, heading):
    return page.locator("#gradients h3", has_text=heading).locator(
        "xpath=following-sibling::div[contains(@class, 'chart')]"
    )


def drawn(chart, kind):
    """The data of what is drawn in a chart: of all marks of a kind, from Vega's scene graph."""
    return chart.evaluate(
        """(area, kind) => {
        const found = [];
        const walk = (mark, x, y) => {
          for (const item of mark.items ?? []) {
            if (mark.marktype === "group") {
              for (const inner of item.items) walk(inner, x + (item.x ?? 0), y + (item.y ?? 0));
            }
            else if (mark.marktype === kind && mark.role === "mark" && item.datum) {
              const b = item.bounds;
              const place = { _x: x + (b.x1 + b.x2) / 2, _y: y + (b.y1 + b.y2) / 2, _high: b.y2 - b.y1 };
              found.push({ ...item.datum, ...place });
            }
          }
        };
        const view = area.firstChild.view;
        const [x, y] = view.origin();
        walk(view.scenegraph().root, x, y);
        return found;
    }""",
        kind,
    )


def layer_select(page):
    return page.get_by_role("combobox", name="Layer")


def settled(page):
    page.wait_for_timeout(300)


def test_layers_are_drawn_from_their_quantiles(made, opened):
    page = opened(made.path)
    q = (0.05, 0.25, 0.5, 0.75, 0.95)
    expected = {one.label: one for one in made.run.quantiles(q)}
    layers = chart(page, "Each layer")
    rules = drawn(layers, "rule")
    assert [row["layer"] for row in rules] == list(expected)
    for row in rules:
        one = expected[row["layer"]]
        assert [row[f"q{k}"] for k in range(5)] == list(one.values)
        assert row["zeros"] == one.zeros / one.count
    page.locator("#gradients").get_by_text("as a table").first.click()
    page.get_by_role("region", name="quantiles of each layer").wait_for()
    rows = page.get_by_role("region", name="quantiles of each layer").locator("tbody tr")
    for row, one in zip(rows.all(), expected.values(), strict=True):
        cells = row.locator("td").all_inner_texts()
        assert cells[0] == one.label
        for cell, value in zip(cells[1:6], one.values, strict=True):
            assert float(cell.replace("−", "-")) == pytest.approx(value, rel=1e-3)


def test_log_and_linear_scales(made, opened):
    page = opened(made.path)
    layers = chart(page, "Each layer")
    by_name = lambda: {row["layer"]: row for row in drawn(layers, "rule")}  # noqa: E731
    before = by_name()
    page.get_by_role("group", name="Scale").get_by_label("linear").check()
    settled(page)
    after = by_name()
    assert before.keys() == after.keys()
    # on a linear axis lengths are as the values; on a logarithmic one the small are seen
    lengths = np.array([after[name]["_high"] - 2 for name in after])  # bounds are by half a stroke wider
    spans = np.array([after[name]["q4"] - after[name]["q0"] for name in after])
    assert np.allclose(lengths, spans / spans.max() * lengths.max(), atol=3)
    assert min(row["_high"] for row in before.values()) > lengths.min()


def test_a_layer_is_chosen_by_select_by_click_and_by_a_findings_button(made, opened):
    page = opened(made.path)
    labels = made.run.sites
    layer_select(page).select_option(labels[3])
    page.get_by_role("heading", name=f"{labels[3]}: |value| over time").wait_for()
    layers = chart(page, "Each layer")
    target = next(row for row in drawn(layers, "rule") if row["layer"] == labels[6])
    layers.scroll_into_view_if_needed()
    layers.click(position={"x": target["_x"], "y": target["_y"]})
    page.get_by_role("heading", name=f"{labels[6]}: |value| over time").wait_for()
    assert layer_select(page).input_value() == labels[6]
    finding = page.locator(".finding").filter(has_text="pooling").first
    button = finding.get_by_role("button").first
    site = button.inner_text()
    button.click()
    page.get_by_role("heading", name=f"{site}: |value| over time").wait_for()
    assert layer_select(page).input_value() == site


def test_a_layers_charts_are_what_was_recorded(made, opened):
    page = opened(made.path)
    site = made.run.sites[3]
    layer_select(page).select_option(site)
    settled(page)
    by_batch = [one for one in made.run.quantiles((0.05, 0.25, 0.5), by=("epoch", "batch")) if one.site == site]
    line = sorted(drawn(chart(page, "over time").first, "symbol"), key=lambda row: row["t"])
    assert [row["q2"] for row in line] == pytest.approx([one.values[2] for one in by_batch], rel=BFLOAT16)
    rows = [row for row in made.run.table("histogram").to_pylist() if row["site"] == site]
    counts: dict[int, int] = {}
    total = zeros = 0
    for row in rows:
        for code, count in zip(row["codes"], row["counts"], strict=True):
            value = float(np.uint32(code << 16).view(np.float32))
            total += count
            if value:
                octave = int(np.floor(np.log2(abs(value))))
                counts[octave] = counts.get(octave, 0) + count
            else:
                zeros += count
    shares: dict[int, float] = {}
    for row in drawn(chart(page, "histogram of |value|"), "rect"):
        octave = round(np.log2(row["low"]))
        shares[octave] = shares.get(octave, 0) + row["share"]
    assert {octave: share for octave, share in shares.items() if share} == pytest.approx(
        {octave: count / total for octave, count in counts.items()}
    )
    assert (
        f"{100 * zeros / total:.3g} % exactly zero" in page.locator("h3", has_text="histogram of |value|").inner_text()
    )
    cells = drawn(chart(page, "histogram over time"), "rect")
    assert {cell["t"] for cell in cells} == {0, 1, 2, 3}


def test_channels_are_sorted_by_number_and_by_norm(made, opened):
    page = opened(made.path)
    site = made.run.sites[0]
    rows = [row["values"] for row in made.run.table("channel_norm").to_pylist() if row["site"] == site]
    expected = np.mean(rows, 0)
    for word, order in (("number", np.arange(len(expected))), ("norm", np.argsort(-expected))):
        page.get_by_role("group", name="Channels by").get_by_label(word).check()
        settled(page)
        bars = sorted(drawn(chart(page, "mean norm of each channel"), "rect"), key=lambda row: row["_x"])
        assert [row["channel"] for row in bars] == order.tolist()
        assert [row["norm"] for row in bars] == pytest.approx(expected[order].tolist(), rel=BFLOAT16)


def test_findings_stand_at_their_layers_with_prediction_and_remedy(made, opened):
    page = opened(made.path)
    findings = ut.diagnose(made.run)
    assert findings
    for finding in findings:
        one = page.locator(".finding").filter(has_text=finding.sentence)
        assert finding.remedy in one.inner_text()
        if finding.evidence.get("predicted") is not None:
            assert "predicted" in one.inner_text()
    pins = {row["layer"]: row["findings"] for row in drawn(chart(page, "Each layer"), "text") if "findings" in row}
    for site in findings[0].sites:
        assert findings[0].cause in pins[site]
    page.get_by_text("what was checked, and what could not be").click()
    for rule, state in findings.checked.items():
        assert page.locator(".findings").get_by_text(rule if state == "checked" else state).first.is_visible()


# flow, text, theme, print


def test_a_block_tells_the_numbers_of_its_trace(made, opened):
    page = opened(made.path)
    network = page.locator("#flow article").filter(has=page.get_by_role("heading", name="the network"))
    assert network.locator("path").count() == len(made.blocks.edges)
    for number, row in enumerate(made.trace.table()):
        node = network.get_by_role("button", name=re.compile(f"^{row.name} "))
        if number % 2:
            node.focus()
            page.keyboard.press("Enter" if number % 4 == 1 else "Space")
        else:
            node.click()
        assert node.get_attribute("aria-pressed") == "true"
        assert network.locator("[aria-pressed=true]").count() == 1
        cells = network.locator(".detail dt, .detail dd").all_inner_texts()
        told = dict(zip(cells[::2], cells[1::2], strict=True))
        assert told["input"] == " × ".join(map(str, row.input_shape))
        assert told["output"] == " × ".join(map(str, row.output_shape))
        assert float(told["gradient by output"].replace("−", "-")) == pytest.approx(row.output_gradient, rel=1e-3)
        assert float(told["gradient by input"].replace("−", "-")) == pytest.approx(row.input_gradient, rel=1e-3)
        assert told["closed formula"] == row.formula
    widths = [float(path.get_attribute("stroke-width")) for path in network.locator("path").all()]
    norms = [edge.norm for edge in made.blocks.edges]
    assert np.argsort(widths, kind="stable").tolist() == np.argsort(norms, kind="stable").tolist()


def test_tokens_are_shaded_by_their_value(made, opened):
    page = opened(made.path)
    tokens = page.locator(".tokens span").all()
    assert [one.text_content() for one in tokens] == made.text.tokens
    red, blue = [], []
    for one in tokens:
        r, _, b = map(int, re.findall(r"\d+", one.evaluate("e => getComputedStyle(e).backgroundColor"))[:3])
        red.append(r - b)
        blue.append(b - r)
    assert np.argmax(red) == 1
    assert np.argmax(blue) == 2
    page.locator("#text").get_by_text("as a table").click()
    page.get_by_role("region", name="tokens").wait_for()
    assert page.get_by_role("region", name="tokens").locator("tbody tr").all_inner_texts() == [
        '"The"\t0.5', '" cat"\t2', '" sat"\t−2',
    ]  # fmt: skip


def test_light_and_dark_as_the_system_says_or_as_one_chooses(made, opened):
    for scheme in ("light", "dark"):
        page = opened(made.path, color_scheme=scheme)
        other = {"light": "dark", "dark": "light"}[scheme]
        theme = "document.documentElement.dataset.theme"
        ground = "getComputedStyle(document.body).backgroundColor"
        assert page.evaluate(theme) == scheme
        before = page.evaluate(ground)
        page.get_by_role("button", name="Light or dark").click()
        assert page.evaluate(theme) == other
        assert page.evaluate(ground) != before
        for now in (other, scheme):
            page.emulate_media(color_scheme=now)
            page.wait_for_function(f"matchMedia('(prefers-color-scheme: {now})').matches")
            page.evaluate(
                "new Promise((then) => requestAnimationFrame(() => requestAnimationFrame(then)))"
            )  # it is told
            page.wait_for_function(f"{theme} === {now!r}")


def test_sections_are_reached_by_their_links(made, opened):
    page = opened(made.path)
    for name in ("Explanations", "Gradients", "Flow", "Text", "How it was made"):
        page.get_by_role("navigation").get_by_role("link", name=name).click()
        assert page.get_by_role("heading", name=name, exact=True).is_visible()
        assert page.evaluate("location.hash.length") > 1
    assert page.locator("#made").get_by_text("torch").first.is_visible() or page.locator("#made summary").count() > 2
    for summary in page.locator("#made summary").all():
        if not summary.evaluate("s => s.parentElement.open"):
            summary.click()
    assert ut.__version__ in page.locator("#made").inner_text()
    assert facts_of(made, "chelsea.png")["weights_sha256"] in page.locator("#made").inner_text()


def test_it_prints_light_and_whole(made, opened):
    page = opened(made.path, color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator(".controls").first.is_visible()
    page.emulate_media(media="screen")
    pdf = page.pdf()
    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 50_000


# keyboard, accessibility, small screens


def test_the_keyboard_alone_reaches_and_uses_everything(made, opened):
    page = opened(made.path)
    can_be_used = "a[href], button:not([disabled]), select, input:not([type=radio]), summary, [tabindex='0']"
    wanted = page.evaluate(
        f"[...document.querySelectorAll({can_be_used!r})].filter(e => e.getClientRects().length).length"
    )
    radios = page.evaluate("new Set([...document.querySelectorAll('input[type=radio]')].map(e => e.name)).size")
    page.evaluate("document.body.focus()")
    reached, faint = set(), []
    for _ in range(wanted + radios + 20):
        page.keyboard.press("Tab")
        number, seen, what = page.evaluate("""() => {
            const e = document.activeElement; window.order ??= [];
            if (e === document.body) return [-1, true, ""];
            if (!window.order.includes(e)) window.order.push(e);
            const style = getComputedStyle(e.matches("g") ? e.querySelector("rect") : e);
            const outlined = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
            const seen = e.matches("g") ? style.strokeWidth === "3px" : outlined;
            return [window.order.indexOf(e), seen, e.outerHTML.slice(0, 90)];
        }""")
        reached.add(number)
        if not seen:
            faint.append(what)
    assert len(reached - {-1}) >= wanted + radios
    assert faint == []
    page.get_by_role("radio", name="gradient", exact=True).focus()
    page.keyboard.press("ArrowRight")
    shows(card(page, "chelsea.png"), "guided")
    page.get_by_label("Map over photograph").focus()
    before = pixels(card(page, "chelsea.png"))
    page.keyboard.press("Home")
    page.wait_for_timeout(100)
    assert pixels(card(page, "chelsea.png"))[..., 3].sum() < before[..., 3].sum()
    layer_select(page).focus()
    page.keyboard.press("ArrowDown")
    page.get_by_role("heading", name=f"{made.run.sites[1]}: |value| over time").wait_for()
    page.get_by_role("button", name="Light or dark").focus()
    page.keyboard.press("Space")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


@pytest.mark.parametrize("width", [360, 768, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_and_nothing_is_too_wide(made, opened, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page = opened(made.path, viewport={"width": width, "height": 800}, color_scheme=scheme)
    for summary in page.locator("summary").all():
        summary.click()
    found = Axe().run(page).response["violations"]
    assert [(one["id"], [node["html"][:120] for node in one["nodes"]]) for one in found
            if one["impact"] in ("serious", "critical")] == []  # fmt: skip
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.body.scrollWidth") <= width


# names that would like to be more than names

MARKUP = "</script><img src=x onerror=alert(1)>"
NAMES = [MARKUP, "[red]", "{{7*7}}", "${alert(1)}", "a\u2028b", "חתול", "long " * 60, "datum['q0']", "a[0]"]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    from collections import OrderedDict

    named = {name.replace(".", "·"): nn.Linear(4, 4) for name in NAMES}
    net = nn.Sequential(OrderedDict(inner=nn.Sequential(OrderedDict(named)), end=nn.Linear(4, 2)))
    runs = [recorded(folder / name.replace("/", "⁄")[:80], net, shape=(3, 4), sites="linear", diagnose=1)
            for name in (MARKUP, "{{7*7}} ${alert(1)}\u2028")]  # fmt: skip
    x = torch.randn(1, 4)
    photograph = Image.open(ut.images.demo_photographs()["coffee"]).resize((40, 40))
    for name in ("<img src=x onerror=alert(1)>.png", "${alert(1)} {{7*7}}.png"):
        photograph.save(folder / name)
    command("explain", *folder.glob("*.png"), "--model", write_nets(folder, NAMES), "--target", "top:2",
            "--rule", "gradient", "--out", folder / "maps")  # fmt: skip
    text = ut.Text(NAMES, np.linspace(-1, 1, len(NAMES)), title=MARKUP)
    graph = (ut.derive.from_model(net, x, depth=2), ut.trace(net, x))
    path = ut.report(folder / "maps", *runs, graph, text, path=folder / "page.html", title=MARKUP)
    return SimpleNamespace(path=path, runs=runs, text=text)


@pytest.mark.parametrize("width", [360, 1440])
def test_names_are_shown_as_text_and_nothing_in_them_runs(hostile, opened, width):
    page = opened(hostile.path, viewport={"width": width, "height": 900})  # which fails on any dialog or error
    assert page.title() == MARKUP
    assert page.locator("h1").inner_text() == MARKUP
    assert page.locator("img:not([src^='data:'])").count() == 0
    options = layer_select(page).locator("option").all_text_contents()
    assert options == hostile.runs[0].sites
    for option in options:
        layer_select(page).select_option(option)
        settled(page)
        assert page.locator("h3", has_text="over time").first.text_content().startswith(option)
    layers = {row["layer"] for row in drawn(chart(page, "Each layer"), "rule")}
    assert layers == set(options)
    assert [one.text_content() for one in page.locator(".tokens span").all()] == NAMES
    shown = page.locator("#explanations").inner_text()
    assert "<img src=x onerror=alert(1)>.png" in shown
    assert "${alert(1)} {{7*7}}.png" in shown
    for node in page.locator("#flow g.node").all()[:12]:
        node.dispatch_event("click")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


# several runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of every kind, by a word each."""
    folder = tmp_path_factory.mktemp("runs")
    wide = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(192, 3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(wide.parameters(), 0.1)

    def learning(folder):
        with ut.record(folder, wide, sites="params", measures=["norm"], optimizer=optimizer) as recording:
            for _ in range(3):
                with recording.batch():
                    optimizer.zero_grad()
                    wide(torch.ones(2, 1, 10, 10)).square().mean().backward()
                    optimizer.step()
        return ut.Run(folder)

    def unfinished(folder):
        with pytest.raises(InterruptedError), ut.record(folder, small_net(), sites="**", measures=["histogram"]):
            raise InterruptedError
        return ut.Run(folder)

    return {
        "first": recorded(folder / "first", small_net()),
        "second": recorded(folder / "second", small_net(1), batches=7),
        "other names": recorded(folder / "other", wide),
        "channel norms": recorded(folder / "channels", small_net(), measures=["channel-norm"]),
        "moments": recorded(folder / "moments", small_net(), measures=["moments"]),
        "learning": learning(folder / "learning"),
        "both phases": recorded(folder / "phases", small_net(), phase="both"),
        "one batch": recorded(folder / "one", small_net(), batches=1),
        "empty": unfinished(folder / "empty"),
        "zero": recorded(folder / "zero", small_net(), scale=0.0),
        "infinite": recorded(folder / "infinite", small_net(), scale=float("inf")),
        "not a number": recorded(folder / "nan", small_net(), scale=float("nan")),
    }


@pytest.mark.parametrize(
    "chosen",
    [
        ["first", "second"], ["first", "other names"], ["first", "first"], ["channel norms"], ["moments"], ["learning"],
        ["both phases", "first"], ["one batch"], ["empty"], ["empty", "first"], ["zero"], ["infinite"],
        ["not a number"], ["first", "channel norms"], ["channel norms", "moments"],
        ["zero", "infinite", "not a number", "first"],
    ],
    ids=" + ".join,
)  # fmt: skip
def test_runs_of_every_kind_are_drawn_or_said_to_hold_nothing(runs, opened, tmp_path, chosen):
    path = ut.report(*(runs[name] for name in chosen), path=tmp_path / "page.html")
    page = opened(path)
    listed = page.locator(".runs li").all_inner_texts()
    for text, name in zip(listed, chosen, strict=True):
        assert runs[name].folder.name in text
        assert ("no batch yet" in text) == (name == "empty")
    what = default_of([runs[name] for name in chosen])
    expected = {}
    for i, name in enumerate(chosen):
        if OF[what] in runs[name].manifest["tables"] and name != "empty":
            expected |= {(i, one.label): one.values[0] for one in runs[name].quantiles((0.5,), of=what) if one.count}
        elif name != "empty":
            assert "to see it here" in listed[i]
    if not layer_select(page).count():
        assert page.get_by_text("Nothing that can be drawn was recorded yet.").is_visible()
        assert expected == {}
        return
    rows = drawn(chart(page, "Each layer"), "rule")
    assert len(rows) == len(expected)
    for row in rows:
        values = [
            value for (i, label), value in expected.items() if i == row["i"] and label in row["layer"].split(" / ")
        ]
        assert row["q2"] in values
    for scale in ("linear", "logarithmic"):
        page.get_by_role("group", name="Scale").get_by_label(scale).check()
    for option in layer_select(page).locator("option").all()[:4]:
        layer_select(page).select_option(option.get_attribute("value"))
        settled(page)
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
    settled(page)
