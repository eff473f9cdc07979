"""The live page in a real browser, beside a real daemon."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from ingestd.demo import BUSES
from ingestd.demo.simulation import Simulation
from tests.conftest import psql
from tests.page.conftest import AWAY, Page, address_of, source_of
from tests.recorder import Instrument, Recorder, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chromium")]

ALTITUDE = "gps/GP/GGA.alt"


@pytest.fixture
def stored(tmp_path: Path, migrated: str, gps: Instrument) -> Iterator[Recorder]:
    """A daemon whose database is there."""
    recorder = Recorder(tmp_path, migrated, source_of(gps), settings='[session]\ncar_id = "car-7"\nname = "lap 1"\n')
    recorder.start()
    try:
        yield recorder
    finally:
        recorder.close()


def moves(page: Page) -> None:
    """The table shows a greater number than before."""
    before = page.until(lambda: page.value(ALTITUDE) >= 0 and page.value(ALTITUDE), "value")
    page.until(lambda: page.value(ALTITUDE) > before, "greater value")


def test_values_move_and_are_found(daemon: Recorder, page: Page) -> None:
    """Numbers with unit, rate and sparkline; search by words and patterns; a chart and a track; no complaint."""
    page.open(daemon)
    moves(page)
    row = f'#channels tr[data-key="{ALTITUDE}"]'
    assert page.text(f"{row} .unit") == "m"
    page.until(lambda: float(page.text(f"{row} .rate").replace(",", "")) > 20, "rate")
    page.until(lambda: page.one(f"{row} .spark path").get_attribute("d").count("L") > 3, "sparkline")

    everything = len(page.all("#channels tr[data-key]"))
    page.fill("#search", "GGA numsv")
    page.until(lambda: page.text("#channels-count") == f"1 of {everything}", "search by words")
    page.fill("#search", "gps/*.l?[t")
    page.until(lambda: "No channel is called like that" in page.text("#channels-empty"), "nothing found")
    page.fill("#search", "gps/*.l?t")
    page.until(lambda: page.text("#channels-count") == f"1 of {everything}", "search by a pattern")
    page.fill("#search", "gga")

    page.click(f"{row} .pick")
    assert page.one(f"{row} .pick").get_attribute("aria-pressed") == "true"
    assert page.text("#charted button").endswith("GGA.alt")
    page.until(lambda: any(len(line.get_attribute("d")) > 100 for line in page.all("#plot .js-line")), "chart")
    plot = page.one("#plot .nsewdrag")
    ActionChains(page.browser).drag_and_drop_by_offset(plot, 150, 0).perform()
    page.until(lambda: page.text("#chart-hold") == "Held", "chart that is held: somebody looks closer")
    ActionChains(page.browser).double_click(page.one("#plot .nsewdrag")).perform()
    page.until(lambda: page.text("#chart-hold") == "Hold", "chart that goes on")
    page.fill("#search", "gps")
    for other in ("gps/GP/GGA.lat", "gps/GP/GGA.HDOP"):
        page.click(f'#channels tr[data-key="{other}"] .pick')
    page.until(lambda: len(page.all("#plot .yaxislayer-above, #plot .subplot.xy3")) > 0, "chart of three units")
    filled = "const [plot] = arguments; return plot.querySelector('.main-svg').clientHeight - plot.clientHeight"
    page.until(lambda: abs(page.browser.execute_script(filled, page.one("#plot"))) < 2, "chart that fills its place")
    page.until(lambda: len(page.one("#map .way").get_attribute("d")) > 100, "track")
    assert page.text("#track-position").startswith("52.")
    assert ", 13." in page.text("#track-position")

    page.browser.refresh()
    page.until(lambda: page.all("#plot .js-line"), "chart of the channels that were chosen before")
    assert page.complaints() == []


def test_a_marker_set_in_the_page_is_in_the_database(stored: Recorder, migrated: str, page: Page) -> None:
    """By keyboard; what is said of the session too, and another session; the page shows what is so by then."""
    page.open(stored)
    page.until(lambda: page.text("#tile-database") == "Database\nup\n" or "behind" in page.text("#tile-database"), "up")
    assert page.text("#title") == "car-7 · lap 1"
    hostile = "<img src=x onerror=alert(1)> into the pits"
    page.one("#marker-text").send_keys(hostile, Keys.ENTER)
    page.until(lambda: hostile in page.text('#events li[data-kind="marker"]'), "marker")
    assert not page.all("#events img")
    markers = "SELECT payload ->> 'text' FROM events WHERE kind = 'marker'"
    wait_until(lambda: psql(migrated, markers) == hostile, "marker in SQL")

    assert not page.one("#metadata-save").is_enabled()
    page.fill("#meta-driver", "Kim")
    page.click("#metadata-save")
    page.until(lambda: page.text("#session-said") == "Saved.", "word that it is saved")
    wait_until(lambda: psql(migrated, "SELECT driver FROM sessions WHERE name = 'lap 1'") == "Kim", "driver in SQL")

    page.click("#session-start")
    page.one("#start-name").send_keys("lap 2", Keys.ENTER)
    page.until(lambda: page.text("#title") == "car-7 · lap 2", "another session")
    wait_until(lambda: psql(migrated, "SELECT driver FROM sessions WHERE name = 'lap 2'") == "Kim", "session in SQL")
    page.click("#session-stop")
    page.click('#stop button[value="stop"]')
    page.until(lambda: page.one("#meta-driver").get_attribute("value") == "", "end of the session")
    page.until(lambda: page.text("#tile-books").startswith("Books\nbalanced\nnothing lost"), "balanced books")
    assert page.complaints() == []


def test_what_is_wrong_is_said(daemon: Recorder, gps: Instrument, page: Page) -> None:
    """A source that is unplugged: its state with the reason, the tile, the event. The database is away all along."""
    page.open(daemon)
    page.until(lambda: page.text("#tile-database").startswith("Database\naway"), "database that is away")
    assert page.text('#sources tr[data-source="gps"] .link') == "open"
    gps.close()
    page.until(lambda: page.text('#sources tr[data-source="gps"] .link').startswith("down"), "source that is down")
    assert len(page.text('#sources tr[data-source="gps"] .reason')) > 3
    assert page.text("#tile-recording").startswith("Recording\n0 of 1 sources\ngps: ")
    page.until(lambda: page.text('#events li[data-kind="link_down"] .state') == "link down", "event")
    page.until(lambda: "ago" in page.text(f'#channels tr[data-key="{ALTITUDE}"] .note'), "age of the last value")
    assert page.browser.title.startswith("⚠")
    assert page.complaints() == []


def test_a_bus_shows_how_busy_it_is(tmp_path: Path, page: Page) -> None:
    """Where its bit rate is known; beside everything else."""
    with Simulation("slcan") as car:
        recorder = Recorder(tmp_path, AWAY, car.configuration())
        recorder.start()
        try:
            page.open(recorder)
            for bus in BUSES:
                page.until(lambda: page.text(f'#sources tr[data-source="{bus}"] .link').startswith("open"), "bus")  # noqa: B023
            car.play()
            where = '#sources tr[data-source="powertrain"] .reason'
            page.until(lambda: re.fullmatch(r"bus [1-9]\d? % busy", page.text(where)), "load of the bus")
            page.until(lambda: page.all('#channels tr[data-key^="body/"]'), "channels of a bus")
            assert page.complaints() == []
        finally:
            recorder.close()


def test_the_daemon_begins_anew(daemon: Recorder, page: Page) -> None:
    """The page says that it is gone, finds it again by itself, says that it was away, and goes on."""
    page.open(daemon)
    moves(page)
    # The same address again.
    config = daemon.config.read_text()
    daemon.config.write_text(config.replace("127.0.0.1:0", address_of(daemon)))
    daemon.kill()
    page.until(lambda: page.text("#connection") == "connection lost", "word of the loss")
    assert "not been heard since" in page.text("#notice-connection")
    daemon.start()
    page.until(lambda: page.text("#connection") == "live", "connection")
    page.until(lambda: "begun anew" in page.text("#notice-restart"), "word of the restart")
    assert not page.all("#notice-connection")
    moves(page)
    page.click("#notice-restart button")
    assert not page.all("#notice-restart")
    page.until(lambda: page.all('#events li[data-kind="gap"]'), "gap in the events")


def test_without_plotly(tmp_path: Path, gps: Instrument, page: Page) -> None:
    """Its place says what installs it, nothing asks for it, and everything else works."""
    recorder = Recorder(tmp_path, AWAY, source_of(gps), changes="import sys; sys.modules['plotly'] = None")
    recorder.start()
    try:
        page.open(recorder)
        moves(page)
        page.click(f'#channels tr[data-key="{ALTITUDE}"] .pick')
        assert "pip install 'ingestd[page]'" in page.text("#chart-empty")
        page.until(lambda: len(page.one("#map .way").get_attribute("d")) > 100, "track")
        assert page.complaints() == []
    finally:
        recorder.close()


@pytest.mark.parametrize("width", [320, 375, 700, 1100, 1280, 1920])
def test_it_fits(daemon: Recorder, page: Page, width: int) -> None:
    """No width makes anybody scroll sideways, and the value of a channel can be read at each."""
    page.open(daemon, width=width)
    moves(page)
    page.click(f'#channels tr[data-key="{ALTITUDE}"] .pick')
    page.until(lambda: page.all("#plot .js-line"), "chart")
    assert page.browser.execute_script("return document.documentElement.scrollWidth") <= width  # type: ignore[no-untyped-call]
    value = page.one(f'#channels tr[data-key="{ALTITUDE}"] .value')
    assert value.is_displayed()
    assert value.size["width"] > 60


def test_who_may_change_nothing_is_told_why(daemon: Recorder, page: Page) -> None:
    """A browser elsewhere, here behind a proxy: the controls are closed, and the page says what to do."""
    page.browser.execute_cdp_cmd("Network.enable", {})
    page.browser.execute_cdp_cmd("Network.setExtraHTTPHeaders", {"headers": {"X-Forwarded-For": "192.0.2.7"}})
    page.open(daemon)
    moves(page)
    page.until(lambda: "this browser is not on the recorder" in page.text("#session-why"), "reason")
    assert "ssh -L" in page.text("#session-why")
    assert not any(control.is_enabled() for control in page.all("#session input, #session textarea, #session button"))
    assert page.complaints() == []
