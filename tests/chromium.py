"""A real Chromium for tests: the installed one, driven by Playwright, whose own ones are not fetched."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, sync_playwright

REQUIRED = "PRAD_REQUIRE_CHROMIUM"
_NAMES = ("chromium", "chromium-browser", "google-chrome")


def binary() -> str:
    """Skips the test, loudly, where there is none; fails it where one is required."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        reason = (
            "NOT RUN: there is no Chromium here, so the registry's console was not tested in a browser; "
            f"install one (Debian: apt-get install chromium). {REQUIRED}=1 makes this a failure"
        )
        if os.environ.get(REQUIRED):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@contextmanager
def browsing() -> Iterator[Browser]:
    """Headless. As root, as in containers, it has no sandbox of its own: it loads our pages only."""
    executable = binary()
    sandbox = [] if os.geteuid() else ["--no-sandbox"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=sandbox)
        try:
            yield browser
        finally:
            browser.close()
