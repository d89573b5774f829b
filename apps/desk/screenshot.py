"""The picture of the desk in the README.

Run ``kvshare ui``, then ``python -m kvshare_mm.apps.desk.screenshot URL FILE.png``; needs Chromium.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

_WAIT_MS = 120_000


def take(url: str, file: Path, width: int, dark: bool, chromium: str, example: int) -> None:
    """Let both customers ask the same example, one after the other, and save the page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
        )
        page.set_default_timeout(_WAIT_MS)
        page.goto(url)
        for customer in ("#desk-customer-1", "#desk-customer-2"):
            page.locator(f"{customer} .desk-examples button").nth(example).click()
            cost = page.locator(f"{customer} .desk-times span")
            cost.filter(has_text=re.compile("was computed|everything: [0-9]")).wait_for()
        page.mouse.move(0, 0)
        page.wait_for_timeout(500)  # the tree and the log are drawn, and nothing blinks
        page.screenshot(path=file, full_page=True)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="of the desk")
    parser.add_argument("file", type=Path, help="PNG to write")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--example", type=int, default=1, help="which button, from 0")
    parser.add_argument("--chromium", default=shutil.which("chromium") or "chromium")
    given = parser.parse_args()
    take(given.url, given.file, given.width, given.dark, given.chromium, given.example)


if __name__ == "__main__":
    main()
