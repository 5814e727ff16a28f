"""Pictures of derivatives: what is drawn is what was derived."""

from itertools import pairwise

import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

from geometry import faults
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


def full(*sizes: int) -> str:
    """A network whose layers are fully connected, with an input for each neuron of the first."""
    first = [sum(sizes[:i]) + 1 for i in range(len(sizes))]
    layers = [range(start, start + size) for start, size in zip(first, sizes, strict=True)]
    inputs = [f"x{n}>n{n}" for n in layers[0]]
    return " ".join([*inputs, *(f"n{a}>n{b}" for p, q in pairwise(layers) for a in p for b in q)])


NETWORKS = {
    "exercise": (EXERCISE, "x2[d]"),
    "two by two": (full(2, 2), "n1"),
    "three by three": (full(3, 3), "w[1,4]"),
    "one to three by three": (full(1, 3, 3), "n1"),
    "one to four by four": (full(1, 4, 4), "n1"),
    "three layers": (full(1, 2, 2, 2), "x1[d]"),
    "three outputs": ("x1>n1 x2>n1 n1>n2 n1>n3 n2>n4 n3>n4 n2>n5 n3>n6 n2>n6", "n1"),
    "skips": ("x1>n1 n1>n2 n2>n3 x2>n3 n1>n3 n3>n4 n1>n4", "n1"),
    "one neuron": ("x1>n1", "n1"),
    "many": (full(6, 6), "n1"),
    "more than are labelled": (full(1, 5, 5), "n1"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_labels_cover_neither_each_other_nor_nodes(name):
    text, wrt = NETWORKS[name]
    derivative = Network.parse(text).derivative(wrt)
    figure = derivative.plot()
    assert faults(figure, lines=False) == []
    axis = figure.axes[0]
    nodes = [t.get_bbox_patch() for t in axis.texts if t.get_bbox_patch() and t.get_bbox_patch().get_linewidth() > 1]
    labels = [t for t in axis.texts if "frac" in t.get_text()]
    for node in nodes:
        box = node.get_window_extent()
        assert not any(label.get_window_extent().overlaps(box) for label in labels)
    edges = len(derivative.carrying) + sum(last is not None for _, last in derivative.ends)
    assert len(labels) == (edges if edges <= graph.MAX_LABELLED_EDGES else 0)
    legend = axis.texts[0].get_text().replace("\n", " ")
    assert ("no partials are written" in legend) == (not labels)


def test_an_edge_that_skips_a_column_goes_around_the_nodes_in_it():
    axis = Network.parse(NETWORKS["skips"][0]).derivative("n1").plot().axes[0]
    axis.figure.draw_without_rendering()
    nodes = [t for t in axis.texts if t.get_bbox_patch() and t.get_bbox_patch().get_linewidth() > 1]
    for patch in axis.patches:
        path = axis.transData.transform_path(patch.get_connectionstyle()(*patch._posA_posB))
        for node in nodes:
            if node.get_position() not in map(tuple, patch._posA_posB):
                assert not path.intersects_bbox(node.get_window_extent(), False)


def test_edges_are_interrupted_at_labels_on_any_ground():
    """No paper lies below a label, which on a transparent ground would be none."""
    axis = Network.parse(full(2, 2)).derivative("n1").figure().axes[0]
    labels = [text for text in axis.texts if "frac" in text.get_text()]
    for patch in axis.patches:
        frame, *holes = patch.get_clip_path().get_fully_transformed_path().to_polygons()
        assert turn(frame) > 0
        assert all(turn(hole) < 0 for hole in holes)  # the other way round, so that it is left out
        for label in labels:
            assert label.get_bbox_patch() is None
            box = label.get_window_extent()
            assert any((hole.min(0) < box.min).all() and (hole.max(0) > box.max).all() for hole in holes)


def turn(ring) -> float:
    """Twice the area that a polygon goes around, positive against the clock."""
    (x, y), (x1, y1) = ring[:-1].T, ring[1:].T
    return float((x * y1 - x1 * y).sum())


def test_a_long_title_stays_in_the_frame():
    assert faults(Network.parse("x1>n1").derivative("n1").plot(title="a title " * 40), lines=False) == []


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


def test_blocks_that_skip_have_their_numbers_apart():
    names = ["x", *(f"features.denseblock.{i}" for i in range(8)), "E"]
    carried = {(a, b): 10.0**-i for i, a in enumerate(names) for b in names[i + 1 :: 3]}
    assert faults(graph.draw_blocks(names, carried, list(carried)[:4], "a title"), lines=False) == []


def test_norms_that_span_decades_are_drawn_by_their_logarithm():
    carried = {("a", "b"): 1e-6, ("b", "E"): 1.0, ("a", "E"): 1e-3, ("x", "a"): 0.0}
    axis = graph.draw_blocks(["x", "a", "b", "E"], carried, []).axes[0]
    assert sorted(p.get_linewidth() for p in axis.patches) == pytest.approx([0.5, 0.5, 3.5, 6.5])
    assert any("logarithm" in text.get_text() for text in axis.texts)
    axis = graph.draw_blocks(["x", "E"], {("x", "E"): 0.0}, []).axes[0]
    assert any("all are 0" in text.get_text() for text in axis.texts)
