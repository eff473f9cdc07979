"""What the demo shows, and when its books balance."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ingestd.cli.demo_run import Balance, _balances
from ingestd.cli.demo_view import CHANNELS, Reading, View, line, picture
from ingestd.daemon.live import Value
from ingestd.demo import databases
from ingestd.metrics import JournalNumbers, Snapshot, StoreNumbers
from ingestd.model import Books, Link, SourceStatus

VALUES = [
    Value("powertrain", "Transmission.Gear", 1, 1, 4.0, "Fourth", None, 0, 1),
    Value("powertrain", "Engine.EngineSpeed", 1, 1, 5317.6, None, "rpm", 0, 1),
    Value("powertrain", "Dynamics.LateralAcceleration", 1, 1, -0.01, None, "m/s2", 0, 1),
    Value("gps/GN", "RMC.lat", 1, 1, 52.47143, None, "deg", 0, 1),
    Value("gps/GN", "RMC.cog", 1, 1, None, None, "deg", 0, 1),
]
LATEST = {(value.source, value.channel): value for value in VALUES}


def reading(seconds: float, received: int, notes: list[str] | None = None) -> Reading:
    books = {
        name: Books(received=received, committed=received - 5, pending=5) for name in ("powertrain", "body", "gps")
    }
    snapshot = Snapshot(
        version="0",
        books=books,
        statuses={name: SourceStatus(Link.RETRYING, "[unplugged]") for name in books},
        journal=JournalNumbers(writable=True, bytes=33_600_000, bytes_max=1 << 30),
        store=StoreNumbers(
            up=True,
            commits=1,
            commit_failures=0,
            commit_seconds=None,
            wire_to_commit_seconds=None,  # type: ignore[arg-type]
        ),
    )
    return Reading(seconds, dict.fromkeys(books, received + 1), books, snapshot, 0.615, LATEST, notes or [])


def test_channels_of_the_picture_are_in_the_databases() -> None:
    """A typing error would show as a dash for ever."""
    text = {bus: path.read_text() for bus, path in databases().items()}
    for shown in CHANNELS:
        message, _, signal = shown.channel.partition(".")
        if shown.source in text:
            assert f" {message}: " in text[shown.source], shown
            assert f" SG_ {signal} " in text[shown.source].partition(f" {message}: ")[2].partition("BO_ ")[0], shown


@pytest.mark.parametrize("width", [60, 80, 130, 300])
def test_picture_fits_the_terminal(width: int) -> None:
    """Every value is readable at any width; brackets in a reason are not markup."""
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(picture(reading(12.3, 1000, ["[a warning]"]), {"body": 90.4}, width))
    text = console.export_text()
    assert "recording for 12 s" in text
    for value in ("Fourth", "5318 rpm", "52.47143 deg", "615 ms", "33.6 MB", "[a warning]"):
        assert value in text
    assert " 0.0 m/s2" in text
    assert "-0.0" not in text
    assert all(len(row) <= width for row in text.splitlines())


def test_line_says_how_it_goes() -> None:
    """Totals over the sources, and the first of the car's values."""
    said = line(reading(12.3, 1000))
    assert said.startswith(
        "12 s  received 3,000  stored 2,985  lost 0  lag 615 ms  journal 33.6 MB  gear Fourth, engine"
    )


def test_view_in_a_pipe_prints_a_line_now_and_then() -> None:
    """Not every look is a line."""
    output = io.StringIO()
    with View(Console(file=output, width=300), line_seconds=3600) as view:
        view.show(reading(1, 10))
    assert output.getvalue() == ""
    with View(Console(file=output, width=300), line_seconds=0) as view:
        view.show(reading(1, 10))
        view.show(reading(2, 20))
    assert len(output.getvalue().splitlines()) == 2


def test_view_on_a_terminal_shows_rates() -> None:
    """Frames a second since the last look."""
    output = io.StringIO()
    with View(Console(file=output, width=130, force_terminal=True, color_system=None), line_seconds=1) as view:
        view.show(reading(1, 100))
        view.show(reading(3, 1300))
    assert "600 │" in output.getvalue()


@pytest.mark.parametrize(
    ("balance", "balanced", "lost"),
    [
        (Balance("s", 10, 10, 10, 0, 0), True, 0),
        (Balance("s", 10, 9, 9, 0, 0), False, 1),
        (Balance("s", 10, 10, 9, 1, 0), False, 0),
        (Balance("s", 10, 10, 7, 0, 3), False, 3),
        (Balance("s", 10, 10, 11, 0, 0), False, 0),
    ],
)
def test_books_balance_only_when_everything_is_stored_once(balance: Balance, balanced: bool, lost: int) -> None:
    """Missing, doubled, rejected and dropped frames each show."""
    assert balance.balanced is balanced
    assert balance.lost == lost


def test_books_are_those_of_this_run() -> None:
    """What the journal counted before does not count."""
    before = {"body": Books(received=100, committed=90, pending=10, dropped={"budget": 2})}
    after = {"body": Books(received=150, committed=150, dropped={"budget": 2})}
    (balance,) = _balances({"body": 50}, before, after, {"body": 50})
    assert balance == Balance("body", 50, 50, 50, 0, 0)
