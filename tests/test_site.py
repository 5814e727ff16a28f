"""The documentation site: it builds without a warning, fetches nothing, has every page and every public name."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import undertow as ut

pytestmark = pytest.mark.xdist_group("site")  # which is built once
ROOT = Path(__file__).parent.parent
BROWSER = ["--no-sandbox", "--disable-gpu"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=quiet, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Fetched(HTMLParser):
    """Collects what a browser would fetch to show a page: anything but the target of a link."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        names = ("src", "srcset", "data", "poster", "action", *(("href",) if tag != "a" else ()))
        self.addresses += [value for name, value in attrs if name in names and value]


def test_no_page_fetches_anything_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        outside = [a for a in Fetched(page.read_text()).addresses if re.match(r"(\w+:)?//", a)]
        assert outside == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style.read_text()), style


def test_every_page_is_in_the_navigation(site):
    pages = {str(path.relative_to(ROOT / "docs").with_suffix(".html")) for path in (ROOT / "docs").rglob("*.md")}
    navigation = (site / "index.html").read_text()
    assert [page for page in sorted(pages) if f'href="{page}"' not in navigation] == []


def test_every_public_name_is_in_the_api(site):
    headings = "\n".join(path.read_text() for path in (site / "api").glob("*.html"))
    assert [name for name in ut.__all__ if not re.search(rf">\s*ut\.{name}\s*<", headings)] == []


def test_examples_of_docstrings_are_blocks_of_code(site):
    page = (site / "api" / "explain.html").read_text()
    assert "&gt;&gt;&gt;" in page
    assert "<blockquote>" not in page


LESSONS = sorted((ROOT / "docs" / "course").glob("[1-9]-*.md"))


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_ran_and_shows_what_it_prints_and_draws(site, lesson):
    page = (site / "course" / f"{lesson.stem}.html").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", lesson.read_text(), re.S | re.M)
    printing = [block for block in blocks if re.search(r"^print\(", block, re.M)]
    lasts = [block.splitlines()[-1] for block in blocks]
    shown = [line for line in lasts if re.fullmatch(r"[\w\[\]\"]+", line)]
    assert page.count('<div class="output highlight">') >= len(printing)
    assert page.count('<div class="output">') == len(shown)
    assert ("data:image/png;base64," in page) == ("a" in shown)  # maps; a trace is a table


@pytest.mark.slow
def test_a_browser_shows_and_searches_it_from_the_disk_and_asks_for_nothing(site):
    from playwright.sync_api import sync_playwright

    requests, errors = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=BROWSER)
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        for path in ("index.html", "explain.html", "models.html", "api/explain.html", "notebooks/tour.html"):
            page.goto((site / path).as_uri())
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
        page.set_viewport_size({"width": 1280, "height": 800})
        page.get_by_role("textbox", name="Search").fill("deconvnet")
        page.locator(".md-search-result__link").first.wait_for(timeout=20_000)
        browser.close()
    assert errors == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:", "about:"))] == []
