"""The study of faithfulness, at a small size: intervals, the order of its rows, and a whole run."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))
import faithfulness


def test_rows_are_in_order_and_compared_image_by_image():
    gaps = {"gradient": [0.1, 0.2, 0.3], "better": [0.3, 0.4, 0.5], "worse": [0.0, 0.1, 0.2]}
    rows = faithfulness.rows(gaps)
    assert [row["method"] for row in rows] == ["better", "gradient", "worse"]
    assert rows[0]["more than gradient"] == pytest.approx(0.2)
    assert rows[0]["interval of that"] == pytest.approx((0.2, 0.2))  # the same for every image
    assert rows[0]["interval"][0] == pytest.approx(0.3)
    answers = {method: {"faithfulness": [(v, "yes") for v in values]} for method, values in gaps.items()}
    assert "| better | 0.40 |" in faithfulness.told(rows, answers)
    assert "| 3 / 0 / 0 |" in faithfulness.told(rows, answers)


def test_an_interval_holds_the_median_and_narrows_with_more_images():
    values = np.random.default_rng(1).normal(0.5, 1, 400)
    few, many = faithfulness.interval(values[:20]), faithfulness.interval(values)
    assert many[0] < np.median(values) < many[1]
    assert many[1] - many[0] < (few[1] - few[0]) / 2


def test_what_is_told_is_what_trust_answers():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)).eval()
    x = torch.randn(1, 1, 8, 8)
    verdict = faithfulness.ut.trust(net, x, rule="gradient", estimator="input-times", target=1)
    wanted = {name: (verdict.answers[name].value, verdict.answers[name].level) for name in faithfulness.QUESTIONS}
    assert faithfulness.judged(net, x, 1, {"rule": "gradient", "estimator": "input-times"}) == wanted
    control = faithfulness.controls(net, x, 1, seed=0)
    assert control["edges"] == verdict.answers["faithfulness"].numbers["edges"]
    answers = {
        "mine": {name: [answer, answer] for name, answer in wanted.items()},
        "edges": {"faithfulness": [(0.1, "")]},
    }
    alike = f"{wanted['class'][0]:.2f}"
    assert f"| mine | {alike} | {alike} to {alike} |" in faithfulness.changed(answers)
    assert "edges" not in faithfulness.changed(answers)


@pytest.mark.slow
def test_a_run_writes_its_numbers_and_goes_on_with_its_weights(tmp_path, capsys):
    from safetensors.torch import save_file

    torch.manual_seed(1)
    save_file(faithfulness.vit().state_dict(), tmp_path / "vit.safetensors")
    assert faithfulness.main(["vit", "--out", str(tmp_path), "--images", "2", "--threads", "1"]) == 0
    numbers = json.loads((tmp_path / "vit.json").read_text())
    assert set(numbers["answers"]) == {*faithfulness.METHODS["vit"], *faithfulness.CONTROLS}
    assert all(len(answers["faithfulness"]) == 2 for answers in numbers["answers"].values())
    assert (tmp_path / "vit.png").stat().st_size > 5000
    assert "| attnlrp |" in capsys.readouterr().out
