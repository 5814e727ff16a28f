"""Each question on arrays whose answer is known beforehand."""

import numpy as np
import pytest
from scipy import ndimage

from undertow.verdict import class_, convergence, faithfulness, input, null, result, stability, weights

SHAPE = (3, 32, 40)


def lumpy(seed: int, shape: tuple[int, ...] = SHAPE, width: float = 1.5) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(shape)
    return ndimage.gaussian_filter(noise, [0] * (len(shape) - 2) + [width] * 2)


ORIGINAL = lumpy(1)
MARKS = null.Null.of(ORIGINAL, 19, 0)
NAMES = {0: "tabby", 1: "Egyptian cat", 2: "toaster", 3: "tench"}
ROLES = {0: "runner-up", 2: "least likely", 3: "random"}


def ask_class(maps, original=ORIGINAL, marks=MARKS, **more):
    return class_.answer(original, dict(zip(ROLES, maps, strict=True)), ROLES, NAMES, 1, marks, **more)


def mixed(share: float, seed: int) -> np.ndarray:
    return np.sqrt(share) * ORIGINAL + np.sqrt(1 - share) * lumpy(seed)


@pytest.mark.parametrize(
    ("share", "level"), [(1.0, "no"), (0.9, "no"), (0.25, "weak"), (0.0, "yes")], ids=lambda v: str(v)
)
def test_class_by_how_much_of_the_map_is_shared(share, level):
    answer = ask_class([mixed(share, seed) for seed in (20, 30, 40)])
    assert answer.level == level
    assert [row["role"] for row in answer.numbers["classes"]] == list(ROLES.values())


def test_a_map_that_is_the_same_whatever_the_class_is_said_with_names():
    answer = ask_class([ORIGINAL] * 3)
    assert (answer.level, answer.value) == ("no", 1.0)
    assert answer.sentence == (
        "Asked about *tabby* instead of *Egyptian cat* the map is the same (1.00): "
        "it shows what the network sees, not why it chose this class."
    )


def test_a_map_of_zeros_does_not_depend_on_anything():
    blank = np.zeros(SHAPE)
    marks = null.Null.of(blank, 19, 0)
    assert ask_class([blank] * 3, blank, marks).level == "no"
    assert weights.answer(blank, [("a", 1, blank)], [("a", 1, blank)], 1, marks).level == "no"


def test_the_same_places_with_other_signs_are_weak():
    answer = ask_class([-ORIGINAL] * 3)
    assert (answer.level, answer.value, answer.numbers["correlation"]) == ("weak", 1.0, -1.0)


def test_the_plain_gradient_stands_beside():
    plain = [lumpy(2), lumpy(2), -lumpy(2), lumpy(3)]
    assert ask_class([ORIGINAL] * 3, plain=plain).numbers["gradient"] == 1.0
    assert ask_class([ORIGINAL] * 3).numbers["gradient"] is None


def test_other_classes_are_the_runner_up_the_least_likely_and_random_ones():
    scores = np.array([3.0, 9.0, 5.0, -7.0, 1.0, 2.0, 0.0, 4.0])
    roles = class_.other_classes(scores, 1, seed=0)
    assert list(roles.items())[:2] == [(2, "runner-up"), (3, "least likely")]
    assert len(roles) == 5
    assert 1 not in roles
    assert class_.other_classes(scores, 3, seed=0)[1] == "runner-up"
    assert roles != class_.other_classes(scores, 1, seed=1)
    assert class_.other_classes(np.array([1.0, 2.0]), 0, seed=0) == {1: "least likely"}
    assert class_.other_classes(np.array([1.0]), 0, seed=0) == {}


def test_weights_by_the_mean_over_the_cascade():
    gone = [("head", 1, lumpy(4)), ("stem", 2, lumpy(5))]
    kept = [("head", 1, ORIGINAL), ("stem", 2, ORIGINAL)]
    assert weights.answer(ORIGINAL, gone, gone, 2, MARKS).level == "yes"
    answer = weights.answer(ORIGINAL, kept, gone, 2, MARKS)
    assert (answer.level, answer.value) == ("no", 1.0)
    half = weights.answer(ORIGINAL, [kept[0], gone[1]], gone, 2, MARKS)
    assert half.value == pytest.approx((half.numbers["top"] + half.numbers["all"]) / 2)
    assert (half.numbers["top"], round(half.numbers["all"], 1)) == (1.0, 0.0)


