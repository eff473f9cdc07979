"""The view `frames` shows the lines of serial ports as text.

Revision ID: 0002
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels: str | None = None
depends_on: str | None = None

DROP = "DROP VIEW frames"
UP = """
CREATE VIEW frames AS
SELECT c.id * 131072 + (f.ordinal - 1) AS id,
       c.session_id,
       utc_time(f.ts_mono_ns + c.utc_offset_ns) AS ts_utc,
       f.ts_mono_ns,
       CASE WHEN f.flags & 128 = 0 THEN jsonb_build_object(
                'source', c.source,
                'id', f.arbitration_id,
                'ext', f.flags & 1 <> 0,
                'remote', f.flags & 2 <> 0,
                'error', f.flags & 4 <> 0,
                'fd', f.flags & 8 <> 0,
                'data', encode(p.payload, 'hex'))
            WHEN f.flags & 1 <> 0 THEN jsonb_build_object(
                'source', c.source,
                'text', convert_from(p.payload, 'UTF8'))
            ELSE jsonb_build_object(
                'source', c.source,
                'data', encode(p.payload, 'hex'))
       END AS payload_json
FROM frame_chunks c
CROSS JOIN LATERAL (SELECT c.data || ''::bytea AS data, c.flags || ''::bytea AS flags, c.lengths || ''::bytea AS lengths
                    OFFSET 0) d
CROSS JOIN LATERAL (
    SELECT l.ordinal, l.ts_mono_ns, l.arbitration_id, get_byte(d.flags, l.ordinal - 1) AS flags, l.length,
           sum(l.length) OVER (ORDER BY l.ordinal) AS data_end
    FROM (
        SELECT u.ordinal, u.ts_mono_ns, u.arbitration_id,
               get_byte(d.lengths, 2 * u.ordinal - 2) * 256 + get_byte(d.lengths, 2 * u.ordinal - 1) AS length
        FROM (
            SELECT generate_series(1, c.frame_count) AS ordinal,
                   unnest(c.ts_mono_ns) AS ts_mono_ns,
                   unnest(c.arbitration_id) AS arbitration_id
        ) u
    ) l
) f
CROSS JOIN LATERAL (SELECT substring(d.data FROM (f.data_end - f.length + 1)::integer FOR f.length) AS payload) p
"""
DOWN = """
CREATE VIEW frames AS
SELECT c.id * 131072 + (f.ordinal - 1) AS id,
       c.session_id,
       utc_time(f.ts_mono_ns + c.utc_offset_ns) AS ts_utc,
       f.ts_mono_ns,
       jsonb_build_object(
           'source', c.source,
           'id', f.arbitration_id,
           'ext', f.flags & 1 <> 0,
           'remote', f.flags & 2 <> 0,
           'error', f.flags & 4 <> 0,
           'fd', f.flags & 8 <> 0,
           'data', encode(substring(d.data FROM (f.data_end - f.length + 1)::integer FOR f.length), 'hex')
       ) AS payload_json
FROM frame_chunks c
CROSS JOIN LATERAL (SELECT c.data || ''::bytea AS data, c.flags || ''::bytea AS flags, c.lengths || ''::bytea AS lengths
                    OFFSET 0) d
CROSS JOIN LATERAL (
    SELECT l.ordinal, l.ts_mono_ns, l.arbitration_id, get_byte(d.flags, l.ordinal - 1) AS flags, l.length,
           sum(l.length) OVER (ORDER BY l.ordinal) AS data_end
    FROM (
        SELECT u.ordinal, u.ts_mono_ns, u.arbitration_id,
               get_byte(d.lengths, 2 * u.ordinal - 2) * 256 + get_byte(d.lengths, 2 * u.ordinal - 1) AS length
        FROM (
            SELECT generate_series(1, c.frame_count) AS ordinal,
                   unnest(c.ts_mono_ns) AS ts_mono_ns,
                   unnest(c.arbitration_id) AS arbitration_id
        ) u
    ) l
) f
"""


def upgrade() -> None:
    """CAN frames are shown as before."""
    for statement in (DROP, UP):
        op.get_bind().exec_driver_sql(statement)


def downgrade() -> None:
    """Serial frames stay; they look like CAN frames with the id 0."""
    for statement in (DROP, DOWN):
        op.get_bind().exec_driver_sql(statement)
