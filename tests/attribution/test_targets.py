"""Targets beyond classes, and layers in place of the input: each against plain autograd, or one true line."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import undertow as ut
from undertow.classifier import Classifier
from undertow.images import Preprocessing

torch.manual_seed(5)
DENSE = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1)).eval()
CLASSES = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
X, V = torch.randn(2, 3, 6, 7), torch.randn(2, 6)
MASK = torch.tensor(np.add.outer(np.arange(6), np.arange(7)) % 3 == 0)


class Language(nn.Module):
    """Embeds tokens, mixes what went before, and scores the next one."""

    def __init__(self):
        super().__init__()
        self.embedding, self.mixing, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)

    def forward(self, ids):
        return self.body(self.embedding(ids))

    def body(self, h):
        return self.head(h + torch.relu(self.mixing(h.cumsum(1))))


LANGUAGE, IDS = Language().eval(), torch.tensor([[1, 4, 9, 2], [3, 3, 0, 10]])


def by_autograd(model, x, score):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(score(model(leaf)).sum(), leaf)[0]


@pytest.mark.parametrize(
    ("target", "score"),
    [
        ((2, 1, 3), lambda o: o[:, 2, 1, 3]),
        (torch.tensor([2, -1, 3]), lambda o: o[:, 2, -1, 3]),
        ([(2, 1, 3), (0, 5, 0)], lambda o: torch.stack([o[0, 2, 1, 3], o[1, 0, 5, 0]])),
        (ut.targets.where(MASK, 2), lambda o: o[:, 2] * MASK),
        (ut.targets.where(MASK.numpy(), 2), lambda o: o[:, 2] * MASK),
        (ut.targets.where(0.5 * MASK, 0), lambda o: o[:, 0] * 0.5 * MASK),
        (ut.targets.where(torch.stack([MASK, ~MASK]), 1), lambda o: o[:, 1] * torch.stack([MASK, ~MASK])),
    ],
)
@pytest.mark.parametrize("estimator", ["gradient", "input-times"])
def test_places_in_dense_scores(target, score, estimator):
    wanted = by_autograd(DENSE, X, score)
    a = ut.explain(DENSE, X, rule="gradient", target=target, estimator=estimator)
    assert torch.allclose(a.values, wanted if estimator == "gradient" else wanted * X, atol=1e-6)
    ended = ut.explain(lambda v: {"out": DENSE(v).softmax(1)}, X, rule="gradient", target=target, output="out")
    assert ended.head == "before softmax"
    assert torch.allclose(ended.values, wanted, atol=1e-6)


def test_several_places_of_each_sample():
    target = [[(2, 1, 3), (0, 5, 0)], [(1, 1, 1), (4, 0, 6)]]
    a = ut.explain(DENSE, X, rule="gradient", target=target)
    assert (a.values.shape, a.scores.shape) == ((2, 2, 3, 6, 7), (2, 2))
    wanted = by_autograd(DENSE, X, lambda o: torch.stack([o[0, 0, 5, 0], o[1, 4, 0, 6]]))
    assert torch.allclose(a.values[:, 1], wanted, atol=1e-6)


def test_channels_last_and_tokens_are_told_from_the_mask():
    last = ut.explain(lambda v: DENSE(v).movedim(1, -1), X, rule="gradient", target=ut.targets.where(MASK, 2))
    assert torch.allclose(last.values, by_autograd(DENSE, X, lambda o: o[:, 2] * MASK), atol=1e-6)
    weights = ut.targets.where(np.array([0, 1, 1, 0]), 7).weights((2, 4, 11))
    assert weights.nonzero()[1:] == (pytest.approx([1, 2]), pytest.approx([7, 7]))


@pytest.mark.parametrize(
    ("target", "score"),
    [
        (ut.targets.token(3), lambda o: o[:, -1, 3]),
        (ut.targets.token([3, 5]), lambda o: torch.stack([o[0, -1, 3], o[1, -1, 5]])),
        (ut.targets.token(3, position=1), lambda o: o[:, 1, 3]),
        (ut.targets.token(3, position=torch.tensor([1, 2])), lambda o: torch.stack([o[0, 1, 3], o[1, 2, 3]])),
        (ut.targets.token(), lambda o: o[:, -1].amax(1)),
        ((-1, 3), lambda o: o[:, -1, 3]),
    ],
)
def test_tokens_of_a_language_model_by_its_embeddings(target, score):
    embedded = LANGUAGE.embedding(IDS).detach()
    wanted = by_autograd(LANGUAGE.body, embedded, score)
    for x in (IDS, {"ids": IDS}):
        a = ut.explain(LANGUAGE, x, at="embedding", rule="gradient", target=target)
        assert a.at == ("embedding",)
        assert torch.allclose(a.values, wanted, atol=1e-6)
    frozen = Language().eval().requires_grad_(False)
    frozen.load_state_dict(LANGUAGE.state_dict())
    assert torch.allclose(ut.explain(frozen, IDS, at="embedding", rule="gradient", target=target).values, wanted)


@pytest.mark.parametrize("through", ["graph", "swap", "hook"])
@pytest.mark.parametrize("rule", ["gradient", "guided"])
def test_at_a_layer_equals_the_rest_of_the_network(rule, through):
    inner = DENSE[0](X).detach()
    wanted = ut.explain(DENSE[1:], inner, rule=rule, target=(2, 1, 3)).values
    a = ut.explain(DENSE, X, rule=rule, at="0", target=(2, 1, 3), through=through)
    assert torch.allclose(a.values, wanted, atol=1e-6)


@pytest.mark.parametrize("estimator", ["smoothgrad:4", "integrated:5", "input-times"])
def test_estimators_work_at_a_layer(estimator):
    inner = CLASSES[0](V).detach()
    wanted = ut.explain(CLASSES[1:], inner, estimator=estimator, target=1)
    a = ut.explain(CLASSES, V, at="0", estimator=estimator, target=1)
    assert torch.allclose(a.values, wanted.values, atol=1e-6)
    assert torch.equal(a.scores, CLASSES(V)[:, 1])


class Twice(nn.Module):
    """Calls a layer twice, and returns its hidden state in a tuple within."""

    def __init__(self):
        super().__init__()
        self.step = nn.Linear(6, 6)
        self.recurrent = nn.LSTM(6, 3, batch_first=True)

    def forward(self, x):
        h = torch.relu_(self.step(torch.relu_(self.step(x))))
        out, (state, _) = self.recurrent(h[:, None])
        return out[:, -1] + state[0]


def test_calls_are_numbered_and_structures_kept():
    net = Twice().eval()
    both = ut.explain(net, V, at="step", rule="gradient", target=1)
    assert list(both.values) == ["step", "step@1"]
    second = ut.explain(net, V, at="step@1", rule="gradient", target=1).values
    assert torch.equal(second, both.values["step@1"])
    hidden = net.step(torch.relu(net.step(V))).detach().requires_grad_()
    out, (state, _) = net.recurrent(torch.relu(hidden)[:, None])
    (wanted,) = torch.autograd.grad((out[:, -1] + state[0])[:, 1].sum(), hidden)
    assert torch.allclose(second, wanted, atol=1e-6)
    several = ut.explain(net, V, at=["step@1", "recurrent"], rule="gradient", target=1).values
    out, (state, cell) = several["recurrent"]
    assert (out.shape, state.shape, cell) == ((2, 1, 3), (1, 2, 3), None)
    assert out[:, 0, 1].tolist() == state[0, :, 1].tolist() == [1, 1]


def test_the_model_is_as_before_and_threads_do_not_meet():
    from concurrent.futures import ThreadPoolExecutor

    wanted = [ut.explain(CLASSES, V * k, at="0", target=1).values for k in range(1, 9)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda k: ut.explain(CLASSES, V * k, at="0", target=1).values, range(1, 9)))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert not any(module._forward_hooks for module in CLASSES.modules())


def test_a_unit_inside():
    whole = ut.explain(DENSE, X, rule="gradient", target=ut.targets.unit("0", 3))
    assert torch.allclose(whole.values, by_autograd(DENSE[0], X, lambda o: o[:, 3]), atol=1e-6)
    assert torch.allclose(whole.scores, DENSE[0](X)[:, 3].sum((1, 2)), atol=1e-5)
    place = ut.explain(DENSE, X, rule="gradient", target=ut.targets.unit("1", 3, (2, 2)))
    assert torch.allclose(place.values, by_autograd(DENSE[:2], X, lambda o: o[:, 3, 2, 2]), atol=1e-6)
    dense = ut.explain(CLASSES, V, rule="gradient", target=ut.targets.unit("0", 5))
    assert torch.allclose(dense.values, by_autograd(CLASSES[0], V, lambda o: o[:, 5]), atol=1e-6)
    token = ut.targets.unit("mixing", 2, (1,))
    at = ut.explain(LANGUAGE, IDS, at="embedding", rule="gradient", target=token).values
    embedded = LANGUAGE.embedding(IDS).detach()
    assert torch.allclose(at, by_autograd(lambda h: LANGUAGE.mixing(h.cumsum(1)), embedded, lambda o: o[:, 1, 2]))
    assert ut.explain(DENSE, X, target=ut.targets.unit("1", 3), through="swap").rewired == 1


class Detector(nn.Module):
    """Scores four fixed boxes of each image, and gives them as torchvision does, the best first."""

    boxes = torch.tensor([[0.0, 0, 2, 2], [2, 2, 6, 6], [0, 3, 3, 6], [4, 0, 6, 3]])

    def forward(self, images):
        found = []
        for image in images:
            scores = torch.stack([image[:, y0:y1, x0:x1].mean() for x0, y0, x1, y1 in self.boxes.int().tolist()])
            order = scores.detach().argsort(descending=True)
            found.append({"boxes": self.boxes[order], "labels": order, "scores": scores[order].sigmoid()})
        return found


def test_boxes_as_torchvision_gives_them():
    images = [torch.randn(3, 6, 6), torch.randn(3, 6, 8)]
    a = ut.explain(Detector(), images, rule="gradient", target=ut.targets.box(1))
    found = Detector()(images)
    assert a.scores.tolist() == [f["scores"][1].item() for f in found]
    for image, values, f in zip(images, a.values, found, strict=True):
        x0, y0, x1, y1 = f["boxes"][1].int().tolist()
        assert values.shape == image.shape
        assert int(values.count_nonzero()) == 3 * (y1 - y0) * (x1 - x0)
    near = ut.explain(Detector(), images, rule="gradient", target=ut.targets.box(near=(2, 3, 6, 6))).values[0]
    assert near[:, 2:, 2:].all()
    with pytest.raises(ut.TargetError, match=r"keeps 4 box\(es\) of image 0; there is no box 9"):
        ut.explain(Detector(), images, rule="gradient", target=ut.targets.box(9))
    with pytest.raises(ut.TargetError, match="no box that the detector keeps of image 0 overlaps"):
        ut.explain(Detector(), images, rule="gradient", target=ut.targets.box(near=(60, 60, 70, 70)))


@dataclass
class Detected:
    logits: torch.Tensor
    pred_boxes: torch.Tensor


class Queries(nn.Module):
    """Gives logits and boxes of three queries as DETR does, the last class being "no object"."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Linear(6, 3 * 5)
        self.config = SimpleNamespace(num_labels=4)

    def forward(self, x):
        boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.25, 0.25, 0.5, 0.5], [0.8, 0.2, 0.1, 0.1]])
        return Detected(self.queries(x).view(len(x), 3, 5), boxes.expand(len(x), 3, 4))


