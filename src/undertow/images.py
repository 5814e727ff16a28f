"""Photographs in: files to upright RGB images, and images to the arrays that a network was trained on.

NumPy and Pillow only. `read` accepts what a person has (rotated, transparent, grey, palette, CMYK, 16-bit, animated);
`Preprocessing` makes of it, to the last bit, what torchvision and timm make of it.
"""

import ctypes
import importlib.util
import logging
import math
import os
import stat
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError, _imaging

from .display import FrozenRows, Part, ShownItem, ShownTable, brief, counted
from .errors import FrameworkError, InputError, ModelError, PhotographError, one_line, printable
from .installing import install_command

MAX_PIXELS = 178_956_970
"""Larger images are refused by their header alone; Pillow itself raises at the same size (half a gigabyte as RGB)."""

SUFFIXES = (".avif", ".bmp", ".gif", ".ico", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""The file names that `find` takes for photographs in a folder, in any case."""

# Named, not "all that Pillow knows": opening an EPS, for one, would hand the file to Ghostscript.
_FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


Photograph = str | os.PathLike[str] | Image.Image
"""A path, or what Pillow has opened."""


def read(photograph: Photograph | IO[bytes], draft: Callable[[int, int], tuple[int, int]] | None = None) -> Image.Image:
    """Read a photograph as a person sees it: upright, RGB, 8 bits a channel, transparency over white, first frame.

    Integer pixels of 16 bits are divided by 257; floating-point ones are taken as 0 to 1, or 0 to 255 where they
    exceed 1. Colour profiles are ignored, as the networks' own training did.

    Args:
        photograph: a path, what Pillow has opened, or a binary file, whose `name` is told where it cannot be read.
        draft: from width and height to a smaller width and height: a JPEG is decoded at a half, a quarter or an eighth
            of its size where that is no smaller. Quicker, and not the same to the last bit.

    Raises:
        PhotographError: the file is missing, empty, damaged, too large, or no photograph.
    """
    name = _name_of(photograph)
    if isinstance(photograph, str | os.PathLike):
        _refuse_non_file(Path(photograph), name)
    _silence_decoders()
    try:
        with without_warnings(), _opened(photograph) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if draft is not None:
                opened.draft("RGB", draft(*opened.size))
            opened.load()
            return _as_seen(opened)
    except Image.DecompressionBombError as error:
        raise PhotographError(f"{name} is too large: over {MAX_PIXELS:,} pixels; make it smaller first") from error
    except UnidentifiedImageError as error:
        raise PhotographError(f"{name} is not a photograph that can be read; save it as JPEG or PNG") from error
    except Exception as error:  # a damaged file can raise nearly anything in some decoder
        reason = one_line(error)
        raise PhotographError(f"{name} cannot be read ({reason}); save or copy it again as JPEG or PNG") from error


def find(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """List the photographs that files and folders name, each once: files as given, a folder's sorted, recursively.

    Hidden files, and folders reached through links, are left out. A file need not exist: `read` says so, one by one.

    Raises:
        PhotographError: nothing was given, or a folder holds no photograph or cannot be listed.
    """
    photographs = [photograph for path in paths for photograph in _expand(Path(path))]
    if not photographs:
        raise PhotographError("no photograph was given; name files or folders")
    return list(dict.fromkeys(photographs))


def demo_photographs() -> dict[str, Path]:
    """The four photographs of scikit-image, by name: chelsea (a cat), coffee, camera and rocket.

    Raises:
        FrameworkError: scikit-image is not installed.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise FrameworkError(f"scikit-image, which holds the photographs, is missing; run: {install_command('demo')}")
    folder = Path(spec.origin).parent / "data"
    return {Path(name).stem: folder / name for name in ("chelsea.png", "coffee.png", "camera.png", "rocket.jpg")}


@dataclass(frozen=True)
class Preprocessing:
    """How a photograph becomes a network's input: resize, centre crop, scale to [0, 1], normalise.

    Args:
        resize: pixels of the shorter side, the aspect ratio kept; or (height, width), the picture squashed.
        crop: side of the centred square in pixels, or (height, width); what is too small is padded with black.
        mean, std: per channel R, G, B, in units of [0, 1].
        interpolation: "nearest", "bilinear", "bicubic", "lanczos", "box" or "hamming", as Pillow does them.
        order: "RGB" or "BGR", of the channels that the network is given; `mean` and `std` are of R, G, B all the same.
        halves: where a crop begins that would begin at half a pixel: "even", as torchvision and timm round, or "down",
            as transformers does.

    Raises:
        ModelError: a value that cannot be used.

    >>> preprocessing = Preprocessing(resize=256, crop=224)
    >>> photograph = Image.new("RGB", (640, 480), "white")
    >>> preprocessing.view(photograph).shape, preprocessing.array(photograph).shape
    ((224, 224, 3), (3, 224, 224))
    """

    resize: int | tuple[int, int] = 256
    crop: int | tuple[int, int] = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"
    order: str = "RGB"
    halves: str = "even"

    def __post_init__(self) -> None:
        sizes = (*_pair(self.resize), *_pair(self.crop))
        if len(sizes) != 4 or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ModelError(f"resize {self.resize} and crop {self.crop} must be pixels, above 0, or (height, width)")
        if len(self.mean) != 3 or len(self.std) != 3 or 0 in self.std:
            raise ModelError(f"mean {self.mean} and std {self.std} must be three numbers each, no std of 0")
        if self.interpolation.upper() not in Image.Resampling.__members__:
            names = ", ".join(name.lower() for name in Image.Resampling.__members__)
            raise ModelError(f"unknown interpolation '{self.interpolation}'; it is one of {names}")
        if self.order not in ("RGB", "BGR"):
            raise ModelError(f"unknown order '{self.order}' of channels; it is RGB or BGR")
        if self.halves not in ("even", "down"):
            raise ModelError(f"unknown halves '{self.halves}' of pixels; they go even or down")

    def view(self, image: Image.Image) -> NDArray[np.uint8]:
        """Return a photograph as the network's input shows it: resized and cropped, uint8 (H, W, 3).

        Raises:
            PhotographError: so elongated that the resized picture would be too large.
        """
        image = _rgb(image) if image.mode != "RGB" else image
        size = self._resized(image.size)
        if size[0] * size[1] > MAX_PIXELS:
            raise PhotographError(f"a photograph of {image.width} x {image.height} pixels is too elongated; crop it")
        resized = image.resize(size, Image.Resampling[self.interpolation.upper()])
        return np.asarray(_centre(resized, _pair(self.crop), self.halves))

    def array(self, image: Image.Image) -> NDArray[np.float32]:
        """Return the network's input for one photograph: float32 (3, H, W), normalised. Raises as `view` does."""
        scaled = self.view(image).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
        mean, std = (np.asarray(values, np.float32).reshape(3, 1, 1) for values in (self.mean, self.std))
        normalised = (scaled - mean) / std
        return np.ascontiguousarray(normalised[::-1] if self.order == "BGR" else normalised)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for `result.json`; `Preprocessing(**d)` gives the same preprocessing back.

        >>> Preprocessing(**Preprocessing(resize=232).to_dict()) == Preprocessing(resize=232)
        True
        """
        facts: dict[str, Any] = {"resize": self.resize, "crop": self.crop, "mean": self.mean, "std": self.std}
        facts |= {"interpolation": self.interpolation, "order": self.order}
        return facts | ({} if self.halves == "even" else {"halves": self.halves})

    def draft(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height below which a photograph of this size must not be reduced: see `read`."""
        return self._resized((width, height))

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return width and height after the resize, rounded down as torchvision does."""
        if not isinstance(self.resize, int):
            return self.resize[1], self.resize[0]
        width, height = size
        other = int(self.resize * max(size) / min(size))
        return (self.resize, other) if width <= height else (other, self.resize)


class Preparation(Protocol):
    """How photographs are prepared for a network, as a `Classifier` knows it."""

    @property
    def preprocessing(self) -> Preprocessing: ...

    @property
    def channels_last(self) -> bool: ...


class Folder(ShownItem):
    """The photographs of a folder, each read when it is asked for: `folder[i]` is `(array, label, name)`.

    The array is float32, prepared for a network: `(3, H, W)`, or `(H, W, 3)` for a Keras classifier. The label is the
    index in `classes` of the photograph's folder at the first level, -1 for one that lies in none. The name is its
    path relative to the folder. A torch `DataLoader` takes it as a data set, with workers too, and makes tensors of
    arrays and labels.

    Args:
        path: of the folder; photographs are found as by `find`, sorted.
        preparation: a classifier, a `Preprocessing`, or a function of the upright RGB Pillow image, such as a
            transform of torchvision. By default the `Preprocessing` of most ImageNet networks.

    Attributes:
        path: of the folder.
        names: the photographs' names, in order.
        classes: the names of the folders at the first level that hold photographs, sorted.

    Raises:
        PhotographError: the path is no folder, or holds no photograph; from `folder[i]`: the photograph, named, cannot
            be read.
        InputError: the preparation is none of these.

    >>> folder = Folder(demo_photographs()["chelsea"].parent, Preprocessing(resize=32, crop=32))
    >>> array, label, name = folder[folder.names.index("chelsea.png")]
    >>> array.shape, label, name
    ((3, 32, 32), -1, 'chelsea.png')
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        preparation: Preparation | Preprocessing | Callable[[Image.Image], Any] | None = None,
    ) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            reason = "is no folder; read takes a photograph" if self.path.exists() else "does not exist; check the name"
            raise PhotographError(f"{printable(path)} {reason}")
        relative = [photograph.relative_to(self.path) for photograph in find([self.path])]
        self.names = FrozenRows(map(str, relative))
        self.classes = FrozenRows(sorted({name.parts[0] for name in relative if len(name.parts) > 1}))
        self._prepare, self._channels_last = _prepare_function(preparation)

    def __len__(self) -> int:
        return len(self.names)

    def _shown(self) -> Iterator[Part]:
        yield f"Folder {str(self.path)!r}: {counted(len(self), 'photograph')}, {len(self.classes):,} classes"
        yield ShownTable(("", ""), [("names", brief(self.names)), ("classes", brief(self.classes))], 2)

    def __getitem__(self, index: int) -> tuple[Any, int, str]:
        name = self.names[index]
        values = self._prepare(read(self.path / name))
        if self._channels_last:
            values = np.ascontiguousarray(values.transpose(1, 2, 0))
        folder, *within = Path(name).parts
        return values, self.classes.index(folder) if within else -1, name

    def __iter__(self) -> Iterator[tuple[Any, int, str]]:
        return map(self.__getitem__, range(len(self)))


