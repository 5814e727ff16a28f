"""Pictures of derivatives: what is drawn is what was derived."""

import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

from undertow.derive import Network, from_model
from undertow.show import graph

EXERCISE = "x1>n1 x2>n2 n1>n3 n1>n4 n2>n4 n2>n5 n3>n6 n4>n6 n4>n7 n5>n7"


def arrows(axis) -> dict[tuple[tuple[float, float], tuple[float, float]], str]:
    return {tuple(map(tuple, patch._posA_posB)): to_hex(patch.get_edgecolor()).upper() for patch in axis.patches}


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_way_of_a_weight_is_highlighted(tmp_path, ending):
    derivative = Network.parse(EXERCISE).derivative("w[2,5]")
    axis = derivative.plot(tmp_path / f"way.{ending}").axes[0]
    assert (tmp_path / f"way.{ending}").stat().st_size > 5000
    positions = {text.get_text().strip("$"): text.get_position() for text in axis.texts}
    colours_of = arrows(axis)
    colour = {
        (a, b): colours_of[positions[f"{a[0]}_{{{a[1]}}}"], positions[f"{b[0]}_{{{b[1]}}}" if b != "E" else "E"]]
        for a, b in (*(edge.split(">") for edge in EXERCISE.split()), ("n6", "E"), ("n7", "E"))
    }
    assert {edge for edge, shown in colour.items() if shown == graph.CARRYING} == {("n5", "n7"), ("n7", "E")}
    assert {edge for edge, shown in colour.items() if shown == graph.OWN} == {("n2", "n5")}
    partials = {text.get_text() for text in axis.texts if "partial" in text.get_text()}
    assert len(partials) == 3
    assert r"$\frac{\partial n_{5}}{\partial w_{2,5}}$" in partials
    assert "w_{2,5}" in axis.get_title()


def test_every_edge_leads_to_the_right_and_no_two_nodes_meet():
    for text in (EXERCISE, "x1>n1 n1>n2 n2>n3 x2>n3 n1>n3 n3>n4 n1>n4", "n1>n2 x1>n3 n2>n3"):
        axis = Network.parse(text).derivative("n2").plot().axes[0]
        assert all(start[0] < end[0] for start, end in arrows(axis))
        nodes = [t.get_position() for t in axis.texts if t.get_bbox_patch() and t.get_bbox_patch().get_linewidth() > 1]
        assert len(set(nodes)) == len(nodes)


def test_line_width_is_the_gradient_that_an_edge_carries(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    blocks = from_model(model, torch.randn(2, 3))
    derivative = blocks.derivative("1")
    axis = derivative.plot(tmp_path / "blocks.png", title="a title").axes[0]
    with Image.open(tmp_path / "blocks.png") as picture:
        assert picture.width > 400
    norms = [edge.norm for edge in blocks.edges]
    widths = {round(p.get_path().vertices[0][1]): p.get_linewidth() for p in axis.patches}
    assert max(norms) / min(norms) < 100
    for edge in blocks.edges:
        assert widths[-blocks.order.index(edge.source)] == pytest.approx(0.5 + 6 * edge.norm / max(norms))
    colours = {round(p.get_path().vertices[0][1]): to_hex(p.get_edgecolor()).upper() for p in axis.patches}
    assert [colours[-i] == graph.CARRYING for i in range(4)] == [False, False, True, True]
    assert axis.get_title() == "a title"


def test_norms_that_span_decades_are_drawn_by_their_logarithm():
    carried = {("a", "b"): 1e-6, ("b", "E"): 1.0, ("a", "E"): 1e-3, ("x", "a"): 0.0}
    axis = graph.draw_blocks(["x", "a", "b", "E"], carried, []).axes[0]
    assert sorted(p.get_linewidth() for p in axis.patches) == pytest.approx([0.5, 0.5, 3.5, 6.5])
    assert any("logarithm" in text.get_text() for text in axis.texts)
    axis = graph.draw_blocks(["x", "E"], {("x", "E"): 0.0}, []).axes[0]
    assert any("all are 0" in text.get_text() for text in axis.texts)
