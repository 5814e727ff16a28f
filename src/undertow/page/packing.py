"""PackedArrays as text in a page, which its script unpacks: bfloat16, its two bytes apart, deflated, base64."""

import base64
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt


class PackedArrays:
    """The arrays of one page, each packed once; the page's data names them by number."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def floats(self, values: npt.ArrayLike) -> dict[str, Any]:
        """Pack numbers as bfloat16, rounded to the nearest: within 2⁻⁸ of each, relatively; NaN stays NaN.

        Returns:
            What the page's data holds in their place: the number of the array, its kind and shape.
        """
        array = np.ascontiguousarray(values, np.float32)
        bits = array.view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")  # to nearest, ties to even
        codes = np.where(np.isnan(array), np.uint16(0x7FC0), rounded).astype("<u2")
        apart = codes.reshape(-1, 1).view(np.uint8).T  # the bytes that vary least beside one another
        return self._add("bfloat16", array.shape, apart.tobytes())

    def small(self, values: npt.ArrayLike) -> dict[str, Any]:
        """Pack whole numbers from 0 to 255."""
        array = np.ascontiguousarray(values, np.uint8)
        return self._add("uint8", array.shape, array.tobytes())

    def _add(self, kind: str, shape: tuple[int, ...], raw: bytes) -> dict[str, Any]:
        self.texts.append(base64.b64encode(zlib.compress(raw, 6)).decode())
        return {"array": len(self.texts) - 1, "kind": kind, "shape": list(shape)}