def test_boxes_as_detr_gives_them():
    net = Queries().eval()
    logits = net(V).logits
    sure = logits.softmax(-1)[..., :4].amax(-1)
    a = ut.explain(net, V, rule="gradient", target=ut.targets.box())
    best = sure.argmax(1)
    wanted = torch.stack([logits[i, q, :4].max() for i, q in enumerate(best)])
    assert torch.equal(a.scores, wanted.detach())
    near = ut.explain(net, V, rule="gradient", target=ut.targets.box(near=(0, 0, 0.5, 0.5)))
    assert torch.equal(near.scores, logits[:, 1, :4].amax(-1).detach())
    as_mapping = ut.explain(lambda v: {"pred_logits": net(v).logits, "pred_boxes": net(v).pred_boxes}, V,
                            rule="gradient", target=ut.targets.box())  # fmt: skip
    assert torch.equal(as_mapping.values, a.values)
    with pytest.raises(ut.TargetError, match="the output is no detector's that is known"):
        ut.explain(CLASSES, V, target=ut.targets.box())


class Headed(nn.Module):
    """Returns the scores beside others, under a name."""

    def forward(self, x):
        return {"aux": -CLASSES(x), "out": CLASSES(x)}


def test_class_names_where_they_are_known():
    names = ("tench", "tabby", "tiger cat")
    classifier = Classifier("mine", CLASSES, Preprocessing(), names, "random", "")
    wanted = ut.explain(CLASSES, V, target=2).values
    assert torch.equal(ut.explain(classifier, V, target="tiger cat").values, wanted)
    headed = Classifier("mine", Headed(), Preprocessing(), names, "random", "", output="out")
    assert torch.equal(ut.explain(headed, V, target="tiger cat").values, wanted)
    configured = nn.Sequential(*CLASSES).eval()
    configured.config = SimpleNamespace(id2label=dict(enumerate(names)))
    assert torch.equal(ut.explain(configured, V, target="Tiger Cat").values, wanted)
    both = ut.explain(configured, V, target=[["tabby", "tench"]] * 2)
    assert both.targets.tolist() == [[1, 0], [1, 0]]
    with pytest.raises(ut.TargetError, match=r"'tiger cat' is a name, and the model has none: .*ut\.load"):
        ut.explain(CLASSES, V, target="tiger cat")
    with pytest.raises(ut.TargetError, match="no class 'lion' among 3"):
        ut.explain(configured, V, target="lion")


