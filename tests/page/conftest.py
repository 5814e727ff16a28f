"""Debian's Chromium, which opens pages and lets no error and no request pass."""

import shutil
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run"]  # fmt: skip
DRAWN = "document.documentElement.dataset.drawn !== undefined"
# Keeps each chart's view on its element, so that a test can ask what is really drawn.
KEEP_VIEWS = """Object.defineProperty(window, "vegaEmbed", {
  configurable: true,
  get() { return this.embedding; },
  set(embed) {
    this.embedding = async (area, ...more) => {
      const made = await embed(area, ...more);
      area.view = made.view;
      return made;
    };
  },
});"""


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.fail("the page's tests drive Debian's Chromium, which is missing; run: make chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield one
        one.close()


@pytest.fixture
def opened(browser):
    """Open a file as a page; no console error, no page error, and no request but for the file itself."""
    contexts, wrong = [], []

    def told(message):
        if "willReadFrequently" not in message.text:  # which is the tests' own reading of pixels
            wrong.append(f"console {message.type}: {message.text}")

    def open_page(path: Path, **how):
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **how})
        contexts.append(context)
        context.add_init_script(KEEP_VIEWS)
        page = context.new_page()
        page.on("console", told)
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: asked.append(request.url))
        address, asked = path.resolve().as_uri(), []
        page.asked = asked
        page.goto(address)
        page.wait_for_function(DRAWN)
        page.address = address
        return page

    yield open_page
    for context in contexts:
        for page in context.pages:
            # blob: and data: are of the page itself, as its downloads are
            wrong += [f"asked for {url}" for url in page.asked
                      if url.split("#")[0] != page.address and not url.startswith(("data:", "blob:"))]  # fmt: skip
        context.close()
    assert wrong == []
