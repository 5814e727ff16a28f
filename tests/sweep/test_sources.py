"""Every source gives the same photographs, each with a name, in an order of its own."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from sweep.photographs import crops
from undertow import images
from undertow.errors import InputError, PhotographError
from undertow.sweep.sources import source_of


@pytest.fixture
def folder(tmp_path):
    crops(tmp_path / "photographs", 5)
    return tmp_path / "photographs"


@pytest.fixture
def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))


def expected(folder: Path, names: list[str]) -> list[np.ndarray]:
    return [np.asarray(Image.open(folder / name).convert("RGB")) for name in names]


def read_all(source) -> list[np.ndarray]:
    return [np.asarray(source.read(i)) for i in range(len(source.names))]


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_folder_and_files(folder, names):
    source = source_of(folder)
    assert (source.kind, list(source.names)) == ("folder", names)
    assert same(read_all(source), expected(folder, names))
    files = source_of([folder / "b", folder / names[0]])
    assert (files.kind, len(files.names)) == ("files", 3)
    assert same(read_all(files), expected(folder, [*names[3:], names[0]]))


def test_a_list_names_files_beside_it(folder, names):
    path = folder / "list.txt"
    path.write_text("\r\n".join([names[3], "", names[1], names[3], "gone.png"]) + "\n")
    source = source_of(str(path))
    assert list(source.names) == [names[3], names[1], "gone.png"]
    assert same([np.asarray(source.read(i)) for i in (0, 1)], expected(folder, [names[3], names[1]]))
    with pytest.raises(PhotographError, match=r"gone.png does not exist"):
        source.read(2)
    (folder / "empty.txt").write_text("\n")
    with pytest.raises(PhotographError, match=r"is empty; put a path in each line"):
        source_of(folder / "empty.txt")


@pytest.mark.parametrize("kind", ["path", "bytes", "hugging face"])
def test_a_column_of_parquet(folder, names, kind):
    raw = [(folder / name).read_bytes() for name in names]
    columns = {
        "path": names,
        "bytes": raw,
        "hugging face": [{"bytes": b, "path": n} for b, n in zip(raw, names, strict=True)],
    }
    pq.write_table(
        pa.table({"x": range(len(names)), "image": columns[kind]}), folder / "data.parquet", row_group_size=2
    )
    source = source_of(f"{folder / 'data.parquet'}:image")
    assert list(source.names) == ([str(n) for n in range(len(names))] if kind == "bytes" else names)
    assert same(read_all(source), expected(folder, names))
    with pytest.raises(InputError, match=r"no column 'nope' \(it has x, image\)"):
        source_of(f"{folder / 'data.parquet'}:nope")
    with pytest.raises(InputError, match=r"must hold paths, encoded images"):
        source_of(f"{folder / 'data.parquet'}:x")


def test_a_row_without_an_image_is_named(tmp_path):
    pq.write_table(pa.table({"image": pa.array([None, b"no image"], pa.binary())}), tmp_path / "data.parquet")
    source = source_of(f"{tmp_path / 'data.parquet'}:image")
    with pytest.raises(PhotographError, match=r"row 0 of .*data.parquet:image has no image"):
        source.read(0)
    with pytest.raises(PhotographError, match=r"row 1 of .*data.parquet:image is not a photograph"):
        source.read(1)


def test_tar_files_are_read_where_they_lie(folder, names, tmp_path):
    for number, some in enumerate((names[:2], names[2:])):
        with tarfile.open(tmp_path / f"train-{number:02d}.tar", "w") as tar:
            for name in some:
                tar.add(folder / name, name)
                label = tarfile.TarInfo(name.replace(".png", ".cls"))
                label.size = 1
                tar.addfile(label, io.BytesIO(b"3"))
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    source = source_of(str(tmp_path / "train-{00..01}.tar"))
    assert [name.rpartition(".tar/")[2] for name in source.names] == names
    assert same(read_all(source), expected(folder, names))
    assert list(source_of(tmp_path / "train-00.tar").names) == names[:2]
    assert list(source_of(str(tmp_path / "*.tar")).names) == list(source.names)
    (tmp_path / "no.tar").write_bytes(b"no tar file" * 100)
    with pytest.raises(PhotographError, match=r"is no tar file that can be read"):
        source_of(tmp_path / "no.tar")


def test_what_is_cut_off_of_a_tar_file_is_told_when_it_is_read(folder, names, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(folder / names[0], names[0])
    source = source_of(tmp_path / "a.tar")
    os.truncate(tmp_path / "a.tar", 700)
    with pytest.raises(PhotographError, match=rf"{names[0]} in .*a.tar"):
        source.read(0)


def test_a_data_set_gives_images_arrays_or_tuples_of_them(folder, names):
    class Squares(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            square = torch.full((3, 2, 2), float(index))
            with Image.open(folder / names[0]) as image:
                return [square, (square.numpy(), 7), image.copy(), "no image"][index]

    source = source_of(Squares())
    assert (source.kind, source.where, list(source.names)) == ("dataset", "Squares", ["0", "1", "2", "3"])
    assert source.read(0).tolist() == np.zeros((3, 2, 2)).tolist()
    assert source.read(1).mean() == 1
    assert np.array_equal(np.asarray(source.read(2)), expected(folder, names[:1])[0])
    with pytest.raises(PhotographError, match=r"item 3 of Squares is a str, no image and no array"):
        source.read(3)
    assert list(source_of(images.Folder(folder)).names) == names


@pytest.mark.parametrize("nothing", [[], 3, None, iter([])])
def test_what_is_no_source_is_refused(nothing):
    with pytest.raises(InputError, match=r"a sweep goes over a folder, files or a data set"):
        source_of(nothing)


def test_a_draft_reads_a_jpeg_smaller_and_a_png_as_it_is(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8)
    for suffix in ("jpg", "png"):
        Image.fromarray(noise).save(tmp_path / f"a.{suffix}")
    source = source_of([tmp_path / "a.jpg", tmp_path / "a.png"])
    assert [source.read(i, lambda w, h: (w // 4, h // 4)).size for i in (0, 1)] == [(128, 128), (512, 512)]
    assert source.read(0).size == (512, 512)
