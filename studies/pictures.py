"""Every kind of picture that the command makes, on real photographs, on one sheet.

    python studies/pictures.py --out runs/pictures --sheet docs/pictures.jpg

Needs `pip install ".[demo,record,plot,derive]"` and nothing from the network. What is there already in `--out` is not
made again: the verdict takes some minutes on two processors.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import undertow as ut

COLUMN, GAP, LINE, HIGHEST = 960, 24, 22, 1100  # pixels
PAPER, INK = (232, 232, 236), (24, 24, 27)
CHAIN = "x1>n1 x2>n2 n1>n3 n1>n4 n2>n3 n2>n4 n3>n5 n3>n6 n4>n5 n4>n6"
RECORD = "record {} --model demo --sites conv[:6] --measure histogram --out runs/{}"

# the picture that a command makes, "" where another command needs what it makes, and the command
CAM = "explain photographs/coffee.png --model demo --rule gradient --estimator grad-cam:_conv_head --target top:2"
PICTURES = (
    ("maps/chelsea/panel.png", "explain photographs/chelsea.png --model demo --out maps"),
    ("blocks.png", "derive model --model torchvision:resnet18@none --depth 3 --wrt layer2.0.add --plot blocks.png"),
    ("cam/coffee/panel.png", f"{CAM} --ground dark --out cam"),
    ("trust/chelsea/verdict-guided.png", "trust photographs/chelsea.png --model demo --out trust"),
    ("", RECORD.format("photographs", "demo")),
    ("", RECORD.format("one", "chelsea")),
    ("", RECORD.format("other", "rocket")),
    ("quantiles.png", "quantiles runs/demo --from .5 --to .9 --step .2 --plot quantiles.png"),
    ("compare.png", "compare runs/chelsea runs/rocket --from .5 --to .9 --step .2 --plot compare.png"),
    ("curves.png", "quantiles runs/demo --panels layer --ground dark --plot curves.png"),
    ("curves-compare.png", "compare runs/chelsea runs/rocket --plot curves-compare.png"),
    ("chain.png", f"derive chain '{CHAIN}' --wrt 'x1[d]' --plot chain.png"),
)


def make(out: Path) -> list[tuple[Path, str]]:
    """Run the commands in a folder; return each picture with its caption.

    Raises:
        subprocess.CalledProcessError: a command failed.
    """
    for folder, names in {"photographs": None, "one": ["chelsea"], "other": ["rocket"]}.items():
        (out / folder).mkdir(parents=True, exist_ok=True)
        for name, path in ut.images.demo_photographs().items():
            if names is None or name in names:
                shutil.copy(path, out / folder)
    pictures = []
    for file, line in PICTURES:
        words = shlex.split(line)
        made = out / (file or words[words.index("--out") + 1])
        if not made.exists():
            subprocess.run([sys.executable, "-m", "undertow", *words], cwd=out, check=True, stdout=subprocess.DEVNULL)
        if file:
            pictures.append((made, f"undertow {line}"))
    return pictures


def sheet(pictures: Sequence[tuple[Path, str]], columns: int = 3) -> Image.Image:
    """Lay pictures into columns of one width, each under its caption, in the order given, the shortest column next."""
    font = ImageFont.load_default(16)
    tiles = [_tile(path, caption, font) for path, caption in pictures]
    tops = [GAP] * columns
    places = []
    for tile in tiles:
        column = tops.index(min(tops))
        places.append((GAP + column * (COLUMN + GAP), tops[column]))
        tops[column] += tile.height + GAP
    whole = Image.new("RGB", (GAP + columns * (COLUMN + GAP), max(tops)), PAPER)
    for tile, place in zip(tiles, places, strict=True):
        whole.paste(tile, place)
    return whole


def _tile(path: Path, caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Image.Image:
    """Return a picture as wide as a column, or as high as is allowed, under its caption."""
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= COLUMN else [*lines, f"    {word}"]
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    scale = min(COLUMN / picture.width, HIGHEST / picture.height)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
    tile = Image.new("RGB", (COLUMN, LINE * len(lines) + 4 + picture.height), PAPER)
    ImageDraw.Draw(tile).multiline_text((0, 0), "\n".join(lines), INK, font, spacing=LINE - 16)
    tile.paste(picture, ((COLUMN - picture.width) // 2, LINE * len(lines) + 4))
    return tile


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--sheet", type=Path, required=True, metavar="FILE", help="a .jpg or .png")
    args = parser.parse_args(words)
    whole = sheet(make(args.out))
    whole.save(args.sheet, quality=72)
    print(f"{args.sheet}: {whole.width} x {whole.height}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
