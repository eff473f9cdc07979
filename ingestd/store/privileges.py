"""What the daemon, and who reads, do with each of our tables and functions; and whether a user may.

A role needs no more than this, and `ingestd db grant` (grants.py) gives it no more; tests/integration/test_grant.py
proves both. The writer is `ingestd run`, `ingestd import` and `ingestd sessions edit`: it deletes nothing but imports
that are empty, changes rows of two tables only, and does not read what is recorded. The reader is who asks in SQL,
Grafana, `ingestd sessions list`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ingestd.store.connection import connect, faults

# See schema.sql. What ON CONFLICT compares is read, unless it names no column.
WRITER: Final[Mapping[str, tuple[str, ...]]] = {
    "sessions": ("SELECT", "INSERT", "UPDATE"),
    "feeds": ("SELECT", "INSERT", "UPDATE"),
    "events": ("INSERT",),
    "signal_groups": ("INSERT",),
    "channels": ("INSERT",),
    "signal_chunks": ("INSERT",),
    "frame_chunks": ("INSERT",),
    "ingestd_version": ("SELECT",),
    "forget_empty_imports(text)": ("EXECUTE",),
}

# The views read the tables with their owner's rights; the functions, and what they are inlined into, with the caller's.
READER: Final[Mapping[str, tuple[str, ...]]] = {
    "sessions": ("SELECT",),
    "feeds": ("SELECT",),
    "events": ("SELECT",),
    "signal_groups": ("SELECT",),
    "channels": ("SELECT",),
    "signal_chunks": ("SELECT",),
    "frame_chunks": ("SELECT",),
    "signals": ("SELECT",),
    "frames": ("SELECT",),
    "ingestd_version": ("SELECT",),
    "utc_time(bigint)": ("EXECUTE",),
    "utc_ns(timestamptz)": ("EXECUTE",),
    "signals_between(uuid, text, text, timestamptz, timestamptz)": ("EXECUTE",),
    "signals_overview(uuid, text, text, timestamptz, timestamptz, integer)": ("EXECUTE",),
    "latest_signals(uuid)": ("EXECUTE",),
}

_MISSING = """
SELECT CASE kind WHEN 'FUNCTION' THEN 'FUNCTION ' ELSE '' END || name, string_agg(p, ', ')
FROM (
    SELECT w.*, CASE WHEN w.name LIKE '%(%' THEN 'FUNCTION' ELSE 'TABLE' END AS kind
    FROM unnest($1::text[], $2::text[]) AS w (name, p)
) wanted
WHERE NOT CASE kind WHEN 'FUNCTION' THEN has_function_privilege(to_regprocedure(name), p)
          ELSE has_table_privilege(name, p) END
GROUP BY kind, name ORDER BY kind DESC, name
"""


async def missing_privileges(dsn: str) -> tuple[str, str, list[str]]:
    """The server's version, the user, and the statements that would give this user what a writer lacks, if anything.

    Raises StoreError if there is no server, or no schema that this program knows.
    """
    connection = await connect(dsn, "ingestd/check")
    try:
        async with faults(dsn):
            version, user, identifier = await connection.fetchrow(
                "SELECT current_setting('server_version'), current_user::text, quote_ident(current_user)"
            )
            rows = await connection.fetch(
                _MISSING,
                [name for name, privileges in WRITER.items() for _ in privileges],
                [privilege for privileges in WRITER.values() for privilege in privileges],
            )
    finally:
        connection.terminate()
    return version, user, [f"GRANT {privileges} ON {name} TO {identifier}" for name, privileges in rows]
