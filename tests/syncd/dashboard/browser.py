"""A headless Chromium for the browser tests.

Chromium and its driver come from the system (.ci/chromium installs Debian's). `BROWSER=no` skips the browser
tests, for machines where they cannot be installed.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import pytest
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from tests.syncd.dashboard.support import elements
from tests.syncd.waiting import eventually

SIZES: Final = {"desktop": (1440, 900), "phone": (390, 844)}
SCHEMES: Final = ("light", "dark")
_MAX_PAGES: Final = 60
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_MISSING = (
    "no Chromium: install it and its driver (on Debian: apt-get install chromium chromium-driver, which"
    " `make test` does as root), or skip the browser tests with `make test BROWSER=no`"
)


@dataclass
class Browser:
    """One browser window."""

    driver: webdriver.Chrome

    def open(self, url: str) -> None:
        self.driver.get(url)

    @property
    def path(self) -> str:
        return str(self.driver.execute_script("return location.pathname"))

    @property
    def text(self) -> str:
        return self.driver.find_element(By.TAG_NAME, "body").text

    @property
    def source(self) -> str:
        return self.driver.page_source

    def find(self, css: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def count(self, css: str) -> int:
        return len(self.driver.find_elements(By.CSS_SELECTOR, css))

    def labelled(self, label: str) -> WebElement:
        """The field with this label, as a screen reader finds it."""
        found = self.driver.find_element(By.XPATH, f"//label[normalize-space()={label!r}]")
        return self.find(f"#{found.get_attribute('for')}")

    def press(self, button: str) -> None:
        self._leave(By.XPATH, f"//button[starts-with(normalize-space(), {button!r})]")

    def follow(self, link: str) -> None:
        self._leave(By.LINK_TEXT, link)

    def _leave(self, by: str, what: str) -> None:
        """Click, and wait for the next page."""
        self.evaluate("window.leaving = true")
        self.driver.find_element(by, what).click()
        arrived = "return !window.leaving && document.readyState === 'complete'"
        eventually(
            lambda: self._now(lambda: str(self.evaluate(arrived))) == "True",
            seconds=20,
            what=f"a page after {what}",
        )

    @staticmethod
    def _now(look: Callable[[], str]) -> str:
        """Read a page that may be unloading: then the result is empty."""
        try:
            return look()
        except WebDriverException:
            return ""

    def until(self, text: str) -> None:
        """Wait until the page, which refreshes itself, contains this text."""
        eventually(lambda: text in self._now(lambda: self.text), seconds=20, what=f"{text!r} on {self.path}")

    def save(self, file: Path) -> None:
        """Take a picture of the whole page, as tall as it is, at most four windows."""
        width, shown = self.evaluate("return [innerWidth, innerHeight]")
        height = min(4 * shown, self.evaluate("return document.documentElement.scrollHeight"))
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        options = {"captureBeyondViewport": True, "clip": clip}
        taken = self.driver.execute_cdp_cmd("Page.captureScreenshot", options)
        file.write_bytes(base64.b64decode(taken["data"]))

    def evaluate(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def complaints(self) -> list[str]:
        """Console messages since the last call: policy violations and script errors."""
        entries = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [str(entry["message"]) for entry in entries if entry["source"] != "recommendation"]


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Run a browser with an empty profile; skips with BROWSER=no, fails if there is no browser."""
    if os.environ.get("BROWSER") == "no":
        pytest.skip("BROWSER=no")
    program = next((found for name in _BROWSERS if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.fail(_MISSING)
    options = webdriver.ChromeOptions()
    options.binary_location = program
    arguments = ["headless=new", "disable-dev-shm-usage", "window-size=1280,1000", f"user-data-dir={profile}"]
    arguments += ["no-first-run", "disable-background-networking", "disable-component-update", "disable-gpu"]
    # Chromium's own sandbox refuses to run as root, and in a container tests run as root.
    arguments += ["no-sandbox"] * (os.geteuid() == 0)
    for argument in arguments:
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options=options, service=Service(driver))
    try:
        window.set_page_load_timeout(20)
        yield Browser(window)
    finally:
        window.quit()


def crawled(client: httpx.Client) -> dict[str, str]:
    """Follow links from the overview; returns one path for each kind of page."""
    found: dict[str, str] = {}
    todo = ["/dashboard/"]
    while todo and len(found) < _MAX_PAGES:
        path = todo.pop(0)
        kind = kind_of(path)
        if kind in found:
            continue
        answer = client.get(path)
        if answer.headers.get("content-type", "").startswith("text/html"):
            assert answer.status_code == 200, path
            found[kind] = path
            links = [element.attributes.get("href") or "" for element in elements(answer.text).of("a")]
            todo += [link for link in links if link.startswith("/dashboard/") and kind_of(link) not in found]
    return found


def kind_of(path: str) -> str:
    """The path of a page without ids, and without its query."""
    parts = urlsplit(path).path.removeprefix("/dashboard/").split("/")
    shapes = ((re.compile("[0-9a-f]{32}"), "ID"), (re.compile(r"\d+"), "N"))
    kinds = [next((kind for shape, kind in shapes if shape.fullmatch(part)), part) for part in parts]
    if parts[0] == "customers" and len(kinds) > 1:
        kinds[1] = "KEY"
    return "/".join(kinds)


@contextmanager
def emulated(window: Browser, size: str, scheme: str) -> Iterator[None]:
    width, height = SIZES[size]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    window.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    window.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
    try:
        yield
    finally:
        window.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        window.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
