"""Similarity measures against SciPy and scikit-image, and null distributions against what they promise."""

import numpy as np
import pytest
from scipy import ndimage, stats
from scipy.sparse import lil_matrix
from scipy.sparse.linalg import spsolve
from skimage.metrics import structural_similarity

from undertow import similarity
from undertow.verdict import fill, null


def lumpy(seed: int, shape: tuple[int, ...] = (24, 37), width: float = 2.0) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(shape)
    return ndimage.gaussian_filter(noise, [0] * (len(shape) - 2) + [width] * 2)


def test_spearman_is_scipys_with_ties():
    a, b = np.maximum(lumpy(1), 0), np.round(lumpy(2) * 20) + 10 * np.maximum(lumpy(1), 0)
    assert similarity.spearman(a, b) == pytest.approx(stats.spearmanr(a.ravel(), b.ravel()).statistic, abs=1e-10)
    assert 0.02 < similarity.spearman(a, b) < 0.98


def test_correlation_and_cosine_are_numpys():
    a, b = lumpy(3) + 0.2, 0.4 * lumpy(3) + lumpy(4) - 0.1
    assert similarity.correlation(a, b) == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1], abs=1e-10)
    cosine = (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum())
    assert similarity.cosine(a, b) == pytest.approx(cosine, abs=1e-10)
    assert similarity.cosine(1e-30 * a.astype(np.float32), 1e30 * b) == pytest.approx(cosine, abs=1e-6)


def test_ssim_is_scikit_images():
    a, b = np.abs(lumpy(5)), np.abs(lumpy(5) + 0.3 * lumpy(6))
    one, other = (np.clip(v / np.percentile(v, 99), 0, 1) for v in (a, b))
    assert similarity.ssim(a, b) == pytest.approx(structural_similarity(one, other, data_range=1.0), abs=1e-10)


@pytest.mark.parametrize("measure", [similarity.spearman, similarity.correlation, similarity.cosine])
def test_a_constant_is_like_a_constant_alone(measure):
    assert measure(np.zeros((3, 4)), np.zeros((3, 4))) == 1
    assert measure(np.zeros((3, 4)), lumpy(1, (3, 4))) == 0


def test_random_maps_have_the_values_and_the_spectrum_but_not_the_places():
    own = lumpy(7, (3, 64, 48))
    for drawn in null.random_maps(own, 5, np.random.default_rng(0)):
        assert np.array_equal(np.sort(drawn, None), np.sort(own, None))
        assert abs(np.corrcoef(own.ravel(), drawn.ravel())[0, 1]) < 0.3
        power = [np.log((np.abs(np.fft.rfft2(v)) ** 2).mean(0) + 1e-9).ravel() for v in (own, drawn)]
        assert np.corrcoef(*power)[0, 1] > 0.7
        between = [np.corrcoef(v[0].ravel(), v[1].ravel())[0, 1] for v in (own, drawn)]
        assert between[0] == pytest.approx(between[1], abs=0.1)  # channels are turned alike


def test_a_field_keeps_the_spectrum_exactly():
    own = lumpy(8)
    drawn = null.phase_randomized(own, np.random.default_rng(1))
    assert np.allclose(np.abs(np.fft.rfft2(drawn))[1:, 1:-1], np.abs(np.fft.rfft2(own))[1:, 1:-1])
    assert drawn.mean() == pytest.approx(own.mean())


def test_the_first_mark_lets_at_most_one_in_twenty_unrelated_maps_pass_and_few_related_ones():
    # one map's own spectrum is spikier than the one it was drawn from, so the mark errs on the side of "unrelated"
    marks = null.thresholds(lumpy(9), {"m": similarity.spearman}, 200, np.random.default_rng(0))["m"]
    pairs = [(lumpy(100 + i), lumpy(600 + i)) for i in range(200)]
    above = [similarity.spearman(a, b) > marks.unrelated for a, b in pairs]
    related = [similarity.spearman(a, a + b) > marks.unrelated for a, b in pairs]
    assert np.mean(above) <= 0.05
    assert np.mean(related) > 0.95


@pytest.mark.parametrize("seed", range(5))
def test_lumps_make_unrelated_maps_more_alike(seed):
    fine, coarse = (
        null.thresholds(lumpy(9 + seed, width=w), {"m": similarity.spearman}, 60, np.random.default_rng(seed))["m"]
        for w in (0.5, 4)
    )
    assert 2 * fine.unrelated < coarse.unrelated
    assert 2 * fine.unrelated < fine.half


def test_half_is_what_maps_that_share_half_of_their_variance_have():
    marks = null.thresholds(lumpy(10, (64, 64)), {"m": similarity.correlation}, 60, np.random.default_rng(0))["m"]
    assert marks.half == pytest.approx(0.5, abs=0.05)
    against = null.thresholds_against(lumpy(10, (64, 64)), lumpy(11, (64, 64)), 60, np.random.default_rng(0))
    assert against.half == pytest.approx(np.sqrt(0.5), abs=0.07)


def test_the_same_places_with_other_signs_are_neither_the_same_nor_another():
    marks = null.Null.of(lumpy(12, (2, 40, 40)), 19, 0)
    assert [marks.classify(1, 1), marks.classify(1, -1), marks.classify(-0.2, -0.2)] == ["no", "weak", "yes"]


def test_blur_is_scipys_away_from_borders():
    image = lumpy(13, (3, 50, 60), width=0.5)
    expected = ndimage.gaussian_filter(image, (0, 6, 6), truncate=8)
    assert np.allclose(fill.blurred(image)[:, 24:26, 28:32], expected[:, 24:26, 28:32], atol=1e-5)


def solved(image: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """Set the linear system up pixel by pixel and leave it to SciPy."""
    places = {tuple(p): i for i, p in enumerate(np.argwhere(missing))}
    matrix, right = lil_matrix((len(places), len(places))), np.zeros((len(places), len(image)))
    for (y, x), i in places.items():
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                at = y + dy, x + dx
                if (dy or dx) and 0 <= at[0] < missing.shape[0] and 0 <= at[1] < missing.shape[1]:
                    weight = 1 / 12 if dy and dx else 1 / 6
                    matrix[i, i] += weight
                    if missing[at]:
                        matrix[i, places[at]] -= weight
                    else:
                        right[i] += weight * image[:, at[0], at[1]]
    filled = image.copy()
    filled[:, missing] = spsolve(matrix.tocsc(), right).reshape(len(places), -1).T
    return filled


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_imputed_pixels_solve_the_linear_system(share):
    image, order = lumpy(14, (2, 17, 22)), lumpy(15, (17, 22), width=1)
    missing = order > np.quantile(order, 1 - share)
    exact = solved(image, missing)
    assert np.allclose(fill.imputed(image, missing, np.random.default_rng(0), 0.0, max_steps=500), exact, atol=1e-4)
    quick = fill.imputed(image, missing, np.random.default_rng(0), 0.0)
    assert np.abs(quick - exact).max() < 0.05 * np.ptp(image)
    noisy = np.concatenate(
        [fill.imputed(image, missing, np.random.default_rng(s), 0.1, max_steps=500) for s in range(4)]
    )
    noisy -= np.tile(exact, (4, 1, 1))
    assert np.std(noisy[:, missing]) == pytest.approx(0.1, rel=0.15)  # five standard deviations of 600 values' own
    assert np.allclose(noisy[:, ~missing], 0, atol=1e-6)
