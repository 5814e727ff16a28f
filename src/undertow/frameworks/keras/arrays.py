"""Tensors to and from NumPy, and the devices that they are on."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from ...errors import InputError


def to_numpy(tensor: Any) -> npt.NDArray[Any]:
    """Copy a tensor to NumPy; bfloat16, which NumPy lacks, becomes float32."""
    if tensor.dtype == tf.bfloat16:
        tensor = tf.cast(tensor, tf.float32)
    return np.array(tensor)


def like(array: npt.NDArray[Any], x: Any) -> Any:
    """Return an array as what `x` is, a tensor or an array, in the dtype of `x`."""
    if isinstance(x, np.ndarray):
        return array.astype(x.dtype)
    return tf.cast(tf.constant(array), x.dtype)


def channels_last() -> bool:
    """Whether images are `(B, H, W, C)`, as they are in Keras unless it is set otherwise."""
    return bool(keras.config.image_data_format() == "channels_last")


def batch(arrays: Sequence[npt.NDArray[Any]], device: str) -> Any:
    """Stack arrays `(C, H, W)` into a batch on a device: `(B, H, W, C)` unless Keras is set to `channels_first`."""
    stacked = np.stack(arrays)
    if channels_last():
        stacked = np.moveaxis(stacked, 1, -1)
    with tf.device(device):
        return tf.constant(stacked)


def device(name: str) -> str:
    """Return TensorFlow's name of a device, such as "gpu:0"; "auto" is the first GPU, or the CPU where there is none.

    Raises:
        InputError: there is no such device here.
    """
    available = {entry.name.removeprefix("/physical_device:").lower() for entry in tf.config.list_physical_devices()}
    if name == "auto":
        return "gpu:0" if "gpu:0" in available else "cpu:0"
    kind, _, number = name.lower().replace("cuda", "gpu").partition(":")
    full_name = f"{kind}:{number or 0}"
    if full_name not in available:
        raise InputError(f"device {name!r} cannot be used here; use --device auto or cpu")
    return full_name


def move(model: Any, device: str) -> None:
    """Do nothing: TensorFlow copies variables to the device that computes."""