@pytest.mark.parametrize(
    ("model", "x", "options", "message"),
    [
        (DENSE, X, {}, r"\(2, 5, 6, 7\), not \(2, classes\): say which of its scores, as in target=\(0, 0, 0\)"),
        (DENSE, X, {"target": (9, 0, 0)}, "is out of range: the scores have shape"),
        (DENSE, X, {"target": (1, 2)}, "names no place in scores of shape .*pass 3 whole numbers"),
        (
            DENSE,
            X,
            {"target": ut.targets.where(np.ones((3, 3)), 1)},
            r"mask has shape \(3, 3\).*resize it to .*\(6, 7\)",
        ),
        (DENSE, X, {"target": ut.targets.where(MASK, 5)}, "target 5 is out of range: the model has classes 0 to 4"),
        (DENSE, X, {"target": ut.targets.unit("0", 4)}, "layer '0' has channels 0 to 3; there is no 4"),
        (DENSE, X, {"target": ut.targets.unit("0", 0, (6, 0))}, r"has places \(6, 7\); there is none at \(6, 0\)"),
        (DENSE, X, {"target": ut.targets.unit("zero", 0)}, "no layer 'zero'"),
        (DENSE, X, {"target": ut.targets.token(1)}, r"a token has scores \(batch, positions, vocabulary\)"),
        (LANGUAGE, IDS, {"target": ut.targets.token(1)}, r"x is torch\.int64; a map needs floating point.*at='LAYER'"),
        (LANGUAGE, IDS, {"at": "embedding", "target": ut.targets.token(1, 4)}, "position 4 is out of range"),
        (LANGUAGE, IDS, {"at": "embedding", "target": ut.targets.token(11)}, "target 11 is out of range"),
        (CLASSES, V, {"at": "7"}, "no layer '7'; at the top there are 0, 1, 2"),
        (CLASSES, V, {"at": "0@1"}, r"layer '0@1' runs 1 time\(s\)"),
        (CLASSES, V, {"at": "0@first"}, "behind @ stands the number of a call, as in 0@1"),
        (CLASSES, V, {"at": "0", "estimator": "grad-cam:0"}, "grad-cam names its layer itself; leave at= out"),
        (CLASSES, V, {"at": ()}, "names no layer"),
        (lambda v: CLASSES(v)[:, :1], V, {"target": 1}, r"the model has one score, class 0; .*-output\[:, 0\]"),
    ],
)
def test_what_cannot_be_meant_is_one_line(model, x, options, message):
    with pytest.raises(ut.UndertowError, match=message) as caught:
        ut.explain(model, x, rule="gradient", **options)
    assert "\n" not in str(caught.value)
    for make, wrong in ((lambda: ut.targets.where(np.zeros((2, 2)), 0), "off everywhere"),
                        (lambda: ut.targets.box(near=(3, 3, 1, 1)), "is no box")):  # fmt: skip
        with pytest.raises(ut.TargetError, match=wrong):
            make()