def test_a_cascade_begins_at_the_top_and_ends_with_all():
    layers = [f"l{i}" for i in range(99)]
    steps = weights.cascade(layers)
    assert steps[0] == ["l98"]
    assert steps[-1] == layers[::-1]
    assert [len(step) for step in steps] == sorted({len(step) for step in steps})
    assert weights.cascade(["one"]) == [["one"]]


def test_edges_are_scipys_sobel():
    image = lumpy(6)
    grey = image.mean(0)
    expected = np.hypot(*(ndimage.sobel(grey, axis, mode="reflect") / 8 for axis in (0, 1)))
    assert np.allclose(input.edges(image), expected)


def test_input_by_how_much_of_the_map_is_edges():
    image = lumpy(7, width=3)
    steep = input.edges(image)[None]
    assert input.answer(steep, image, 19, 0).level == "no"
    assert input.answer(-steep, image, 19, 0).level == "no"
    assert input.answer(lumpy(8, (1, 32, 40), width=3), image, 19, 0).level == "yes"
    mixture = steep / steep.std() + 2.0 * np.abs(lumpy(8, (1, 32, 40), width=3)) / lumpy(8, (1, 32, 40), width=3).std()
    assert input.answer(mixture, image, 19, 0).level == "weak"


def planted(order: np.ndarray, image: np.ndarray) -> result.Answer:
    """Judge an order for a score that is read off one patch of the image alone."""
    patch = np.zeros(SHAPE)
    patch[:, 4:12, 22:30] = image[:, 4:12, 22:30]
    return faithfulness.answer(order, image, lambda images: (images * patch).sum((1, 2, 3)), 19, 0)


def test_pixels_that_carry_the_score_are_told_from_others():
    image = np.random.default_rng(9).standard_normal(SHAPE).astype(np.float32)
    marked = np.full(SHAPE, 0.01) * np.random.default_rng(3).random(SHAPE)
    marked[:, 4:12, 22:30] += 1
    answer = planted(marked, image)
    assert (answer.level, answer.numbers["p"]) == ("yes", 0.05)
    assert answer.value > 0.7
    elsewhere = planted(np.roll(marked, 15, axis=1), image)
    assert elsewhere.level == "no"
    assert abs(elsewhere.value) < 0.1
    for kind, curves in answer.numbers["replacements"].items():
        assert curves["map"]["gap"] > curves["random"]["gap"], kind


def test_an_order_that_edges_beat_is_weak():
    image = (0.01 * lumpy(10)).astype(np.float32)
    image[:, 4:12, 22:30] += np.indices((8, 8)).sum(0) % 4 - 1.5  # the score's pixels are the steep ones
    marked = lumpy(11, width=0.5) * 0.1
    marked[:, 4:12, 22:27] += 1
    answer = planted(marked, image)
    assert (answer.level, answer.numbers["p"]) == ("weak", 0.05)
    assert answer.numbers["edges"] > answer.value


def test_curves_by_hand():
    """Three pixels of weights 4, 2, 1 and a blank of zeros, two steps: one and a half pixels, rounded to two."""
    image = np.array([[[4.0, 2.0, 1.0, 0.0]]], np.float32)
    curve = faithfulness._replaced(
        {"map": np.array([[3.0, 2.0, 1.0, 0.0]])}, image, np.zeros_like(image),
        lambda images: images.sum((1, 2, 3)), (7.0, 0.0), steps=2,
    )["map"]  # fmt: skip
    assert curve.deletion == pytest.approx([1, 1 / 7, 0])
    assert curve.insertion == pytest.approx([0, 6 / 7, 1])
    assert curve.gap == pytest.approx(((6 / 7) / 2 + (1 + 6 / 7) / 2) / 2 - ((1 + 1 / 7) / 2 + (1 / 7) / 2) / 2)


def test_the_number_of_images_is_known_beforehand():
    seen = []
    image = lumpy(12).astype(np.float32)
    faithfulness.answer(ORIGINAL, image, lambda images: (seen.append(len(images)), images.sum((1, 2, 3)))[1], 21, 0)
    assert sum(seen) == faithfulness.n_images(21)


