"""A session that is edited by hand is stamped with the time of the edit.

Revision ID: 0003
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels: str | None = None
depends_on: str | None = None

UP = (
    """
CREATE FUNCTION sessions_edited() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    NEW.updated_utc := greatest(clock_timestamp(), OLD.updated_utc + interval '1 microsecond');
    RETURN NEW;
END
$$
""",
    """
CREATE TRIGGER sessions_edited BEFORE UPDATE OF name, car_id, driver, track, notes ON sessions
FOR EACH ROW
WHEN (NEW.updated_utc = OLD.updated_utc AND (NEW.name, NEW.car_id, NEW.driver, NEW.track, NEW.notes)
      IS DISTINCT FROM (OLD.name, OLD.car_id, OLD.driver, OLD.track, OLD.notes))
EXECUTE FUNCTION sessions_edited()
""",
)
DOWN = ("DROP TRIGGER sessions_edited ON sessions", "DROP FUNCTION sessions_edited()")


def upgrade() -> None:
    """Edits of before keep their stamps."""
    for statement in UP:
        op.get_bind().exec_driver_sql(statement)


def downgrade() -> None:
    """Whoever edits by hand has to set updated_utc again."""
    for statement in DOWN:
        op.get_bind().exec_driver_sql(statement)
