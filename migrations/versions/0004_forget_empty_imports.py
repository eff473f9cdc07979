"""What an import began and left empty is removed by a function, so that nobody who imports may delete anything else.

Revision ID: 0004
"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels: str | None = None
depends_on: str | None = None

UP = (
    """
CREATE FUNCTION forget_empty_imports(p_sha256 text) RETURNS void
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
""",
    "REVOKE EXECUTE ON FUNCTION forget_empty_imports(text) FROM PUBLIC",
)
DOWN = ("DROP FUNCTION forget_empty_imports(text)",)


def upgrade() -> None:
    """Whoever imports and does not own the tables needs EXECUTE on it: `ingestd db grant`."""
    for statement in UP:
        op.get_bind().exec_driver_sql(statement)


def downgrade() -> None:
    """Whoever imports has to be allowed to DELETE again."""
    for statement in DOWN:
        op.get_bind().exec_driver_sql(statement)
