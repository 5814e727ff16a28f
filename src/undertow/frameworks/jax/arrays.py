"""Arrays to and from NumPy, and the devices that they are on."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ...errors import InputError


def to_numpy(tensor: Any) -> npt.NDArray[Any]:
    """Copy an array to NumPy; bfloat16, which NumPy lacks, becomes float32."""
    if tensor.dtype == jnp.bfloat16:
        return np.array(tensor.astype(jnp.float32))
    return np.array(tensor)


def like(array: npt.NDArray[Any], x: Any) -> Any:
    """Return an array as what `x` is, of JAX or NumPy, in the dtype of `x` and on its device."""
    if isinstance(x, np.ndarray):
        return array.astype(x.dtype)
    return jax.device_put(jnp.asarray(array, x.dtype), x.sharding)


def channels_last() -> bool:
    """Whether images are `(B, H, W, C)`: as Flax and Keras take them."""
    return True


def batch(arrays: Sequence[npt.NDArray[Any]], device: str) -> Any:
    """Stack arrays `(C, H, W)` into a batch `(B, H, W, C)` on a device."""
    stacked = np.moveaxis(np.stack(arrays), 1, -1)
    kind, _, number = device.partition(":")
    return jax.device_put(stacked, jax.devices(kind)[int(number or 0)])


def device(name: str) -> str:
    """Return JAX's name of a device, such as "gpu:0"; "auto" is the one that JAX takes by itself.

    Raises:
        InputError: there is no such device here.
    """
    if name == "auto":
        first = jax.devices()[0]
        return f"{first.platform}:{first.id}"
    kind, _, number = name.lower().replace("cuda", "gpu").partition(":")
    try:
        available = jax.devices(kind)
    except RuntimeError:
        available = []
    if (number and not number.isdecimal()) or int(number or 0) >= len(available):
        raise InputError(f"device {name!r} cannot be used here; use --device auto or cpu")
    return f"{kind}:{number or 0}"


def move(model: Any, device: str) -> None:
    """Do nothing: JAX copies weights to the device of the batch."""
