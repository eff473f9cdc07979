"""How a session's metadata are shown to people."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from rich.console import Console

from ingestd.cli import session_view
from ingestd.cli.session_view import print_sessions
from ingestd.store.sessions import SessionSummary

BEGUN = datetime(2026, 6, 1, 12, 0, 0, 123_000, UTC)
RACE = SessionSummary(
    UUID(int=1), "race 1", "rig-7", BEGUN, BEGUN + timedelta(hours=1), 123_456_789, 987_654_321, 120, (),
    driver="Kim", notes="new dampers\nand " + 20 * "very " + "cold",
)  # fmt: skip
NEXT = SessionSummary(UUID(int=2), None, None, BEGUN + timedelta(hours=2), None, 0, 0, 0, ())


@pytest.mark.parametrize("width", [80, 400])
def test_on_a_narrow_terminal_nothing_is_cut_away(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids, names, times and what people have said are whole at any width; what nobody has said takes no room."""
    shown = io.StringIO()
    monkeypatch.setattr(session_view, "out", Console(file=shown, width=width, highlight=False, markup=False))
    print_sessions([NEXT, RACE], NEXT.id)
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    for text in (str(RACE.id), str(NEXT.id), "race 1", "2026-06-01 12:00:00", "2026-06-01 13:00:00", "running",
                 "123,456,789", "987,654,321", "rig-7", "Kim", "new dampers and very"):  # fmt: skip
        assert text in shown.getvalue(), (text, lines)
    assert "track" not in shown.getvalue()
    assert ("┃" in shown.getvalue()) == (width == 400)
