"""A Keras attribution shows itself: its channels come last, its pictures are as high and wide as its images."""

import re
from base64 import b64decode
from io import BytesIO

import keras
import numpy as np
from PIL import Image

import undertow as ut


def test_maps_with_their_channels_last_are_shown_as_pictures():
    layers = [keras.Input((6, 12, 3)), keras.layers.Conv2D(4, 3, activation="relu"), keras.layers.Flatten()]
    model = keras.Sequential([*layers, keras.layers.Dense(5)])
    x = np.random.default_rng(0).random((2, 6, 12, 3), np.float32)
    for target, count in (None, 2), ("top:3", 6):
        attribution = ut.explain(model, x, target=target)
        html = attribution._repr_html_()
        data = re.findall(r'src="data:image/png;base64,([^"]*)"', html)
        assert [Image.open(BytesIO(b64decode(text))).size for text in data] == [(128, 64)] * count
        assert len(repr(attribution)) < 2_000
        assert "strongest" not in html
