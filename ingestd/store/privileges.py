"""What the writer does with each table, and whether it may."""

from __future__ import annotations

from typing import Final

from ingestd.store.connection import connect, faults

# See schema.sql. The writer never deletes, and changes rows of two tables only.
WRITER: Final = {
    "sessions": ("SELECT", "INSERT", "UPDATE"),
    "feeds": ("SELECT", "INSERT", "UPDATE"),
    "events": ("SELECT", "INSERT"),
    "signal_groups": ("SELECT", "INSERT"),
    "channels": ("SELECT", "INSERT"),
    "signal_chunks": ("INSERT",),
    "frame_chunks": ("INSERT",),
}


async def missing_privileges(dsn: str) -> tuple[str, list[str]]:
    """The server's version, and the statements that would give this user what a writer needs; none if it has all.

    Raises StoreError if there is no server, or no schema that this program knows.
    """
    connection = await connect(dsn, "ingestd/check")
    try:
        async with faults(dsn):
            version, user = await connection.fetchrow(
                "SELECT current_setting('server_version'), quote_ident(current_user)"
            )
            rows = await connection.fetch(
                "SELECT t, string_agg(p, ', ') FROM unnest($1::text[], $2::text[]) AS wanted (t, p)"
                " WHERE NOT has_table_privilege(t, p) GROUP BY t ORDER BY t",
                [table for table, privileges in WRITER.items() for _ in privileges],
                [privilege for privileges in WRITER.values() for privilege in privileges],
            )
    finally:
        connection.terminate()
    return version, [f"GRANT {privileges} ON {table} TO {user}" for table, privileges in rows]
