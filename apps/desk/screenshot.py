"""The picture of the desk in the README.

Run ``kvshare desk``, then ``python -m kvshare_mm.apps.desk.screenshot URL FILE.png``; needs
Chromium.
"""

from __future__ import annotations

import argparse
import io
import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

_WAIT_MS = 120_000


def take(
    url: str, file: Path, width: int, dark: bool, chromium: str, examples: Sequence[int]
) -> None:
    """Let each customer ask an example, one after the other, and save the page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
        )
        page.set_default_timeout(_WAIT_MS)
        page.goto(url)
        for number, example in enumerate(examples, 1):
            customer = f"#desk-customer-{number}"
            page.locator(f"{customer} .desk-examples button").nth(example).click()
            page.locator(f"{customer} .desk-costs:not(.desk-pending)").wait_for()
            page.locator(f"{customer} .desk-check-button").click()
            page.locator(f"{customer} .desk-check b").wait_for()
        page.mouse.move(0, 0)
        page.wait_for_timeout(500)  # the tree and the log are drawn, and nothing blinks
        shown = page.screenshot(full_page=True)
        browser.close()
    # The page has few colours: a palette makes it a third as large.
    with Image.open(io.BytesIO(shown)) as picture:
        picture.convert("RGB").quantize(dither=Image.Dither.NONE).save(file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="of the desk")
    parser.add_argument("file", type=Path, help="PNG to write")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument(
        "--examples", type=int, nargs=2, default=(1, 1), help="button of each customer, from 0"
    )
    parser.add_argument("--chromium", default=shutil.which("chromium") or "chromium")
    given = parser.parse_args()
    take(given.url, given.file, given.width, given.dark, given.chromium, given.examples)


if __name__ == "__main__":
    main()
