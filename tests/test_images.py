"""Photographs in: each kind of file that people have, each kind of bad one, and the arrays that networks expect."""

import os
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from undertow import images
from undertow.errors import FrameworkError, InputError, ModelError, PhotographError
from undertow.frameworks.torch.zoo import classifiers, importing
from undertow.images import Preprocessing, demo_photographs, find, read

PHOTOGRAPHS = demo_photographs()


@pytest.fixture(scope="module")
def chelsea() -> Image.Image:
    return Image.open(PHOTOGRAPHS["chelsea"]).convert("RGB").resize((90, 60))


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def png(path: Path, *chunks: tuple[bytes, bytes]) -> Path:
    """Write a PNG by hand, chunk by chunk."""
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def header(width: int, height: int, depth: int, colour: int) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_real_photographs_are_read_as_pillow_shows_them(name: str) -> None:
    expected = Image.open(PHOTOGRAPHS[name]).convert("RGB")
    assert np.array_equal(pixels(read(PHOTOGRAPHS[name])), pixels(expected))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_exif_rotation_is_undone(orientation: int, suffix: str, tmp_path: Path, chelsea: Image.Image) -> None:
    # What a camera stores so that the given orientation shows `chelsea` upright: the inverse, spelt in NumPy.
    store: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(store[orientation](np.asarray(chelsea))))
    stored.save(tmp_path / f"rotated{suffix}", exif=exif, quality=95, subsampling=0)
    seen = read(tmp_path / f"rotated{suffix}")
    assert seen.size == chelsea.size
    assert np.abs(pixels(seen) - pixels(chelsea)).mean() < (3 if suffix == ".jpg" else 1e-9)


def test_damaged_exif_does_not_hide_the_photograph(tmp_path: Path, chelsea: Image.Image) -> None:
    chelsea.save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff broken")
    assert read(tmp_path / "a.jpg").size == chelsea.size


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_over_white(mode: str, tmp_path: Path) -> None:
    grey = (100, 100, 100, 128) if mode == "RGBA" else (100, 128)
    Image.new(mode, (2, 2), grey).save(tmp_path / "half.png")
    assert np.abs(pixels(read(tmp_path / "half.png")) - (100 * 128 + 255 * 127) / 255).max() <= 1
    Image.new(mode, (2, 2), 0).save(tmp_path / "clear.png")
    assert (pixels(read(tmp_path / "clear.png")) == 255).all()


