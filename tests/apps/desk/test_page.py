"""The desk in a real browser, over a real server process.

These tests need Chromium (Debian: ``apt install chromium``) and fail without it: `make test-ui` and
CI run them where there is one, and say so where there is none.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from kvshare_mm.apps.desk.shop import PHOTO_EXAMPLES
from kvshare_mm.apps.server.keys import add_key

pytestmark = [pytest.mark.e2e, pytest.mark.ui]

_TIMEOUT_MS = 120_000
_LOOKS, _BETWEEN_LOOKS_MS = 120, 250
_WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
_WINDOWS = [(1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")]


def chromium() -> str:
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.fail("no Chromium: install it (Debian: apt install chromium) or set CHROMIUM")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=_TIMEOUT_MS)
    with sync_playwright() as driver:
        opened = driver.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox"], timeout=_TIMEOUT_MS
        )
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Starts `kvshare serve MODEL --ui`; gives the address of the desk."""
    started: list[subprocess.Popen[str]] = []
    state = tmp_path_factory.mktemp("state")

    def start(model: str, *options: str) -> str:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvshare_mm.apps.cli", "serve", model, "--ui", "--port", "0",
             "--embedder", "none", "--served-model-name", "desk", *options],
            stderr=subprocess.PIPE, text=True, env={**os.environ, "XDG_STATE_HOME": str(state)},
        )  # fmt: skip
        started.append(process)
        assert process.stderr is not None
        for line in process.stderr:
            found = re.search(r"desk on (http://\S+)", line)
            if found:
                _drain(process)
                return found[1]
        pytest.fail(f"the server ended with {process.wait()}")

    yield start
    for process in started:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def _drain(process: subprocess.Popen[str]) -> None:
    """Keep reading what a server logs, or it would wait for us."""
    import threading

    assert process.stderr is not None
    threading.Thread(target=process.stderr.read, daemon=True).start()


class Desk:
    """A page and what went wrong on it."""

    def __init__(
        self, browser: Browser, url: str, width: int, scheme: Any = "light", key: str | None = None
    ) -> None:
        self._context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme
        )
        self.page: Page = self._context.new_page()
        self.page.set_default_timeout(_TIMEOUT_MS)
        self.errors: list[str] = []
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)
        if key is not None:
            self.page.get_by_label("Tenant").fill("shop-a")
            self.page.get_by_label("Key").fill(key)
            self.page.get_by_role("button", name="Log in").click()
        self.page.get_by_role("button", name="Ask").first.wait_for()

    def customer(self, number: int) -> Any:
        return self.page.locator(f"#desk-customer-{number}")

    def done(self, number: int) -> None:
        """Wait until a customer's answer is complete and its cost is known."""
        costs = self.customer(number).locator(".desk-costs:not(.desk-pending)")
        expect(costs).to_be_visible(timeout=_TIMEOUT_MS)

    def counts(self, number: int) -> dict[str, int]:
        said = self.customer(number).locator(".desk-bar").get_attribute("aria-label") or ""
        return {kind: int(n) for n, kind in re.findall(r"(\d+) (exact|reused|recomputed)", said)}

    def fits(self) -> bool:
        """Nothing is wider than the page, no column's head is cut off, and who can, reads it."""
        parts = ["document.documentElement", "...document.querySelectorAll('.desk-scroll, th')"]
        wide = f"[{', '.join(parts)}].filter(e => e.scrollWidth > e.clientWidth + 1).length"
        # What fades in, or waits for the server, is not yet as it will be read.
        for _ in range(_LOOKS):
            found = Axe().run(self.page, options={"runOnly": _WCAG})
            if not found.violations_count:
                break
            self.page.wait_for_timeout(_BETWEEN_LOOKS_MS)
        assert found.violations_count == 0, found.generate_report()
        return int(self.page.evaluate(wide)) == 0

    def width(self) -> float:
        """Of what the page shows, in pixels."""
        return float(self.page.locator(".desk-title").bounding_box()["width"])

    def beside(self) -> bool:
        """Whether the customers stand beside each other."""
        first, second = (self.customer(number).bounding_box() for number in (1, 2))
        return bool(first["y"] == second["y"] and first["x"] < second["x"])

    def close(self) -> None:
        self._context.close()