def _prepare_function(preparation: Any) -> tuple[Callable[[Image.Image], Any], bool]:
    """Return the function of an image, and whether the channels of what it returns are to be put last.

    A classifier itself is not kept, lest its network go to each of a loader's workers.
    """
    if preparation is None:
        return Preprocessing().array, False
    if isinstance(preparation, Preprocessing):
        return preparation.array, False
    if callable(preparation):
        return preparation, False
    if isinstance(getattr(preparation, "preprocessing", None), Preprocessing):
        return preparation.preprocessing.array, preparation.channels_last
    kind = type(preparation).__name__
    raise InputError(f"photographs cannot be prepared by a {kind}; pass a classifier, a Preprocessing or a function")


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _centre(image: Image.Image, size: tuple[int, int], halves: str) -> Image.Image:
    """Crop the centre, (height, width); torchvision's padding: to the left first."""
    height, width = size
    left, top = (max(0, want - have) // 2 for want, have in zip((width, height), image.size, strict=True))
    if width > image.width or height > image.height:
        padded = Image.new("RGB", (max(width, image.width), max(height, image.height)))
        padded.paste(image, (left, top))
        image = padded
    rounded = round if halves == "even" else math.floor
    x, y = rounded((image.width - width) / 2), rounded((image.height - height) / 2)
    return image.crop((x, y, x + width, y + height))


def _expand(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    try:
        photographs = sorted(_within(path))
    except OSError as error:
        raise PhotographError(f"{printable(path)} cannot be listed ({error.strerror}); check your rights") from error
    if not photographs:
        raise PhotographError(f"no photograph in the folder {printable(path)}; it must hold .jpg, .png or the like")
    return photographs


def _within(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield Path(parent, name)


def _refuse_non_file(path: Path, name: str) -> None:
    with suppress(OSError, ValueError):
        facts = os.stat(path)
        if stat.S_ISREG(facts.st_mode) and facts.st_size:
            return
    if path.is_dir():
        raise PhotographError(f"{name} is a folder, not a photograph; name the files in it")
    if not os.path.lexists(path):
        raise PhotographError(f"{name} does not exist; check the name")
    if not path.is_file():
        raise PhotographError(f"{name} is not a regular file, or a link to nothing; name a file")
    if path.stat().st_size == 0:
        raise PhotographError(f"{name} is empty (0 bytes); copy it again")


@cache
def _silence_decoders() -> None:
    """Keep Pillow's log, libtiff and the libjpeg in it from lines of their own on stderr; Pillow raises what they mean.

    libtiff's handlers are those of the copy that Pillow is linked with. Where that hides them, the lines remain.
    """
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # logs that somebody set up get them all the same
    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(_imaging.__file__)
        for set_handler in (library.TIFFSetErrorHandler, library.TIFFSetWarningHandler):
            set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            set_handler(None)


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _name_of(photograph: Photograph | IO[bytes]) -> str:
    if isinstance(photograph, Image.Image):
        return "the Pillow image"
    is_path = isinstance(photograph, str | os.PathLike)
    return printable(photograph if is_path else getattr(photograph, "name", "the image"))


def _opened(photograph: Photograph | IO[bytes]) -> AbstractContextManager[Image.Image]:
    """Open a file, to be closed again; leave what a caller has opened to the caller."""
    if isinstance(photograph, Image.Image):
        return nullcontext(photograph)
    return Image.open(photograph, formats=_formats())


def _as_seen(image: Image.Image) -> Image.Image:
    """Return an upright RGB copy, without the metadata that would turn it once more."""
    copy = _rgb(_upright(image))
    copy.info.clear()
    return copy


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF damages no pixel: leave the photograph as stored, as viewers do
        orientation = 1
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _rgb(image: Image.Image) -> Image.Image:
    """An 8-bit RGB copy of an image of any mode."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit integers (65,535 is white) or floats (1 or 255 is white) to 8 bits; refuse all others."""
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    white = _white(image.mode, high)
    if not 0 <= low <= high <= white:
        raise ValueError(f"its values go from {low:g} to {high:g} and no white point is known")
    if image.mode != "F" and 0 < high < 256:
        raise ValueError(f"its values go to {high:g} of 65535, nearly black: probably 8 bits stored as more")
    if "transparency" in image.info and image.mode != "F":
        values[values == image.info["transparency"]] = white
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))


def _white(mode: str, high: float) -> float:
    return 65535.0 if mode != "F" else 1.0 if high <= 1 else 255.0


_lock = threading.Lock()
_filters = ExitStack()
_readers = 0


@contextmanager
def without_warnings() -> Iterator[None]:
    """Suppress Pillow's warnings. The filters are per process: the first thread sets them, the last resets them.

    Who reads in threads, and sets filters in another meanwhile, enters this around both.
    """
    global _readers
    if getattr(sys.flags, "context_aware_warnings", False):  # from Python 3.14 on, the filters can be the thread's own
        with warnings.catch_warnings(action="ignore"):
            yield
        return
    with _lock:
        _readers += 1
        if _readers == 1:
            _filters.enter_context(warnings.catch_warnings(action="ignore"))
    try:
        yield
    finally:
        with _lock:
            _readers -= 1
            if not _readers:
                _filters.close()
