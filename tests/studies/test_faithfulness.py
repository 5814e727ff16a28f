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
    assert "| better | 0.400 |" in faithfulness.told(rows)


def test_an_interval_holds_the_median_and_narrows_with_more_images():
    values = np.random.default_rng(1).normal(0.5, 1, 400)
    few, many = faithfulness.interval(values[:20]), faithfulness.interval(values)
    assert many[0] < np.median(values) < many[1]
    assert many[1] - many[0] < (few[1] - few[0]) / 2


def test_the_map_of_a_single_pixel_that_decides_is_the_most_faithful():
    x, values = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 1, 8, 8)
    values[0, 0, 2, 3] = 1.0
    model = lambda x: torch.stack([x[:, 0, 2, 3], x[:, 0, 0, 0]], 1)  # noqa: E731
    mine = faithfulness.judged("vit", model, x, values, 0)["map"]
    other = faithfulness.judged("vit", model, x, values.flip(-1, -2), 0)["map"]
    assert mine > other


@pytest.mark.slow
def test_a_run_writes_its_numbers_and_goes_on_with_its_weights(tmp_path, capsys):
    from safetensors.torch import save_file

    torch.manual_seed(1)
    save_file(faithfulness.vit().state_dict(), tmp_path / "vit.safetensors")
    assert faithfulness.main(["vit", "--out", str(tmp_path), "--images", "2", "--threads", "1"]) == 0
    numbers = json.loads((tmp_path / "vit.json").read_text())
    assert set(numbers["gaps"]) == {*faithfulness.METHODS["vit"], *faithfulness.CONTROLS}
    assert all(len(values) == 2 for values in numbers["gaps"].values())
    assert (tmp_path / "vit.png").stat().st_size > 5000
    assert "| attnlrp |" in capsys.readouterr().out
