"""The function that removes what an import left empty looks for itself whether it is empty, and at files alone.

Revision ID: 0005
"""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels: str | None = None
depends_on: str | None = None

UP = """
CREATE OR REPLACE FUNCTION forget_empty_imports(p_sha256 text) RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER
BEGIN ATOMIC
    WITH gone AS (
        DELETE FROM feeds f
        WHERE f.kind = 'file' AND f.sha256 = p_sha256 AND f.position = 0 AND f.completed_utc IS NULL
        RETURNING f.feed_id, f.session_id
    ), others AS (
        SELECT f.session_id FROM feeds f WHERE f.feed_id NOT IN (SELECT gone.feed_id FROM gone)
    ), trimmed AS (
        UPDATE sessions s SET config = jsonb_set(s.config, '{imports}', coalesce((
            SELECT jsonb_agg(entry) FROM jsonb_array_elements(s.config -> 'imports') entry
            WHERE entry ->> 'feed_id' NOT IN (SELECT gone.feed_id FROM gone)), '[]'))
        WHERE s.id IN (SELECT gone.session_id FROM gone) AND s.id IN (SELECT others.session_id FROM others)
    )
    DELETE FROM sessions s
    WHERE s.id IN (SELECT gone.session_id FROM gone) AND s.id NOT IN (SELECT others.session_id FROM others)
        AND NOT EXISTS (SELECT FROM signal_chunks c WHERE c.session_id = s.id)
        AND NOT EXISTS (SELECT FROM frame_chunks c WHERE c.session_id = s.id)
        AND NOT EXISTS (SELECT FROM events e WHERE e.session_id = s.id);
END
"""
DOWN = """
CREATE OR REPLACE FUNCTION forget_empty_imports(p_sha256 text) RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER
BEGIN ATOMIC
    WITH gone AS (
        DELETE FROM feeds f WHERE f.sha256 = p_sha256 AND f.position = 0 AND f.completed_utc IS NULL
        RETURNING f.feed_id, f.session_id
    ), others AS (
        SELECT f.session_id FROM feeds f WHERE f.feed_id NOT IN (SELECT gone.feed_id FROM gone)
    ), trimmed AS (
        UPDATE sessions s SET config = jsonb_set(s.config, '{imports}', coalesce((
            SELECT jsonb_agg(entry) FROM jsonb_array_elements(s.config -> 'imports') entry
            WHERE entry ->> 'feed_id' NOT IN (SELECT gone.feed_id FROM gone)), '[]'))
        WHERE s.id IN (SELECT gone.session_id FROM gone) AND s.id IN (SELECT others.session_id FROM others)
    )
    DELETE FROM sessions s
    WHERE s.id IN (SELECT gone.session_id FROM gone) AND s.id NOT IN (SELECT others.session_id FROM others);
END
"""


def upgrade() -> None:
    """Whoever may change a feed's position could otherwise have a session go that holds something."""
    op.get_bind().exec_driver_sql(UP)


def downgrade() -> None:
    """The feed's position is believed again."""
    op.get_bind().exec_driver_sql(DOWN)
