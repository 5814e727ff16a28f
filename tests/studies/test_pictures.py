"""The sheet of pictures: each command is one of the tool's, and no picture is cut or covered."""

import importlib.util
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image

from undertow.cli import app

STUDY = Path(__file__).parents[2] / "studies" / "pictures.py"
spec = importlib.util.spec_from_file_location("pictures", STUDY)
pictures = importlib.util.module_from_spec(spec)
sys.modules["pictures"] = pictures
spec.loader.exec_module(pictures)


@pytest.mark.parametrize("line", [line for _, line in pictures.PICTURES])
def test_each_command_parses(line):
    words = shlex.split(line)
    command = app.commands[words[0]]
    with command.make_context(words[0], words[1:]) as context:
        assert context.command is command


def test_the_sheet_holds_each_picture_once(tmp_path):
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]
    made = []
    for i, colour in enumerate(colours):
        Image.new("RGB", (300 + 400 * i, 200 + 900 * (i == 2)), colour).save(tmp_path / f"{i}.png")
        made.append((tmp_path / f"{i}.png", "undertow " + "word " * 80))
    whole = pictures.sheet(made)
    assert whole.width == 3 * pictures.COLUMN + 4 * pictures.GAP
    areas = {}
    for count, colour in whole.getcolors(1 << 24):
        areas[colour] = count
    for (path, _), colour in zip(made, colours, strict=True):
        with Image.open(path) as picture:
            scale = min(pictures.COLUMN / picture.width, pictures.HIGHEST / picture.height)
            assert areas[colour] == round(picture.width * scale) * round(picture.height * scale)
