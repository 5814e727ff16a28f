"""Which scale of pixels a Keras model takes, by its own layers; for models that come without a word about it."""

from typing import Any

import keras
import numpy as np

from .internals import all_layers

GUESS = "a guess: nothing in the model says"
_APPLICATIONS: tuple[tuple[str, str, frozenset[str]], ...] = (
    ("VGG", "caffe", frozenset(("block1_conv1", "block3_conv3", "block5_conv3", "block5_pool"))),
    ("ResNet", "caffe", frozenset(("conv1_conv", "conv1_bn", "conv2_block1_1_conv", "conv5_block3_out"))),
    ("ResNetV2", "-1..1", frozenset(("conv1_conv", "conv2_block1_preact_bn", "conv5_block3_out", "post_bn"))),
    ("DenseNet", "imagenet", frozenset(("conv1_conv", "conv2_block1_0_bn", "pool4_conv", "conv5_block16_concat"))),
    ("MobileNet", "-1..1", frozenset(("conv1", "conv_dw_1", "conv_pw_1", "conv_dw_13", "conv_pw_13"))),
    ("MobileNetV2", "-1..1", frozenset(("Conv1", "bn_Conv1", "block_16_project", "Conv_1"))),
    ("Xception", "-1..1", frozenset(("block1_conv1", "block1_conv2", "block14_sepconv1", "block14_sepconv2"))),
    ("InceptionV3", "-1..1", frozenset(("mixed0", "mixed5", "mixed9_1", "mixed10"))),
    ("InceptionResNetV2", "-1..1", frozenset(("mixed_5b", "mixed_7a", "block8_10_conv", "conv_7b"))),
    ("NASNet", "-1..1", frozenset(("stem_conv1", "stem_bn1", "reduction_conv_1_stem_1", "normal_add_1_0"))),
)
"""Networks of keras.applications without a layer that scales: what they are called, their scale, layers of theirs."""


def pixel_scale(module: Any) -> tuple[str, str]:
    """Return the scale of pixels that a model takes, a key of `undertow.scales.SCALES`, and what says so.

    What the model does with an input before its first weights tells; else whether it is a network of
    keras.applications, or has one within.
    """
    scaling = _scaling_before_weights(module)
    if scaling is None:
        takes_bytes = [layer for layer in all_layers(module) if _scales(layer)]
        if takes_bytes:
            return "0..255", f"its layer {takes_bytes[0].name} scales them"
    elif not np.allclose(scaling, ((1,), (0,)), atol=1e-6):
        slope, offset = np.abs(scaling).max(1)
        return ("0..255" if slope < 0.1 or offset > 10 else "0..1"), "it scales them before its first weights"
    names = {layer.name for layer in all_layers(module)}
    for title, scale, layers in _APPLICATIONS:
        if layers <= names:
            return scale, f"its layers are those of {title} of keras.applications"
    return "0..1", GUESS


def _scaling_before_weights(model: Any) -> Any:
    """Return slope and offset, `(2, C)`, of what a model makes of pixels before its first weights; None: not known."""
    shape = [1, *(32 if side is None else side for side in model.input_shape[1:])]
    try:
        black, white = (_before_weights(model, np.full(shape, value, np.float32)) for value in (0, 255))
    except (ValueError, AttributeError, TypeError):  # a subclassed model, or a layer that is called twice
        return None
    return np.stack([(white - black) / 255, black])


def _before_weights(model: Any, image: Any) -> Any:
    """Return the channels, at the centre, of what the first layer with weights is given.

    Raises:
        ValueError, AttributeError, TypeError: no layer has weights, or its input is not to be had.
    """
    first = next((layer for layer in model.layers if layer.weights and not _is_normalization(layer)), None)
    if first is None:
        raise ValueError("no weights")
    before = keras.Model(model.inputs[0], keras.Operation.input.fget(first))  # a nested model's `.input` is its own
    given = before(image, training=False)
    return _before_weights(first, given) if isinstance(first, keras.Model) else _centre(given)


def _centre(image: Any) -> Any:
    """Return the channels of a picture's centre, which padding leaves alone."""
    array = np.asarray(image)[0].astype(np.float64)
    if array.ndim != 3:
        return array.ravel()[:1]
    if keras.config.image_data_format() == "channels_first":
        array = np.moveaxis(array, 0, -1)
    return array[array.shape[0] // 2, array.shape[1] // 2]


def _is_normalization(layer: Any) -> bool:
    return isinstance(layer, keras.layers.Normalization)


def _scales(layer: Any) -> bool:
    """Whether a layer rescales or normalises pixels from 0 to 255, by its figures; those for 0 to 1 are about one."""
    if isinstance(layer, keras.layers.Rescaling):
        return bool(np.max(np.abs(layer.scale)) < 0.1)
    return _is_normalization(layer) and layer.mean is not None and bool(np.max(layer.mean) > 1)