@pytest.fixture
def opened(browser: Browser) -> Iterator[Callable[..., Desk]]:
    desks: list[Desk] = []

    def make(url: str, width: int = 1280, scheme: str = "light", key: str | None = None) -> Desk:
        desks.append(Desk(browser, url, width, scheme, key))
        return desks[-1]

    yield make
    for desk in desks:
        desk.close()
        assert desk.errors == []


@pytest.fixture(scope="module")
def text_site(site: Callable[..., str]) -> str:
    url = site("smollm2")
    _wait_until_loaded(url)
    return url


def _wait_until_loaded(url: str) -> None:
    import time

    import httpx2

    deadline = time.monotonic() + 300  # the first run on a machine converts the model
    while httpx2.get(url.removesuffix("/ui") + "/health", timeout=60).status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.parametrize(("width", "scheme"), _WINDOWS)
def test_the_second_customer_is_answered_sooner(
    opened: Callable[..., Desk], text_site: str, width: int, scheme: str
) -> None:
    desk = opened(text_site, width, scheme)
    assert desk.fits()
    at_first = desk.width()
    for number in (1, 2):
        desk.customer(number).get_by_role("button", name="My order number").click()
        desk.done(number)
    assert desk.counts(1)["recomputed"] > 150
    assert desk.counts(2)["reused"] > 100 and desk.counts(2)["recomputed"] < 60
    expect(desk.customer(2).locator(".desk-times")).to_contain_text("ms with prefix caching")
    expect(desk.customer(2)).to_contain_text("Reused from request #1")
    # Each customer's own number: nothing of the first letter is in the second answer.
    expect(desk.customer(1).locator(".desk-answer")).to_contain_text("48210")
    expect(desk.customer(2).locator(".desk-answer")).to_contain_text("77345")
    expect(desk.page.locator("#desk-log tbody tr")).to_have_count(2)
    desk.customer(2).get_by_role("button", name="Same without reuse?").click()
    expect(desk.customer(2).locator(".desk-check")).to_contain_text("same answer as without reuse")
    assert desk.fits() and desk.beside() == (width == 1280)
    assert desk.width() == at_first  # whatever an answer says
    # What few need is folded; unfolded it can be read as well.
    expect(desk.customer(1).locator(".desk-prompt p")).not_to_be_visible()
    assert desk.page.evaluate("document.documentElement.scrollHeight") < 2600
    desk.page.get_by_role("button", name="DELTA tree").click()
    expect(desk.page.locator("#desk-tree .desk-node")).to_have_count(2)
    for folded in desk.page.locator("summary").all():
        folded.click()
    assert desk.fits()
    dark = desk.page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", dark)[:3])) > 380
    assert light == (scheme == "light")


@pytest.fixture(scope="module")
def photo_site(site: Callable[..., str]) -> str:
    url = site("tiny-vl", "--media-embedder", "tiny-clip")
    _wait_until_loaded(url)
    return url


@pytest.mark.parametrize(("width", "scheme"), _WINDOWS)
def test_two_customers_ask_about_one_photo(
    opened: Callable[..., Desk], photo_site: str, width: int, scheme: str
) -> None:
    """The photo shows a red kettle with a crack."""
    desk = opened(photo_site, width, scheme)
    for number in (1, 2):
        for example in PHOTO_EXAMPLES:
            expect(desk.customer(number).get_by_role("button", name=example.label)).to_be_visible()
    assert desk.fits()
    for number, label in ((1, "Which colour?"), (2, "Is it damaged?")):
        desk.customer(number).get_by_role("button", name=label).click()
        desk.done(number)
        expect(desk.customer(number).locator(".desk-photo img").first).to_be_visible()
    expect(desk.customer(1).locator(".desk-answer")).to_have_text("#1It is red.")
    expect(desk.customer(2).locator(".desk-answer")).to_have_text("#2Yes, it is cracked.")
    assert desk.counts(1)["recomputed"] > 100 and desk.counts(1)["reused"] == 0
    second = desk.counts(2)
    assert second["reused"] > 0 and second["exact"] + second["reused"] > second["recomputed"]
    expect(desk.customer(2)).to_contain_text("request #1 (same picture or sound)")
    expect(desk.customer(2).locator(".desk-prompt")).to_contain_text("[image:")
    expect(desk.customer(2).locator(".desk-alike")).to_contain_text("#1: the same")
    expect(desk.customer(2).locator(".desk-alike img")).to_have_js_property("naturalWidth", 112)
    assert desk.fits() and desk.beside() == (width == 1280)
    assert desk.page.evaluate("document.documentElement.scrollHeight") < 2800


