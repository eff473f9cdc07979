"""`ingestd run` before anything runs: what is wrong with the call, and what its log looks like."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from ingestd.cli.running import JsonLine, LogLine, is_journal, run_command, set_up_logging
from ingestd.errors import ConfigError


@pytest.fixture
def restored_logging() -> Iterator[None]:
    """Leaves the root logger as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(False)
    logging.getLogger("ingestd").setLevel(logging.NOTSET)
    root.handlers[:] = handlers
    root.setLevel(level)


def record(level: int, message: str, *args: object) -> logging.LogRecord:
    made = logging.LogRecord("ingestd.daemon.service", level, __file__, 1, message, args, None)
    made.created = 1_789_219_800.5
    return made


def test_a_line_says_when_how_grave_and_what() -> None:
    """In a terminal or a file: the time in UTC to the millisecond, the level, the part, the message."""
    line = LogLine(for_journal=False).format(record(logging.WARNING, "frames lost source=%s", "can0"))
    assert line == "2026-09-12T13:30:00.500Z warning daemon.service: frames lost source=can0"


def test_the_journal_gets_priorities() -> None:
    """Every line has one, those of a traceback too, and no time: the journal has its own."""
    formatter = LogLine(for_journal=True)
    assert formatter.format(record(logging.INFO, "recording")) == "<6>daemon.service: recording"
    failed = record(logging.CRITICAL, "a task ended")
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        failed.exc_info = sys.exc_info()
    lines = formatter.format(failed).splitlines()
    assert len(lines) > 3
    assert all(line.startswith("<2>") for line in lines)


def test_json_has_the_facts_by_their_keys() -> None:
    """One object a line, whatever was said; the journal's prefix before it."""
    line = JsonLine(for_journal=False).format(record(logging.WARNING, "frames lost source=%s frames=%d", "can0", 7))
    assert json.loads(line) == {
        "time": "2026-09-12T13:30:00.500Z",
        "level": "warning",
        "part": "daemon.service",
        "message": "frames lost source=can0 frames=7",
        "facts": {"source": "can0", "frames": 7},
    }
    more = record(logging.INFO, "books source=%s %s balanced=%s", "can0", "dropped_budget=3 dropped_overflow=1", True)
    said = json.loads(JsonLine(for_journal=False).format(more))
    assert said["facts"] == {"source": "can0", "dropped_budget": 3, "dropped_overflow": 1, "balanced": True}
    several = record(logging.WARNING, "nothing has matched patterns=%s hint=%r", ["a", "b"], "see c")
    said = json.loads(JsonLine(for_journal=False).format(several))
    assert said["facts"] == {"patterns": ["a", "b"], "hint": "see c"}
    failed = record(logging.CRITICAL, "a task ended: %s 100%% reason=%r", "sync", ValueError('"x"\ny'))
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        failed.exc_info = sys.exc_info()
    line = JsonLine(for_journal=True).format(failed)
    assert line.startswith("<2>{")
    assert "\n" not in line
    said = json.loads(line[3:])
    assert said["facts"] == {"reason": '"x"\ny'}
    assert "ValueError: first\nsecond" in said["traceback"]


def test_what_is_the_journal(tmp_path: Path) -> None:
    """Only the very stream that systemd named; a stderr that was redirected since is none."""
    with (tmp_path / "log").open("w") as stream:
        status = os.fstat(stream.fileno())
        named = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        assert is_journal(stream, named)
        assert not is_journal(stream, {})
        assert not is_journal(stream, {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + 1}"})
    assert not is_journal(io.StringIO(), named)


def test_what_is_logged(restored_logging: None) -> None:
    """Changes of state from INFO on, the details only when asked for, and not what asyncpg leaves behind."""
    stream = io.StringIO()
    set_up_logging(stream=stream)
    logging.getLogger("ingestd.delivery").debug("a detail")
    logging.getLogger("ingestd.delivery").info("a change")
    logging.getLogger("asyncio").error("Future exception was never retrieved\nfuture: …")
    logging.getLogger("asyncio").error("Task exception was never retrieved")
    logged = stream.getvalue()
    assert [line.partition("Z ")[2] for line in logged.splitlines()] == [
        "info delivery: a change",
        "error asyncio: Task exception was never retrieved",
    ]
    set_up_logging(stream=stream, verbose=True)
    logging.getLogger("ingestd.delivery").debug("a detail")
    assert "debug delivery: a detail" in stream.getvalue()


def test_a_configuration_that_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is started; every mistake is named. Without a configuration the call itself is wrong."""
    monkeypatch.delenv("INGESTD_DSN", raising=False)
    path = tmp_path / "car.toml"
    path.write_text('[[can]]\nname = "can0"\nfd = 1\n')
    done = CliRunner().invoke(run_command, ["-c", str(path)])
    assert isinstance(done.exception, ConfigError)
    assert "can[0].fd" in str(done.exception)
    assert "database.dsn" in str(done.exception)
    assert CliRunner().invoke(run_command, []).exit_code == 2
