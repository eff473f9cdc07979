"""What is known of the session that is recorded: edits, their times, and what the next process makes of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from ingestd.config import Config, Session, load_config
from ingestd.daemon.session import BEGUN_UTC, CONTINUED_UTC, TEXT_CHARACTERS_MAX, RunningSession
from ingestd.errors import UsageError
from ingestd.store.writer import METADATA
from tests.journals import BOOT_ID

SESSION_ID = UUID("01890000-0000-7000-8000-000000000007")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A configuration that says something of the session."""
    path = tmp_path / "car.toml"
    path.write_text(
        '[session]\ncar_id = "rig-7"\ndriver = "Ada"\n[database]\ndsn = "postgresql://u:hush@/x"\n'
        '[[can]]\nname = "can0"\n'
    )
    return load_config(path, environment={})


def test_what_nobody_has_said_is_the_configurations(config: Config) -> None:
    """The name has the car and the time; it was edited before anything that people do, and knows no password."""
    session = RunningSession.begin(config, BOOT_ID)
    assert session.metadata | {"name": ""} == dict.fromkeys(METADATA) | {"car_id": "rig-7", "driver": "Ada", "name": ""}
    assert str(session.metadata["name"]).startswith("rig-7 20")
    assert set(session.edited_utc.values()) == {BEGUN_UTC}
    assert "hush" not in str(session.record)
    assert session.as_json["id"] == str(session.id)
    given = RunningSession.begin(config, BOOT_ID, {"name": "race", "driver": None, "track": "Spa"})
    assert [given.metadata[name] for name in METADATA] == ["race", "rig-7", None, "Spa", None]
    assert given.id != session.id


def test_the_configuration_in_force_is_later_each_time(config: Config) -> None:
    """A reload's is known from the one before by its stamp, whatever the wall clock does."""
    session = RunningSession.begin(config, BOOT_ID)
    before = session.config["since_ns"]
    session.configure(config, {"/car.dbc": "abc"})
    assert session.config["since_ns"] > before
    assert session.config["databases"] == {"/car.dbc": "abc"}


def test_each_edit_is_later_than_the_one_before(config: Config) -> None:
    """Also where the clock was set back meanwhile; what was not edited keeps its time."""
    session = RunningSession.begin(config, BOOT_ID)
    session.edit({"driver": "Kim"})
    future = datetime.now(UTC) + timedelta(days=400)
    session.edited_utc["track"] = future
    session.edit({"driver": "Bea", "notes": ""})
    assert session.edited_utc["driver"] > future
    assert session.edited_utc["notes"] == session.edited_utc["driver"]
    assert session.edited_utc["car_id"] == BEGUN_UTC
    assert (session.metadata["driver"], session.metadata["notes"]) == ("Bea", None)
    assert session.record["updated_utc"] == max(session.record["edited_utc"].values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"colour": "red"}, "a session has no 'colour'"),
        ({"driver": 7}, "driver must be a text"),
        ({"driver": "a\0b"}, "no database can store"),
        ({"driver": "\udc80"}, "no database can store"),
        ({"notes": "x" * (TEXT_CHARACTERS_MAX + 1)}, "10,001 characters"),
    ],
)
def test_what_is_refused_changes_nothing(config: Config, changes: dict[str, Any], said: str) -> None:
    """Nothing of such an edit is taken, not even what was right in it."""
    session = RunningSession.begin(config, BOOT_ID)
    before = session.record
    with pytest.raises(UsageError, match=said):
        session.edit({"track": "Spa"} | changes)
    assert session.record == before


def test_who_continues_a_session_knows_its_edits(config: Config) -> None:
    """What the process before was told goes before the configuration; what this one was told since, before that."""
    first = RunningSession.begin(config, BOOT_ID, {"name": "race"})
    first.edit({"driver": "Kim"})
    second = RunningSession.begin(config, BOOT_ID, continues=first.id)
    assert second.id == first.id
    assert set(second.edited_utc.values()) == {CONTINUED_UTC}
    second.edit({"track": "Spa"})
    second.inherit({name: value for name, value in first.record.items() if name != "config"})
    assert [second.metadata[name] for name in METADATA] == ["race", "rig-7", "Kim", "Spa", None]
    assert second.created_utc == first.created_utc
    assert second.edited_utc["name"] == BEGUN_UTC
    assert second.edited_utc["driver"] == first.edited_utc["driver"]


def test_who_continues_a_session_of_before_this_was_known(config: Config) -> None:
    """A record without times of its keys is taken as a whole; one without anything changes nothing."""
    session = RunningSession.begin(config, BOOT_ID, continues=SESSION_ID)
    session.inherit({})
    assert session.metadata["driver"] == "Ada"
    session.inherit({"name": "drive", "driver": "Kim", "updated_utc": BEGUN_UTC.isoformat()})
    assert (session.metadata["name"], session.metadata["driver"], session.metadata["car_id"]) == ("drive", "Kim", None)


def test_a_session_without_a_car_is_called_after_the_host(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the sessions of two machines can be told apart."""
    import msgspec

    monkeypatch.setattr("socket.gethostname", lambda: "garage")
    named = RunningSession.begin(msgspec.structs.replace(config, session=Session()), BOOT_ID)
    assert str(named.metadata["name"]).startswith("garage 20")