def test_the_toggle_and_starting_over(opened: Callable[..., Desk], text_site: str) -> None:
    desk = opened(text_site)
    desk.customer(1).get_by_role("button", name="Warehouse").click()
    desk.done(1)
    desk.page.get_by_label("off").check()
    desk.customer(2).get_by_role("button", name="Warehouse").click()
    desk.done(2)
    assert desk.counts(2)["exact"] + desk.counts(2)["reused"] == 0
    expect(desk.customer(2)).to_contain_text("reuse off")
    desk.page.get_by_role("button", name="Start over").click()
    desk.page.get_by_role("button", name="DELTA tree").click()
    expect(desk.page.locator("#desk-tree")).to_contain_text("grows with the first answer")
    expect(desk.page.locator("#desk-tree .desk-node")).to_have_count(0)
    expect(desk.customer(1).locator(".desk-answer")).to_have_text("Ask something.")


def test_an_own_question_streams_and_is_only_text(
    opened: Callable[..., Desk], text_site: str
) -> None:
    desk = opened(text_site)
    question = desk.customer(1).get_by_label("Question")
    desk.customer(1).get_by_role("button", name="Ask").click()
    expect(desk.customer(1).get_by_role("alert")).to_contain_text("write a question")
    question.fill("<img src=x onerror=\"document.title='gone'\"> Where is the warehouse?")
    desk.customer(1).get_by_role("button", name="Ask").click()
    desk.done(1)
    expect(desk.customer(1).locator(".desk-prompt")).to_contain_text("<img src=x")
    assert desk.page.title() == "KVShare desk"


def test_a_tenant_logs_in_asks_and_logs_out(
    opened: Callable[..., Desk], site: Callable[..., str], tmp_path: Path
) -> None:
    file = tmp_path / "keys.jsonl"
    key = add_key(file, "shop-a")
    url = site("smollm2", "--api-keys", str(file))
    _wait_until_loaded(url)
    desk = opened(url, key=key)
    desk.customer(1).get_by_role("button", name="Warehouse").click()
    desk.done(1)
    desk.page.get_by_role("button", name="Log out").click()
    expect(desk.page.get_by_label("Tenant")).to_be_visible()
    desk.page.goto(url)
    expect(desk.page.get_by_label("Tenant")).to_be_visible()


def test_an_uploaded_picture_is_reused(
    opened: Callable[..., Desk],
    site: Callable[..., str],
    media_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    url = site(str(media_folder("qwen2_5_vl")))
    _wait_until_loaded(url)
    picture = tmp_path / "product.png"
    file = io.BytesIO()
    Image.effect_noise((112, 112), 90).convert("RGB").save(file, "PNG")
    picture.write_bytes(file.getvalue())
    desk = opened(url)
    for number, question in ((1, "Is this product damaged?"), (2, "What colour is this product?")):
        customer = desk.customer(number)
        customer.locator("input[type=file]").first.set_input_files(picture)
        expect(customer.locator("img").first).to_be_visible()
        customer.get_by_label("Question").fill(question)
        customer.get_by_role("button", name="Ask").click()
        desk.done(number)
    assert desk.counts(2)["reused"] + desk.counts(2)["exact"] > desk.counts(2)["recomputed"]
    expect(desk.customer(2)).to_contain_text("request #1 (same picture or sound)")
