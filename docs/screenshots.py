"""Make the pictures of the page that README and docs show, from the real demo, in Debian's Chromium.

    python docs/screenshots.py [--demo FOLDER]

Writes `docs/report-light.png` and `docs/report-dark.png`.
"""

import argparse
import io
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).parent
CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
SIZE = {"width": 1280, "height": 860}
COLOURS = 256  # of a picture's palette, which keeps it below 400 kB


def explanations(page: Page) -> None:
    """Show the maps of the rule guided."""
    page.get_by_role("radio", name="guided").check()


def gradients(page: Page) -> None:
    """Show the layers' chart and the findings."""
    page.get_by_role("link", name="Gradients").click()


PICTURES = {"light": explanations, "dark": gradients}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="a folder that `undertow demo --out` wrote; else it is run")
    demo = parser.parse_args().demo
    if demo is None:
        demo = Path(tempfile.mkdtemp()) / "demo"
        subprocess.run([sys.executable, "-m", "undertow", "demo", "--out", demo], check=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=CHROMIUM)
        for theme, prepare in PICTURES.items():
            page = browser.new_page(viewport=SIZE, color_scheme=theme)
            page.goto((demo / "report.html").resolve().as_uri())
            page.wait_for_function("document.documentElement.dataset.drawn")
            prepare(page)
            page.wait_for_timeout(1000)
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            path = HERE / f"report-{theme}.png"
            picture.quantize(COLOURS, kmeans=2).save(path, optimize=True)
            print(f"{path} ({path.stat().st_size / 1e3:.0f} kB)")
        browser.close()


if __name__ == "__main__":
    main()
