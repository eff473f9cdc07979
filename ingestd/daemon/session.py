"""The session that is being recorded, as this process knows it: its metadata, when each was edited, its configuration.

What is known becomes a SESSION record whenever it changes, and the record a row of `sessions`: of two edits, here and
in the database, the later one wins. So that an edit of the driver does not undo what somebody wrote about the track in
the database, each key has the time of its own edit.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

from ingestd import __version__
from ingestd.clock import mono_ns
from ingestd.config import Config, describe
from ingestd.decode.can import DECODER_VERSION
from ingestd.errors import UsageError
from ingestd.store.sessions import new_session_id
from ingestd.store.writer import METADATA

# When a session was edited last, for one that nobody has edited: before anything that people do, whatever our clock
# says; and a process that continues it keeps what the one that began it had to say.
BEGUN_UTC, CONTINUED_UTC = datetime.fromtimestamp(2, UTC), datetime.fromtimestamp(1, UTC)
TEXT_CHARACTERS_MAX: Final = 10_000  # of a name, of notes …; it is repeated in every segment of the journal


@dataclass(slots=True)
class RunningSession:
    """One session. `metadata` has all of METADATA, `edited_utc` the time of each."""

    id: UUID
    created_utc: datetime
    time_base: str
    metadata: dict[str, str | None]
    edited_utc: dict[str, datetime]
    config: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def begin(
        config: Config, boot_id: str, given: Mapping[str, Any] | None = None, *, continues: UUID | None = None
    ) -> RunningSession:
        """A session that begins now, with what is `given` and else what the configuration says; or one to continue."""
        now, configured = datetime.now(UTC), config.session
        metadata = {name: getattr(configured, name) for name in METADATA} | checked(given or {})
        recorder = metadata["car_id"] or socket.gethostname()
        metadata["name"] = metadata["name"] or f"{recorder} {now:%Y-%m-%d %H:%M:%S}"
        session = RunningSession(
            continues or new_session_id(), now, boot_id, metadata,
            dict.fromkeys(METADATA, CONTINUED_UTC if continues else BEGUN_UTC),
        )  # fmt: skip
        session.configure(config, {})
        return session

    def configure(self, config: Config, databases: Mapping[str, str]) -> None:
        """From now on this configuration is in force; `databases` are hashes of signal databases by their path."""
        self.config = {
            "ingestd": __version__,
            "decoder": DECODER_VERSION,
            "since_ns": mono_ns(),  # In the session's time base, in which of two later is later.
            "file": describe(config),
            **({"databases": dict(databases)} if databases else {}),
        }

    def edit(self, changes: Mapping[str, Any]) -> None:
        """Change metadata; None takes a value away. Raises UsageError for what is no metadata, and changes nothing."""
        changes = checked(changes)
        # Later than every edit before, also where the clock was set back meanwhile.
        at = max(datetime.now(UTC), max(self.edited_utc.values()) + timedelta(microseconds=1))
        self.metadata |= changes
        self.edited_utc |= dict.fromkeys(changes, at)

    def inherit(self, fields: Mapping[str, Any]) -> None:
        """Take over what the process before had to say of the session, as its SESSION record has it, if it is later."""
        updated_utc = fields.get("updated_utc", CONTINUED_UTC.isoformat())
        for name in METADATA:
            at = datetime.fromisoformat(fields.get("edited_utc", {}).get(name, updated_utc))
            if at > self.edited_utc[name]:
                self.metadata[name], self.edited_utc[name] = fields.get(name), at
        if fields.get("created_utc"):
            self.created_utc = datetime.fromisoformat(fields["created_utc"])

    @property
    def record(self) -> dict[str, Any]:
        """The SESSION record."""
        return {
            **self.metadata,
            "created_utc": _text(self.created_utc),
            "updated_utc": _text(max(self.edited_utc.values())),
            "edited_utc": {name: _text(at) for name, at in self.edited_utc.items()},
            "time_base": self.time_base,
            "config": self.config,
        }

    @property
    def as_json(self) -> dict[str, Any]:
        """For the commands: without the configuration."""
        return {"id": str(self.id), **{name: value for name, value in self.record.items() if name != "config"}}


def checked(changes: Mapping[str, Any]) -> dict[str, str | None]:
    """Metadata as the database can hold it; an empty text is none. Raises UsageError."""
    for name in changes:
        if name not in METADATA:
            raise UsageError(f"a session has no {name!r}", f"it has {', '.join(METADATA)}")
    return {name: None if value is None else checked_text(name, value) or None for name, value in changes.items()}


def checked_text(what: str, value: Any) -> str:
    """A text that the database can hold and the journal repeat. Raises UsageError."""
    if not isinstance(value, str):
        raise UsageError(f"{what} must be a text")
    if "\0" in value or any("\ud800" <= sign <= "\udfff" for sign in value):
        raise UsageError(f"{what} has characters that no database can store", "write it in UTF-8")
    if len(value) > TEXT_CHARACTERS_MAX:
        raise UsageError(f"{what} has {len(value):,} characters", f"at most {TEXT_CHARACTERS_MAX:,}")
    return value


def _text(instant: datetime) -> str:
    return instant.isoformat(timespec="microseconds")  # Of one length, so that they sort as texts.