def test_max_sensitivity_by_hand():
    original = np.array([[[3.0, 4.0]]])
    maps = [np.array([[[3.0, 3.0]]]), np.array([[[0.0, 4.0]]])]
    answer = stability.answer(original, maps, 0.02, MARKS, 0)
    assert answer.value == pytest.approx(3 / 5)
    assert answer.numbers["mean"] == pytest.approx((1 / 5 + 3 / 5) / 2)
    assert answer.numbers["interval"][0] <= answer.numbers["mean"] <= answer.numbers["interval"][1]


def test_stability_by_how_much_of_the_map_stays():
    levels = {
        share: stability.answer(ORIGINAL, [mixed(share, 50)], 0.02, MARKS, 0).level for share in (1.0, 0.9, 0.1, 0)
    }
    assert levels == {1.0: "yes", 0.9: "yes", 0.1: "weak", 0: "no"}


@pytest.mark.parametrize("change", [0.0, 0.2, 0.45, 0.55, 0.89, 1.01, 1.2, 1.6])
def test_a_map_that_changes_by_half_of_its_length_does_not_stay(change):
    other = lumpy(51)
    other -= ORIGINAL * (other * ORIGINAL).sum() / (ORIGINAL**2).sum()
    moved = ORIGINAL + change * other * np.linalg.norm(ORIGINAL) / np.linalg.norm(other)
    answer = stability.answer(ORIGINAL, [moved], 0.02, MARKS, 0)
    assert answer.value == pytest.approx(change)
    assert f"up to {100 * change:.0f} %" in answer.sentence
    assert (answer.level == "yes") == ("mostly itself" in answer.sentence) == (change < 0.5)


def test_noise_stays_within_its_radius():
    image = lumpy(13).astype(np.float32)
    away = stability.noisy(image, 5, 0, radius=0.02) - image
    reach = 0.02 * np.ptp(image)
    assert 0.95 * reach < np.abs(away).max() <= 1.001 * reach
    assert not np.array_equal(away[0], away[1])


def test_mean_cosine_by_hand():
    vectors = np.random.default_rng(1).standard_normal((4, 3, 5)) + 0.3
    flat = vectors.reshape(4, -1)
    pairs = [flat[i] @ flat[j] / np.linalg.norm(flat[i]) / np.linalg.norm(flat[j]) for i in range(4) for j in range(i)]
    assert convergence.mean_cosine(vectors) == pytest.approx(np.mean(pairs))
    assert convergence.mean_cosine(1e-30 * vectors.astype(np.float32)) == pytest.approx(np.mean(pairs), abs=1e-6)


def test_convergence_of_products_of_matrices():
    """Products of random matrices with positive entries forget where they began; a rotation does not."""
    generator = np.random.default_rng(2)
    vectors = generator.standard_normal((6, 200))
    rotation = np.linalg.qr(generator.standard_normal((200, 200)))[0]
    apart = convergence.answer({"top": vectors}, vectors @ rotation, 19, 0)
    together = convergence.answer({"top": vectors}, np.abs(vectors) @ generator.random((200, 200)), 19, 0)
    assert (apart.level, together.level) == ("yes", "no")
    assert together.value > 0.99
    assert apart.numbers["depths"][0]["cosine"] == pytest.approx(apart.value)
    partly = convergence.answer({"top": vectors}, vectors + 0.6 * np.abs(vectors).mean() + 0.3, 19, 0)
    assert partly.level == "weak"


def made(level: str, sentence: str) -> result.Answer:
    return result.Answer(0.0, {}, level, sentence, "", "")


def test_the_sentence_is_the_first_that_speaks_against_the_map():
    answers = {"input": made("no", "edges"), "class": made("weak", "half"), "weights": made("no", "unlearned")}
    assert result.verdict_sentence(answers, {}) == "unlearned"
    answers = {"input": made("yes", "fine"), "class": made("weak", "Half.")}
    assert result.verdict_sentence(answers, {}) == "Nothing speaks against the map, but it is weak on class. Half."
    assert result.verdict_sentence({"input": made("yes", "fine")}, {}) == (
        "Nothing that was asked (input) speaks against this map."
    )
    assert "class: why" in result.verdict_sentence({}, {"class": "why"})