def test_transparent_palette_grey_and_rgb_lie_over_white(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    palette.save(tmp_path / "p.gif", transparency=0)
    palette.save(tmp_path / "bytes.png", transparency=b"\x00\xff")
    for name in ("p.png", "p.gif", "bytes.png"):
        assert pixels(read(tmp_path / name)).tolist() == [[[255, 255, 255], [40, 50, 60]]], name
    palette.convert("RGB").save(tmp_path / "rgb.png", transparency=(10, 20, 30))
    assert pixels(read(tmp_path / "rgb.png")).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    Image.frombytes("L", (2, 1), b"\x07\x09").save(tmp_path / "l.png", transparency=7)
    assert pixels(read(tmp_path / "l.png"))[0, :, 0].tolist() == [255, 9]


def test_grey_palette_bilevel_and_cmyk(tmp_path: Path, chelsea: Image.Image) -> None:
    chelsea.convert("L").save(tmp_path / "l.png")
    assert np.array_equal(pixels(read(tmp_path / "l.png"))[..., 1], np.asarray(chelsea.convert("L")))
    quantised = chelsea.quantize(64)
    quantised.save(tmp_path / "p.png")
    assert np.array_equal(pixels(read(tmp_path / "p.png")), pixels(quantised.convert("RGB")))
    Image.new("1", (8, 1), 1).save(tmp_path / "one.png")
    assert (pixels(read(tmp_path / "one.png")) == 255).all()
    chelsea.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=98, subsampling=0)
    assert np.abs(pixels(read(tmp_path / "cmyk.jpg")) - pixels(chelsea)).mean() < 4
    chelsea.convert("CMYK").save(tmp_path / "cmyk.tif")
    assert np.abs(pixels(read(tmp_path / "cmyk.tif")) - pixels(chelsea)).max() <= 1


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bits_are_scaled_not_clipped(suffix: str, tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257, 300, 32768, 65278, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep{suffix}")
    assert pixels(read(tmp_path / f"deep{suffix}"))[0, :, 2].tolist() == [0, 0, 1, 1, 1, 128, 254, 255]


def test_sixteen_bits_big_endian_transparent_and_in_colour(tmp_path: Path) -> None:
    Image.frombytes("I;16B", (2, 1), b"\x01\x01\xff\xff").save(tmp_path / "b.tif")
    assert pixels(read(tmp_path / "b.tif"))[0, :, 0].tolist() == [1, 255]
    row = zlib.compress(b"\0" + struct.pack(">2H", 7, 2570))
    deep = png(tmp_path / "t.png", header(2, 1, 16, 0), (b"tRNS", b"\0\7"), (b"IDAT", row), (b"IEND", b""))
    assert pixels(read(deep))[0, :, 0].tolist() == [255, 10]
    row = zlib.compress(b"\0" + struct.pack(">3H", 0, 32896, 65535))
    rgb = png(tmp_path / "rgb.png", header(1, 1, 16, 2), (b"IDAT", row), (b"IEND", b""))
    assert pixels(read(rgb)).tolist() == [[[0, 128, 255]]]


@pytest.mark.parametrize(("values", "expected"), [([0, 0.5, 1], [0, 128, 255]), ([0, 100.4, 255], [0, 100, 255])])
def test_floats_are_0_to_1_or_0_to_255(values: list[float], expected: list[int], tmp_path: Path) -> None:
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "f.tif")
    assert pixels(read(tmp_path / "f.tif"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 70000]], np.int32), "go from 0 to 70000 and no white"),
        (np.array([[-5, 300]], np.int32), "go from -5 to 300"),
        (np.array([[0, 255]], np.int32), "nearly black"),
        (np.array([[0.5, np.nan]], np.float32), "nan"),
        (np.array([[0.5, 256]], np.float32), "to 256 and no white"),
    ],
)
def test_values_without_a_known_white_are_refused(values: np.ndarray, message: str, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "f.tif")
    with pytest.raises(PhotographError, match=message):
        read(tmp_path / "f.tif")


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_first_frame_of_an_animation(suffix: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    assert pixels(read(tmp_path / f"a{suffix}"))[3, 3].tolist() == [255, 0, 0]


def test_what_is_read_holds_no_file_and_forgets_rotation(tmp_path: Path, chelsea: Image.Image) -> None:
    chelsea.save(tmp_path / "a.png")
    image = read(tmp_path / "a.png")
    (tmp_path / "a.png").unlink()
    image.resize((3, 3)).rotate(90)
    assert type(image) is Image.Image


def bad(folder: Path) -> dict[str, tuple[Path, str]]:
    whole = PHOTOGRAPHS["rocket"].read_bytes()
    bomb = png(folder / "bomb.png", header(50_000, 50_000, 8, 2), (b"IDAT", zlib.compress(b"\0" * 9)), (b"IEND", b""))
    files: dict[str, tuple[str, bytes, str]] = {
        "empty": ("e.jpg", b"", "is empty"),
        "truncated": ("t.jpg", whole[: len(whole) // 2], "truncated"),
        "truncated png": ("t.png", PHOTOGRAPHS["chelsea"].read_bytes()[:90_000], "cannot be read"),
        "header alone": ("h.jpg", whole[:20], "is not a photograph"),
        "text": ("a.png", b"hello, world\n" * 20, "is not a photograph"),
        "svg": ("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a photograph"),
        "postscript": ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a photograph"),
        "two lines": ("two\nlines.jpg", b"x", r"two\\nlines.jpg is not"),
        "no text": ("\udcff.jpg", b"x", r"\\udcff.jpg is not"),
    }
    for name, data, _ in files.values():
        (folder / name).write_bytes(data)
    (folder / "dangling.jpg").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.jpg")
    return {key: (folder / name, message) for key, (name, _, message) in files.items()} | {
        "bomb": (bomb, "is too large: over 178,956,970 pixels; make it smaller"),
        "missing": (folder / "missing.jpg", "does not exist; check the name"),
        "folder": (folder, "is a folder"),
        "dangling": (folder / "dangling.jpg", "a link to nothing"),
        "pipe": (folder / "pipe.jpg", "not a regular file"),
    }


def test_each_bad_file_is_one_line_with_its_name(tmp_path: Path) -> None:
    for key, (path, message) in bad(tmp_path).items():
        with pytest.raises(PhotographError, match=message) as caught:
            read(path)
        assert "\n" not in str(caught.value), key
        assert str(caught.value).isprintable(), key
        assert str(caught.value).startswith(str(tmp_path)), key
        assert ";" in str(caught.value) or key == "empty", f"no remedy: {caught.value}"


def test_a_large_photograph_is_no_bomb_and_a_larger_one_is(tmp_path: Path) -> None:
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")  # Pillow warns here: over 89 million pixels
    assert read(tmp_path / "large.png").size == (10_000, 10_000)
    over = png(tmp_path / "over.png", header(13_378, 13_378, 1, 0), (b"IDAT", b""), (b"IEND", b""))
    with pytest.raises(PhotographError, match="too large"):
        read(over)


def test_a_limit_that_pillow_has_lost_still_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(PhotographError, match="too large"):
        read(png(tmp_path / "bomb.png", header(50_000, 50_000, 8, 2), (b"IDAT", b""), (b"IEND", b"")))


def test_threads_leave_the_warning_filters_alone(tmp_path: Path, chelsea: Image.Image) -> None:
    chelsea.save(tmp_path / "a.png")
    before, shown = list(warnings.filters), warnings.showwarning
    threads = [threading.Thread(target=lambda: [read(tmp_path / "a.png") for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before
    assert warnings.showwarning is shown
    assert images._readers == 0


SIZES = [(451, 300), (300, 451), (224, 224), (256, 256), (257, 255), (33, 90), (1000, 61), (5, 4), (501, 500)]


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_array_equals_torchvision_to_the_last_bit(name: str, interpolation: str) -> None:
    torchvision = importing.import_torchvision()
    mode = torchvision.transforms.InterpolationMode(interpolation)
    for resize, crop in [(256, 224), (232, 224), (342, 299), (224, 224), (64, 97)]:  # the last one pads
        theirs = torchvision.transforms._presets.ImageClassification(
            crop_size=crop, resize_size=resize, interpolation=mode
        )
        ours = Preprocessing(resize, crop, interpolation=interpolation)
        photograph = read(PHOTOGRAPHS[name])
        for image in [photograph, *(photograph.resize(size) for size in SIZES)]:
            assert np.array_equal(ours.array(image), theirs(image).numpy()), (resize, crop, image.size)
    assert ours.array(photograph).dtype == np.float32


def test_every_pixel_value_is_normalised_as_torch_does() -> None:
    transforms = importing.import_torchvision().transforms
    ramp = Image.fromarray(np.arange(256 * 3, dtype=np.uint16).reshape(16, 16, 3).astype(np.uint8))
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])(ramp).numpy()
    assert np.array_equal(Preprocessing(16, 16, mean, std).array(ramp), theirs)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_array_equals_timm_to_the_last_bit(name: str, crop_mode: str) -> None:
    timm = importing.import_timm()
    for size, crop_pct, interpolation in [(224, 0.95, "bicubic"), (224, 0.875, "bilinear"), (288, 1.0, "bicubic")]:
        config = {"crop_pct": crop_pct, "interpolation": interpolation, "crop_mode": crop_mode}
        config |= {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.7)}
        theirs = timm.data.create_transform(input_size=(3, size, size), **config)
        ours = classifiers._timm_preprocessing("some", {"input_size": (3, size, size), **config})
        photograph = read(PHOTOGRAPHS[name])
        for image in [photograph, *(photograph.resize(size) for size in SIZES)]:
            assert np.array_equal(ours.array(image), theirs(image).numpy()), (size, crop_pct, image.size)


def test_crop_modes_that_are_not_supported_say_so() -> None:
    config = {"crop_pct": 1, "interpolation": "bilinear", "mean": (0, 0, 0), "std": (1, 1, 1), "crop_mode": "border"}
    with pytest.raises(ModelError, match=r"timm:some crops its input .* by 'border'"):
        classifiers._timm_preprocessing("some", {"input_size": (3, 8, 8), **config})
    with pytest.raises(ModelError, match="'center'"):
        classifiers._timm_preprocessing("some", {"input_size": (3, 8, 9), **config, "crop_mode": "center"})


def test_view_is_what_array_normalises(chelsea: Image.Image) -> None:
    preprocessing = Preprocessing(40, (24, 30))
    view, array = preprocessing.view(chelsea), preprocessing.array(chelsea)
    assert view.dtype == np.uint8
    assert view.shape == (24, 30, 3)
    mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
    assert np.abs(array.transpose(1, 2, 0) - (view / 255 - mean) / std).max() < 1e-6
    assert np.array_equal(
        preprocessing.view(chelsea.convert("L")), preprocessing.view(chelsea.convert("L").convert("RGB"))
    )


def test_a_photograph_too_elongated_to_resize_is_refused() -> None:
    with pytest.raises(PhotographError, match="3 x 9000000 pixels is too elongated"):
        Preprocessing().view(Image.new("1", (3, 9_000_000)).convert("RGB"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"resize": 0},
        {"crop": (3, 0)},
        {"crop": "224"},
        {"mean": (0.5,)},
        {"std": (1, 0, 1)},
        {"interpolation": "spline"},
    ],
)
def test_preprocessing_refuses_nonsense(wrong: dict[str, object]) -> None:
    with pytest.raises(ModelError):
        Preprocessing(**wrong)  # type: ignore[arg-type]


def test_find_expands_folders_sorted_and_once(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/1.png", "a.tiff", "notes.txt", ".hidden.png", ".git/x.png", "b/._1.png", "c/d/3.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = [path.relative_to(tmp_path).as_posix() for path in find([tmp_path])]
    assert names == ["a.tiff", "b/1.png", "b/2.JPG", "c/d/3.webp"]
    given = [tmp_path / "notes.txt", tmp_path / "b/1.png", tmp_path / "b", tmp_path / "missing.jpg"]
    names = [path.relative_to(tmp_path).as_posix() for path in find(given)]
    assert names == ["notes.txt", "b/1.png", "b/2.JPG", "missing.jpg"]


def test_finding_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="no photograph in the folder"):
        find([tmp_path])
    with pytest.raises(InputError, match="no photograph was given"):
        find([])


def test_demo_photographs_exist_or_say_how(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(PHOTOGRAPHS) == ["chelsea", "coffee", "camera", "rocket"]
    assert all(path.is_file() for path in PHOTOGRAPHS.values())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FrameworkError, match=r'run: pip install "undertow\[demo\]"'):
        demo_photographs()


@pytest.fixture
def pets(tmp_path: Path, chelsea: Image.Image) -> Path:
    """Two photographs of each of two classes, one of them deeper, and one of none."""
    for name in ("dog/b.png", "cat/a.png", "cat/deep/c.png", "dog/a.jpg", "e.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        chelsea.save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_a_folder_gives_arrays_labels_and_names(pets: Path, chelsea: Image.Image) -> None:
    folder = images.Folder(pets, Preprocessing(16, 16))
    assert (folder.classes, len(folder)) == (("cat", "dog"), 5)
    rows = list(folder)
    assert [row[1:] for row in rows] == [(0, "cat/a.png"), (0, "cat/deep/c.png"), (1, "dog/a.jpg"), (1, "dog/b.png"),
                                         (-1, "e.png")]  # fmt: skip
    assert np.array_equal(rows[0][0], Preprocessing(16, 16).array(chelsea))
    assert folder[-1][2] == "e.png"
    with pytest.raises(IndexError):
        folder[5]


def test_a_folder_reads_nothing_before_it_is_asked(pets: Path) -> None:
    (pets / "cat" / "a.png").write_bytes(b"no photograph")
    folder = images.Folder(pets)
    assert folder[1][0].shape == (3, 224, 224)
    with pytest.raises(PhotographError, match=r"cat/a\.png is not a photograph that can be read"):
        folder[0]


def test_a_folder_is_prepared_by_a_classifier_or_a_function(pets: Path, chelsea: Image.Image) -> None:
    from undertow.models import load

    classifier = load("torchvision:squeezenet1_1@none")
    prepared = images.Folder(pets, classifier)[0][0]
    assert np.array_equal(prepared[None], classifier.prepare(chelsea).numpy())
    assert images.Folder(pets, lambda image: image.size)[0] == ((90, 60), 0, "cat/a.png")


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_folder_works_in_a_loader_with_workers(pets: Path, context: str) -> None:
    import torch

    folder = images.Folder(pets, Preprocessing(16, 16))
    loader = torch.utils.data.DataLoader(folder, batch_size=2, num_workers=1, multiprocessing_context=context)
    batches = list(loader)
    assert [tuple(x.shape) for x, _, _ in batches] == [(2, 3, 16, 16), (2, 3, 16, 16), (1, 3, 16, 16)]
    assert torch.cat([labels for _, labels, _ in batches]).tolist() == [0, 0, 1, 1, -1]
    assert [name for _, _, names in batches for name in names] == list(folder.names)
    assert np.array_equal(batches[0][0][0].numpy(), folder[0][0])


def test_a_loader_names_the_photograph_that_cannot_be_read(pets: Path) -> None:
    import torch

    (pets / "dog" / "a.jpg").write_bytes(b"no photograph")
    loader = torch.utils.data.DataLoader(images.Folder(pets, Preprocessing(16, 16)), 2, num_workers=1)
    with pytest.raises(PhotographError, match=r"dog/a\.jpg is not a photograph that can be read"):
        list(loader)


@pytest.mark.parametrize(
    ("path", "preparation", "message"),
    [
        ("nowhere", None, "nowhere does not exist; check the name"),
        ("e.png", None, r"e\.png is no folder; read takes a photograph"),
        ("empty", None, "no photograph in the folder"),
        (".", "imagenet", "cannot be prepared by a str; pass a classifier, a Preprocessing or a function"),
    ],
)
def test_a_folder_that_cannot_be_is_refused(pets: Path, path: str, preparation: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        images.Folder(pets / path, preparation)  # type: ignore[arg-type]


@pytest.mark.parametrize("compression", ["tiff_deflate", "group4", "tiff_lzw", "jpeg", "packbits"])
def test_decoders_write_no_lines_of_their_own(
    compression: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (60, 50, 3), np.uint8))
    (image.convert("1") if compression == "group4" else image).save(tmp_path / "whole.tif", compression=compression)
    whole = (tmp_path / "whole.tif").read_bytes()
    for _ in range(40):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 5):
            damaged[place] = int(rng.integers(256))
        (tmp_path / "damaged.tif").write_bytes(damaged)
        with suppress(PhotographError):
            read(tmp_path / "damaged.tif")
    assert capfd.readouterr() == ("", "")
