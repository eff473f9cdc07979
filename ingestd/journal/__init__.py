"""The journal: every frame on the disk before anything else is done with it, until PostgreSQL has it.

A folder of segment files. It is the queue between capture and database, the only one; in good times as in bad ones.
docs/journal-format.md describes the files. What it promises:

- When an append returns, the kernel has the bytes: a process that is killed loses nothing. A power cut loses at most
  what came since the last `sync`.
- Every frame that was received is committed, pending, rejected or dropped for a named reason, and `books` says how
  many of each, over the journal's lifetime and across crashes. All numbers come from the records themselves.
- Damage costs what is damaged. Reading goes on behind it, and the next record says how many frames are missing.
- It never takes more than `max_bytes`, and never waits for the database.

What it does not: it cannot tell a frame that was torn off by a power cut from one that never came, nor notice damage
in what nobody reads (`ingestd journal verify` reads everything).

The files of this package, in the order of the way of a frame: `journal` is the face of it; `log` appends,
`losses` holds what could not be, `record` is the format of records and `segment` of files, `shelf` knows the files,
`room` keeps them within the budget, `ledger` keeps the books, `reader` reads back, `recovery` finds out what earlier
runs left, `holder` is the lock;
`inspection` and `verification` look
from outside.
"""

from __future__ import annotations

from ingestd.journal.journal import Journal, LastSession, Recovery, Stretch, Tally
from ingestd.journal.log import SessionInfo
from ingestd.journal.reader import ReadResult, StretchReader
from ingestd.journal.record import Kind, Record, merge

__all__ = [
    "Journal",
    "Kind",
    "LastSession",
    "ReadResult",
    "Record",
    "Recovery",
    "SessionInfo",
    "Stretch",
    "StretchReader",
    "Tally",
    "merge",
]
