"""A probability is printed where the network gives one, and nowhere else."""

import numpy as np
import pytest
import torch

from undertow.attribution.predictions import likeliest, probabilities_of

LOGITS = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("head", [torch.nn.Identity(), torch.nn.Softmax(0), torch.nn.LogSoftmax(0)])
def test_logits_probabilities_and_their_logarithms_give_the_same(head, dtype):
    scores = head(LOGITS).to(dtype).double().numpy()
    np.testing.assert_allclose(probabilities_of(scores), LOGITS.softmax(0).numpy(), atol=2e-3)


def test_a_thousand_halves_are_still_probabilities():
    scores = torch.linspace(-4, 4, 1000).softmax(0).half().double().numpy()
    assert probabilities_of(scores) is scores


@pytest.mark.parametrize("scores", [[0.46], [3.0], [0.9, 0.8, 0.1]])
def test_scores_that_stand_for_no_distribution_have_no_probability(scores):
    prediction = likeliest(np.array(scores), ["a", "b", "c"])[0]
    assert prediction.to_dict() == {"class": 0, "name": "a", "score": scores[0], "probability": None}
    assert str(prediction) == f"a ({scores[0]})" if scores != [3.0] else "a (3)"


def test_predictions_are_in_the_order_of_the_scores():
    predictions = likeliest(np.array([1.0, 3.0, 2.0]), ["a", "b", "c"])
    assert [p.name for p in predictions] == ["b", "c", "a"]
    assert [p.score for p in predictions] == [3.0, 2.0, 1.0]
    assert sum(p.probability for p in predictions) == pytest.approx(1)
