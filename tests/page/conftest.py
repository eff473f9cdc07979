"""A daemon that records a GPS, and a browser that looks at its page: Debian's Chromium, driven by its chromedriver."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import reduce
from operator import xor
from pathlib import Path
from typing import Any, TypeVar

import pytest
from selenium import webdriver
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.recorder import Instrument, Recorder

AWAY = "postgresql://nobody@127.0.0.1:1/telemetry"
SECONDS_MAX = 30.0

Found = TypeVar("Found")


def sentence(number: int) -> bytes:
    """NMEA 0183: somebody drives north-east from 52° N, 13° E, a step higher with each number."""
    metre = number % 1000
    content = b"GPGGA,000001,52%02d.%03d0,N,013%02d.%03d0,E,1,08,1.0,%d.0,M,0.0,M,," % (
        metre // 100, metre % 100 * 10, metre // 100, metre % 100 * 10, number,
    )  # fmt: skip
    return b"$%s*%02X\r\n" % (content, reduce(xor, content))


@pytest.fixture
def gps(tmp_path: Path) -> Iterator[Instrument]:
    device = Instrument(tmp_path / "gps", pause_s=0.005, say=sentence)
    device.start()
    yield device
    with contextlib.suppress(OSError):  # A test may have pulled it.
        device.close()


def source_of(gps: Instrument) -> str:
    """The GPS in a configuration."""
    return f'[[serial]]\nname = "gps"\nport = "{gps.link}"\nprotocol = "nmea"\n'


def address_of(recorder: Recorder) -> str:
    """Where the daemon's HTTP side is, once it is there."""
    recorder.wait_for("listening http=", after=recorder.begun)
    address: str = re.findall(r"listening http=(\S+)", recorder.log())[-1]
    return address


@pytest.fixture
def daemon(tmp_path: Path, gps: Instrument) -> Iterator[Recorder]:
    """It records the GPS; its database is away."""
    recorder = Recorder(tmp_path, AWAY, source_of(gps))
    recorder.start()
    try:
        yield recorder
    finally:
        recorder.close()


@pytest.fixture(scope="session")
def chromium() -> Iterator[webdriver.Chrome]:
    """One browser for all tests. In CI it is always there."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        message = "no chromium and chromedriver here: apt install chromium chromium-driver"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    options = webdriver.ChromeOptions()
    options.binary_location = program
    with tempfile.TemporaryDirectory(prefix="ingestd-chromium-") as profile:
        # The sandbox is for users; /dev/shm is small in containers.
        for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={profile}"):
            options.add_argument(argument)
        if os.geteuid() == 0:
            options.add_argument("--no-sandbox")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        browser = webdriver.Chrome(options=options, service=Service(driver))
        try:
            yield browser
        finally:
            browser.quit()


class Page:
    """The page in the browser."""

    def __init__(self, browser: webdriver.Chrome) -> None:
        self.browser = browser

    def open(self, recorder: Recorder, *, width: int = 1280, height: int = 2400) -> None:
        """Load the page of a daemon, and wait until it is heard."""
        self.resize(width, height)
        self.browser.get(f"http://{address_of(recorder)}/")
        self.until(lambda: self.text("#connection") == "live", "word from the daemon")

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def until(self, condition: Callable[[], Found], what: str) -> Found:
        """Wait for what comes."""
        waiting = WebDriverWait(
            self.browser, SECONDS_MAX, 0.1, ignored_exceptions=[NoSuchElementException, StaleElementReferenceException]
        )
        found: Found = waiting.until(lambda _: condition(), f"no {what}")
        return found

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> Any:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """What somebody reads there."""
        return str(self.one(selector).text)

    def value(self, channel: str) -> float:
        """Of a channel, by the table; NaN while its row is empty."""
        return float(self.text(f'#channels tr[data-key="{channel}"] .value') or "nan")

    def fill(self, selector: str, text: str) -> None:
        field = self.one(selector)
        field.clear()
        field.send_keys(text)

    def click(self, selector: str) -> None:
        self.one(selector).click()

    def complaints(self) -> list[str]:
        """What the browser's console says since it was asked last."""
        return [entry["message"] for entry in self.browser.get_log("browser")]


@pytest.fixture
def page(chromium: webdriver.Chrome) -> Iterator[Page]:
    """A browser that has never seen the page."""
    chromium.get_log("browser")
    yield Page(chromium)
    chromium.execute_cdp_cmd("Network.setExtraHTTPHeaders", {"headers": {}})
    chromium.execute_script("try { localStorage.clear() } catch {}")  # type: ignore[no-untyped-call]
    chromium.get("about:blank")
