"""TensorBoard: event files, written by its own package; needs neither torch nor TensorFlow."""

import io
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from .base import Tracker, package
from .entries import CodeCounts, Entry, Note, Picture, Scalar


class TensorBoard(Tracker):
    """An event file in a folder. Histograms have a bucket for each cell that was counted.

    Args:
        folder: for `tensorboard --logdir`.

    Raises:
        FrameworkError: tensorboard is missing.
    """

    def __init__(self, folder: Path) -> None:
        record_writer = package("tensorboard.summary.writer.record_writer", "tensorboard")
        self._protos: Any = package("tensorboard.compat.proto.summary_pb2", "tensorboard")
        self._event: Any = package("tensorboard.compat.proto.event_pb2", "tensorboard").Event
        # not its EventFileWriter, which imports TensorFlow where that is installed, and has a thread
        path = folder / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}.undertow"
        self._file = path.open("xb")
        self._writer: Any = record_writer.RecordWriter(self._file)
        self._write(file_version="brain.Event:2")

    def send(self, entry: Entry) -> None:
        """Take one entry."""
        self._write(summary=self._protos.Summary(value=[self._value(entry)]), step=entry.step)

    def flush(self) -> None:
        """Write out what waits."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, **facts: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **facts).SerializeToString())

    def _value(self, entry: Entry) -> Any:
        value = self._protos.Summary.Value
        match entry:
            case Scalar():
                return value(tag=entry.tag, simple_value=entry.value)
            case CodeCounts():
                return value(tag=entry.tag, histo=self._histogram(entry))
            case Picture():
                return value(tag=entry.tag, image=self._image(entry))
            case Note():
                return self._text(entry)

    def _histogram(self, entry: CodeCounts) -> Any:
        """Return buckets by their upper edges; the first, which is empty, ends where the lowest cell begins."""
        edges, counts = entry.buckets()
        values, weights = entry.values, entry.counts
        return self._protos.HistogramProto(
            min=edges[0],
            max=edges[-1],
            num=float(counts.sum()),
            sum=float(values @ weights),
            sum_squares=float(np.square(values) @ weights),
            bucket_limit=edges.tolist(),
            bucket=[0.0, *counts.tolist()],
        )

    def _image(self, entry: Picture) -> Any:
        from PIL import Image

        pixels, file = entry.pixels, io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        height, width, _ = pixels.shape
        return self._protos.Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=file.getvalue()
        )

    def _text(self, entry: Note) -> Any:
        tensor = package("tensorboard.compat.proto.tensor_pb2", "tensorboard").TensorProto
        shape = package("tensorboard.compat.proto.tensor_shape_pb2", "tensorboard").TensorShapeProto
        plugin = self._protos.SummaryMetadata.PluginData(plugin_name="text")
        text = tensor(
            dtype="DT_STRING",
            string_val=[entry.text.encode()],
            tensor_shape=shape(dim=[shape.Dim(size=1)]),
        )
        metadata = self._protos.SummaryMetadata(plugin_data=plugin)
        return self._protos.Summary.Value(tag=f"{entry.tag}/text_summary", metadata=metadata, tensor=text)