def test_keras_takes_places_regions_and_tokens():
    import keras
    import tensorflow as tf

    layers = keras.layers.Conv2D(4, 3, activation="relu"), keras.layers.Conv2D(5, 1)
    model = keras.Sequential([keras.Input((6, 7, 3)), *layers])
    x = tf.constant(X.numpy().transpose(0, 2, 3, 1))
    mask = np.eye(4, 5)
    cases = [
        ((1, 3, 2), lambda o: o[:, 1, 3, 2]),
        ([(1, 3, 2), (0, 0, 4)], lambda o: tf.stack([o[0, 1, 3, 2], o[1, 0, 0, 4]])),
        (ut.targets.where(mask, 2), lambda o: tf.reduce_sum(o[..., 2] * mask.astype(np.float32), [1, 2])),
    ]
    for target, score in cases:
        with tf.GradientTape() as tape:
            tape.watch(x)
            scores = score(model(x))
        a = ut.explain(model, x, rule="gradient", target=target)
        assert np.allclose(a.values, tape.gradient(scores, x), atol=1e-6)
        assert np.allclose(a.scores, scores, atol=1e-5)
    rows = keras.Sequential([keras.Input((4, 3)), keras.layers.Dense(6, activation="relu"), keras.layers.Dense(5)])
    tokens = tf.constant(np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32))
    with tf.GradientTape() as tape:
        tape.watch(tokens)
        scores = rows(tokens)[:, -1, 3]
    a = ut.explain(rows, tokens, rule="gradient", target=ut.targets.token(3))
    assert np.allclose(a.values, tape.gradient(scores, tokens), atol=1e-6)
    for options, message in (
        ({}, r"say which of its scores|not \(2, classes\)"),
        ({"target": ut.targets.box(0)}, "ut.targets.box is not there for Keras yet"),
        ({"target": (0, 9, 0)}, "out of range|names no place"),
        ({"at": "nowhere", "target": (0, 0)}, "no layer 'nowhere'"),
    ):
        with pytest.raises(ut.UndertowError, match=message):
            ut.explain(rows, tokens, **options)


@pytest.mark.parametrize("estimator", ["smoothgrad:3", "integrated:3"])
@pytest.mark.parametrize("position", [-1, torch.tensor([1, 3])])
@pytest.mark.parametrize("target", [2, "top:2", None])
def test_estimators_keep_the_token_and_its_position(target, position, estimator):
    h = LANGUAGE.embedding(IDS).detach()
    a = ut.explain(
        LANGUAGE.body, h, rule="gradient", target=ut.targets.token(target, position), estimator=estimator, seed=1
    )
    rows = torch.arange(2)
    for k in range(2 if target == "top:2" else 1):
        ids = a.targets if a.targets.ndim == 1 else a.targets[:, k]
        alone = ut.explain(
            LANGUAGE.body,
            h,
            rule="gradient",
            target=lambda o, ids=ids: o[rows, position, ids],
            estimator=estimator,
            seed=1,
        )
        values = a.values if a.targets.ndim == 1 else a.values[:, k]
        assert torch.allclose(values, alone.values, atol=1e-6)
    assert a.completeness is None or estimator == "integrated:3"
