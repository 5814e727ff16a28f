"""Maps in one safetensors file: written row by row, so that memory does not grow with their number."""

import json
import math
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError

HEADER_BYTES = 512
_WORDS = {"<f2": "F16", "<f4": "F32", "<f8": "F64"}


class MapFile:
    """A file that holds the tensor `values`, `(rows, ...)`; whole once it is closed.

    Args:
        path: of the file, which is new.

    Attributes:
        rows: how many were written.

    >>> import tempfile
    >>> from undertow.runs.format import read_tensor
    >>> file = MapFile(Path(tempfile.mkdtemp(), "guided.safetensors"))
    >>> file.append(np.ones((2, 3, 4, 4), np.float32)), file.append(np.zeros((1, 3, 4, 4), np.float32))
    (0, 2)
    >>> file.close()
    >>> read_tensor(file.path).shape
    (3, 3, 4, 4)
    """

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, 0
        self._shape: tuple[int, ...] = ()
        self._dtype = "<f4"
        self._file: IO[bytes] = path.open("xb")
        self._file.write(b" " * HEADER_BYTES)

    def append(self, values: npt.NDArray[Any]) -> int:
        """Write rows `(N, ...)`, and return the position of the first.

        Raises:
            InputError: they have another shape or type than those before.
        """
        layout = values.dtype.newbyteorder("<").str
        if layout not in _WORDS:
            raise InputError(f"maps of {values.dtype} cannot be kept; those of a network of floating-point numbers can")
        if not self.rows:
            self._shape, self._dtype = values.shape[1:], layout
        if values.shape[1:] != self._shape or layout != self._dtype:
            raise InputError(f"maps of {values.shape[1:]} {values.dtype} among those of {self._shape} {self._dtype}")
        self._file.write(np.ascontiguousarray(values, layout).data)
        self.rows += len(values)
        return self.rows - len(values)

    def close(self) -> None:
        """Write the header, and close the file."""
        shape = (self.rows, *self._shape)
        nbytes = math.prod(shape) * np.dtype(self._dtype).itemsize
        header = json.dumps({"values": {"dtype": _WORDS[self._dtype], "shape": shape, "data_offsets": [0, nbytes]}})
        self._file.seek(0)
        self._file.write((HEADER_BYTES - 8).to_bytes(8, "little") + header.encode().ljust(HEADER_BYTES - 8))
        self._file.close()

    def abandon(self) -> None:
        """Close the file as it is."""
        self._file.close()
