"""A headless Chromium from the system: Debian's package, or what $CHROMIUM names."""

import os
import shutil

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="session")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[browser]'")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium; apt install chromium, or set $CHROMIUM")
    with playwright.sync_playwright() as running:
        # Root has no sandbox in a container; the pages are ours, and nothing is fetched.
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, tmp_path):
    """Open markup at a width; yields the page, and what went wrong or was fetched."""
    opened = []

    def open_page(markup, width=1000, **options):
        (tmp_path / "page.html").write_text(markup, encoding="utf-8")
        page = chromium.new_page(viewport={"width": width, "height": 800}, **options)
        opened.append(page)
        trouble = []
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("dialog", lambda dialog: (trouble.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: trouble.append(request.url))
        page.goto((tmp_path / "page.html").as_uri())
        assert trouble.pop(0).endswith("page.html")
        return page, trouble

    yield open_page
    for page in opened:
        page.close()
