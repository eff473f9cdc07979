"""`ingestd db grant`, by trying: what a writer and a reader can do, what they cannot, and that all of it is needed."""

from __future__ import annotations

import asyncio
import itertools
import re
import shlex
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest

from ingestd.errors import CaptureError, StoreError
from ingestd.imports import import_file
from ingestd.model import Event
from ingestd.store import grants, migrate
from ingestd.store.privileges import READER, WRITER, missing_privileges
from ingestd.store.sessions import new_session_id, open_catalogue
from ingestd.store.writer import FeedBatch, SessionEdit, StampedEvent, Writer
from tests.books import assert_books
from tests.commands import ingestd as tell
from tests.commands import is_listening, run_ingestd, sessions
from tests.conftest import psql
from tests.integration.test_cli import ingestd
from tests.integration.test_import import DBC, contents, options
from tests.recorder import Instrument, Recorder, lines_of, wait_until
from tests.roles import Garage, open_garage, quoted

ROOT = Path(__file__).parents[2]
NOW = datetime(2026, 1, 2, tzinfo=UTC)
VIEWS = ("signals", "frames")
TABLES = [name for name in READER if "(" not in name and name not in VIEWS]
FUNCTIONS = [name for name in (*WRITER, *READER) if "(" in name]
REFUSED = asyncpg.InsufficientPrivilegeError


@pytest.fixture(scope="module")
def garage(postgres_server: str) -> Iterator[Garage]:
    """What the tests of this file share. Who changes something in it puts it right again."""
    with open_garage(postgres_server) as found:
        yield found


@pytest.fixture
def own_garage(postgres_server: str) -> Iterator[Garage]:
    """One to break things in."""
    with open_garage(postgres_server) as found:
        yield found


@pytest.fixture
def dbc(tmp_path: Path) -> Path:
    path = tmp_path / "car.dbc"
    path.write_text(DBC)
    return path


# ------------------------------------------------------------------------------------------------------- the writer


@pytest.mark.slow
def test_a_whole_recording_as_the_writer(garage: Garage, tmp_path: Path) -> None:
    """Sessions, markers, edits, connections that are cut, a kill: every frame once, the books balance, no refusal."""
    device = Instrument(tmp_path / "instrument")
    device.start()
    daemon = Recorder(tmp_path, garage.dsn(garage.writer), lines_of(device), settings='[session]\ncar_id = "rig-7"\n')
    # No other database: the connections that are cut are this daemon's.
    cut = f"SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = $name${garage.writer}$name$"
    try:
        daemon.start()
        is_listening(daemon)
        begun = sessions(daemon, "start", "--name", "lap 1", "--driver", "Kim")
        sessions(daemon, "mark", "apex")
        tell(daemon, "sessions", "edit", "notes=dry")
        wait_until(lambda: "apex" in psql(garage.admin, "SELECT payload FROM events"), "the marker", more=daemon.log)
        assert int(psql(garage.admin, cut)) >= 1
        sent = device.sent
        wait_until(lambda: device.sent > sent + 100, "a hundred lines")
        daemon.kill()
        daemon.start()
        is_listening(daemon)
        sessions(daemon, "start", "--name", "lap 2")
        stored = f"SELECT count(*) FROM sessions WHERE id = '{begun['session']['id']}' AND ended_utc IS NOT NULL"
        wait_until(lambda: psql(garage.admin, stored) == "1", "the end of the first lap", more=daemon.log)
        tell(daemon, "sessions", "edit", "lap 1", "track=wet")
        assert "may be written to" in tell(daemon, "check").stdout
        assert_books(daemon, garage.admin, {"line": device.stop()})
        edited = psql(garage.admin, "SELECT driver, notes, track FROM sessions WHERE name = 'lap 1'")
        assert edited == "Kim|dry|wet"
        assert "no permission" not in daemon.log()
    finally:
        daemon.close()
        device.close()


def of_capture(contents: dict[str, list[tuple[object, ...]]]) -> list[tuple[object, ...]]:
    """Without the ids of sessions, which are random."""
    return [row[1:] for rows in contents.values() for row in rows]


async def test_an_import_as_the_writer(own_garage: Garage, tmp_path: Path, dbc: Path) -> None:
    """What it stores is what the owner's import stores; what gives nothing leaves nothing behind."""
    log, torn = tmp_path / "drive.log", tmp_path / "torn.log"
    log.write_text("(1436509052.249713) can0 100#A00F010000000000\n(1436509052.250713) can0 101#01\n")
    await import_file(log, options((dbc, "auto")), own_garage.dsn(own_garage.owner))
    theirs = of_capture(await contents(own_garage.admin))
    await import_file(log, options((dbc, "auto"), again=True), own_garage.dsn(own_garage.writer))
    assert sorted(of_capture(await contents(own_garage.admin)), key=repr) == sorted(theirs * 2, key=repr)
    torn.write_text("(99999999999.000001) can0 100#01\n")
    with pytest.raises(CaptureError):
        await import_file(torn, options(), own_garage.dsn(own_garage.writer))
    assert psql(own_garage.admin, "SELECT count(*) FROM sessions", "SELECT count(*) FROM feeds") == "2\n2"


async def work(dsn: str, folder: Path) -> None:
    """Everything that a writer does, once: an import that gives something, one that does not, a recording, an edit."""
    name = uuid4().hex
    log, empty = folder / f"{name}.log", folder / f"{name}.empty.log"
    log.write_text(f"(1436509052.{int(name, 16) % 1000000:06}) can0 100#A00F010000000000\n")
    empty.write_text(f"(99999999999.{int(name, 16) % 1000000:06}) can0 100#01\n")  # No such time can be stored.
    (folder / "car.dbc").write_text(DBC.replace("Engine", f"E{name[:8]}"))  # a group that is new
    with pytest.raises(CaptureError):
        await import_file(empty, options(), dsn)
    summary = await import_file(log, options((folder / "car.dbc", "auto")), dsn)
    async with open_catalogue(dsn) as catalogue:
        assert await catalogue.find(summary.session_name or "") is not None
        await catalogue.edit(summary.session_id, {"driver": "Kim"})
    older, writer = Writer(dsn, "", journal=name), Writer(dsn, "", journal=name)
    try:
        await older.open()
        await writer.open()
        with pytest.raises(StoreError):
            await older.standings([name])  # The newer one has ended it.
        session = SessionEdit(new_session_id(), "a boot", NOW, NOW, name="lap")
        await writer.begin(session, name, 0, "machine")
        writer.feed_id = name
        assert (await writer.standings([name]))[name].position == await writer.position() == 0
        assert await writer.takes_writes()
        events = [StampedEvent(Event("can0", "marker", 1), 0)]
        more = {"sessions": [session], "events": events, "session_id": session.id, "ended_utc": NOW}
        await writer.commit(FeedBatch(0, 1, (), (), completed=True, **more))  # type: ignore[arg-type]
    finally:
        older.terminate()
        writer.terminate()


async def test_all_that_a_writer_does(garage: Garage, tmp_path: Path) -> None:
    """It can; and it lacks nothing, which is what `ingestd check` looks at."""
    await work(garage.dsn(garage.writer), tmp_path)
    assert (await missing_privileges(garage.dsn(garage.writer)))[1:] == (garage.writer, [])


@pytest.mark.parametrize(("name", "privilege"), [(name, each) for name, needed in WRITER.items() for each in needed])
async def test_nothing_of_it_can_be_spared(garage: Garage, tmp_path: Path, name: str, privilege: str) -> None:
    """Without any single one of its privileges a writer is refused what it does, and the remedy is named."""
    what = f"{privilege} ON {'FUNCTION ' if '(' in name else ''}{name}"
    psql(garage.admin, f"REVOKE {what} FROM {quoted(garage.writer)}")
    try:
        with pytest.raises(StoreError, match="no permission") as caught:
            await work(garage.dsn(garage.writer), tmp_path)
        assert isinstance(caught.value.__cause__, REFUSED)
        assert "ingestd db grant" in caught.value.hint
        if name != "ingestd_version":
            _, _, missing = await missing_privileges(garage.dsn(garage.writer))
            assert missing == [f"GRANT {what} TO {quoted(garage.writer)}"]
    finally:
        await grants.grant(garage.dsn(garage.owner), [garage.writer], [])


def harm() -> list[str]:
    """What neither a writer nor a reader may do: every way to lose, to change and to get out."""
    statements = [
        "CREATE TABLE mine (id int)",
        "CREATE SCHEMA mine",
        "CREATE FUNCTION mine() RETURNS int LANGUAGE sql RETURN 1",
        "CREATE ROLE mine",
        "CREATE DATABASE mine",
        "ALTER SYSTEM SET fsync = off",
        "COPY (SELECT 1) TO PROGRAM 'true'",
        "COPY (SELECT 1) TO '/dev/null'",
        "SELECT pg_read_file('postgresql.conf')",
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename <> current_user AND pid IS NOT NULL",
        "SELECT rolpassword FROM pg_authid",
        "DROP SCHEMA public CASCADE",
        "ALTER TABLE sessions DISABLE TRIGGER ALL",
        "DROP TRIGGER sessions_edited ON sessions",
        "SET session_replication_role = replica",
        "SELECT setval(pg_get_serial_sequence('frame_chunks', 'id'), 1)",
        "SELECT nextval(pg_get_serial_sequence('signal_chunks', 'id'))",
    ]
    for table in TABLES:
        statements += [
            f"DELETE FROM {table}",
            f"DROP TABLE {table} CASCADE",
            f"TRUNCATE {table} CASCADE",
            f"ALTER TABLE {table} ADD mine int",
            f"ALTER TABLE {table} OWNER TO current_user",
            f"CREATE INDEX ON {table} ((1))",
            f"CREATE TRIGGER mine BEFORE INSERT ON {table} EXECUTE FUNCTION sessions_edited()",
        ]
    for view in VIEWS:
        statements += [f"DROP VIEW {view} CASCADE", f"ALTER VIEW {view} OWNER TO current_user"]
    return statements + [f"DROP FUNCTION {name}" for name in FUNCTIONS]


def first_column(dsn: str, table: str) -> str:
    return psql(dsn, f"SELECT attname FROM pg_attribute WHERE attrelid = '{table}'::regclass AND attnum = 1")


async def assert_refused(garage: Garage, role: str, statements: list[str]) -> None:
    """Each is refused for want of a privilege, and for nothing else; nothing has changed."""
    state = (
        "SELECT relname, relowner, relacl, relnatts, relhastriggers FROM pg_class WHERE relname !~ '^pg_' ORDER BY oid"
    )
    before = psql(garage.admin, state)
    connection = await asyncpg.connect(garage.dsn(role))
    took = []
    try:
        for statement in statements:
            try:
                # Some can be no part of a transaction.
                alone = statement.startswith(("CREATE DATABASE", "ALTER SYSTEM"))
                await connection.execute(statement if alone else f"BEGIN; {statement}")
            except REFUSED:
                pass
            except asyncpg.PostgresError as error:
                took.append(f"{statement}: {error}")
            else:
                took.append(statement)
            await connection.execute("ROLLBACK")
    finally:
        await connection.close()
    assert not took
    assert psql(garage.admin, state) == before


async def test_what_a_writer_cannot_do(garage: Garage) -> None:
    """It cannot delete, change what is recorded, read it, make, drop or alter anything, or get at the server."""
    column = {table: first_column(garage.admin, table) for table in TABLES}
    unread = [name for name in TABLES if "SELECT" not in WRITER[name]]
    fixed = [name for name in TABLES if "UPDATE" not in WRITER[name]]
    closed = [name for name in TABLES if "INSERT" not in WRITER[name]]
    assert set(fixed) == set(TABLES) - {"sessions", "feeds"}
    assert set(unread) == {"signal_chunks", "frame_chunks", "events", "signal_groups", "channels"}
    await assert_refused(
        garage,
        garage.writer,
        [
            *harm(),
            *(f"UPDATE {name} SET {column[name]} = NULL" for name in fixed),
            *(f"LOCK TABLE {name} IN ACCESS EXCLUSIVE MODE" for name in fixed),
            *(f"SELECT count(*) FROM {name}" for name in [*unread, *VIEWS]),
            *(f"COPY {name} TO STDOUT" for name in unread),
            *(f"INSERT INTO {name} DEFAULT VALUES" for name in closed),
            "SELECT * FROM latest_signals(gen_random_uuid())",
            f"SET ROLE {quoted(garage.owner)}",
            f"SET ROLE {quoted(garage.reader)}",
        ],
    )


# ------------------------------------------------------------------------------------------------------- the reader


def queries(path: Path) -> list[str]:
    """The blocks of SQL on a page."""
    return re.findall(r"^```sql\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_a_reader_asks_whatever_the_pages_say(garage: Garage, tmp_path: Path, dbc: Path) -> None:
    """Every query of the README and of docs/sql.md, the lists of sessions; the views and functions give rows."""
    log = tmp_path / "drive.log"
    log.write_text("(1436509052.249713) can0 100#A00F010000000000\n(1436509052.250713) can0 101#01\n")
    imported = ["import", log, "--dbc", dbc, "--map", "can0=powertrain", "--car", "demo-car"]
    run_ingestd(*imported, "--dsn", garage.dsn(garage.writer))
    script = tmp_path / "all.sql"
    pages = [queries(ROOT / "README.md"), queries(ROOT / "docs" / "sql.md")]
    assert [len(page) for page in pages] >= [1, 6]
    script.write_text("\n".join(["\\set ON_ERROR_STOP on", *itertools.chain(*pages)]).replace("EngineSpeed", "Rpm"))
    said = ingestd("db", "psql", "-XqAt", "-f", script, dsn=garage.dsn(garage.reader)).stdout
    assert "powertrain|Engine.Rpm|1000" in said
    assert "powertrain|101|01" in said
    assert log.name in ingestd("sessions", "list", dsn=garage.dsn(garage.reader)).stdout
    assert "Engine.Rpm" in ingestd("sessions", "show", log.name, dsn=garage.dsn(garage.reader)).stdout


async def test_what_a_reader_cannot_do(garage: Garage) -> None:
    """It cannot write anything at all."""
    await assert_refused(
        garage,
        garage.reader,
        [
            *harm(),
            *(f"UPDATE {name} SET {first_column(garage.admin, name)} = NULL" for name in TABLES),
            *(f"LOCK TABLE {name} IN ROW EXCLUSIVE MODE" for name in TABLES),
            *(f"INSERT INTO {name} DEFAULT VALUES" for name in TABLES),
            *(f"COPY {name} FROM STDIN" for name in TABLES),
            "SELECT forget_empty_imports('')",
            f"SET ROLE {quoted(garage.owner)}",
            f"SET ROLE {quoted(garage.writer)}",
        ],
    )
    with pytest.raises(StoreError, match="no permission"):
        await Writer(garage.dsn(garage.reader), "f00d").takes_writes()


async def test_what_holds_something_is_not_forgotten(own_garage: Garage, tmp_path: Path) -> None:
    """The one function that deletes looks for itself, whatever a writer says of a feed."""
    await work(own_garage.dsn(own_garage.writer), tmp_path)
    counted = [f"SELECT count(*) FROM {name}" for name in ("sessions", "frame_chunks", "signal_chunks", "events")]
    before = psql(own_garage.admin, *counted, "SELECT count(*) FROM feeds WHERE kind = 'journal'")
    assert all(map(int, before.split()))
    pretended = "UPDATE feeds SET sha256 = 'mine', position = 0, completed_utc = NULL"
    psql(own_garage.dsn(own_garage.writer), pretended, "SELECT forget_empty_imports('mine')")
    assert psql(own_garage.admin, *counted, "SELECT count(*) FROM feeds WHERE sha256 = 'mine'") == before


# ------------------------------------------------------------------------------------------------------ the command


def privileges(garage: Garage, role: str) -> set[str]:
    """Everything a role was given in the database, by itself."""
    grantee = f"SELECT oid FROM pg_roles WHERE rolname = $name${role}$name$"
    given = (
        "c.oid::regclass || CASE WHEN is_grantable THEN '*' ELSE '' END FROM pg_class c, aclexplode(relacl)",
        "attrelid::regclass || '.' || attname FROM pg_attribute, aclexplode(attacl)",
        "p.oid::regprocedure FROM pg_proc p, aclexplode(proacl)",
    )
    each = (f"SELECT privilege_type || ' ON ' || {what} WHERE grantee = ({grantee})" for what in given)
    return set(psql(garage.admin, *each).splitlines())


async def test_what_is_beyond_is_taken_away_and_said(own_garage: Garage) -> None:
    """From this role, on our own tables; what others have, and what is on other tables, is left alone."""
    garage = own_garage
    car, other = quoted(garage.writer), quoted(garage.role("other"))
    wanted = privileges(garage, garage.writer)
    owner = garage.dsn(garage.owner)
    psql(
        owner,
        "CREATE TABLE theirs (id int)",
        f"GRANT ALL ON theirs TO {car}",
        f"GRANT DELETE ON sessions TO {car}, {other}",
        f"GRANT ALL ON SEQUENCE signal_chunks_id_seq TO {car}",
        f"GRANT UPDATE (key), INSERT ON events TO {car}",
        f"GRANT SELECT ON feeds TO {car} WITH GRANT OPTION",
        f"GRANT EXECUTE ON FUNCTION latest_signals(uuid) TO {car}",
        f"REVOKE INSERT ON frame_chunks FROM {car}",
    )
    [done] = await grants.grant(owner, [garage.writer], [])
    assert done.given == ["INSERT ON frame_chunks"]
    assert set(done.taken) == {
        "DELETE ON sessions",
        *(f"{each} ON signal_chunks_id_seq" for each in ("SELECT", "UPDATE", "USAGE")),
        "UPDATE (key) ON events",
        "GRANT OPTION FOR SELECT ON feeds",
        "EXECUTE ON latest_signals(uuid)",
    }
    of_ours = {each for each in privileges(garage, garage.writer) if not each.endswith(" theirs")}
    assert of_ours == wanted
    assert "INSERT ON theirs" in privileges(garage, garage.writer)
    assert "DELETE ON sessions" in privileges(garage, other.strip('"'))
    assert await grants.grant(owner, [garage.writer], []) == [grants.Grant(garage.writer, [], [], [])]


def test_one_that_writes_and_reads(own_garage: Garage) -> None:
    """Given to both options a role is both; given to one of them later it is only that; the words say each step."""
    car, owner = own_garage.role("both"), own_garage.dsn(own_garage.owner)
    said = ingestd("db", "grant", "--writer", car, "--reader", car, dsn=owner).stdout
    assert f"{car}: given INSERT, SELECT, UPDATE ON sessions\n" in said
    assert privileges(own_garage, car) == privileges(own_garage, own_garage.writer) | privileges(
        own_garage, own_garage.reader
    )
    assert ingestd("db", "grant", "--writer", car, "--reader", car, dsn=owner).stdout == f"{car}: has what it needs\n"
    done = ingestd("db", "grant", "--reader", car, "--writer", own_garage.writer, dsn=owner)
    assert f"{car}: taken away INSERT ON events\n" in done.stdout
    assert f"{own_garage.writer}: has what it needs\n" in done.stdout
    assert done.stderr == ""
    assert privileges(own_garage, car) == privileges(own_garage, own_garage.reader)


async def test_two_at_a_time(own_garage: Garage) -> None:
    """They take turns."""
    owner, car = own_garage.dsn(own_garage.owner), own_garage.role("car")
    done = await asyncio.gather(*(grants.grant(owner, [car], [own_garage.reader]) for _ in range(4)))
    assert sum(bool(first.given) for first, _ in done) == 1


async def test_a_database_that_is_closed_to_the_public(own_garage: Garage) -> None:
    """CONNECT and USAGE are given where not everybody has them; where this user cannot, who could is named."""
    garage, owner = own_garage, own_garage.dsn(own_garage.owner)
    name = psql(garage.admin, "SELECT current_database()")
    psql(garage.admin, f"REVOKE ALL ON DATABASE {name} FROM PUBLIC", "REVOKE ALL ON SCHEMA public FROM PUBLIC",
         f"ALTER SCHEMA public OWNER TO {quoted(garage.owner)}")  # fmt: skip
    with pytest.raises(StoreError, match="no permission"):
        await migrate.check(garage.dsn(garage.writer))
    [done] = await grants.grant(owner, [garage.writer], [])
    assert sorted(done.given) == [f"CONNECT ON DATABASE {name}", "USAGE ON SCHEMA public"]
    await migrate.check(garage.dsn(garage.writer))
    boss = garage.role("boss")
    psql(garage.admin, f"ALTER SCHEMA public OWNER TO {quoted(boss)}",
         f"GRANT USAGE ON SCHEMA public TO {quoted(garage.owner)}")  # fmt: skip
    with pytest.raises(StoreError, match="lacks USAGE ON SCHEMA public, which only its owner can give") as caught:
        await grants.grant(owner, [], [garage.reader])
    remedy = f"as {boss}: GRANT USAGE ON SCHEMA public TO {quoted(garage.reader)}"
    assert caught.value.hint == remedy


async def test_a_schema_that_is_not_seen(own_garage: Garage) -> None:
    """A user without USAGE is told so, and not that there is no schema."""
    psql(own_garage.admin, "ALTER SCHEMA public RENAME TO telemetry")
    with pytest.raises(StoreError, match="is in telemetry, where this user does not look or may not") as caught:
        await migrate.check(own_garage.dsn(own_garage.writer))
    assert "ingestd db grant" in caught.value.hint
    psql(own_garage.admin, f"ALTER ROLE {quoted(own_garage.writer)} SET search_path = telemetry")
    await migrate.check(own_garage.dsn(own_garage.writer))


def test_who_may_not_give(garage: Garage) -> None:
    """Not the owner: who is, is named. A role that is not there: how to make it. And nothing was changed."""
    stranger, before = garage.role("stranger"), privileges(garage, garage.writer)
    psql(garage.admin, f"GRANT SELECT ON ingestd_version TO {quoted(stranger)}")
    refused = ingestd("db", "grant", "--writer", garage.writer, dsn=garage.dsn(stranger), exit_code=1).stderr
    assert f"{stranger} may not give anything on " in refused
    assert f"it belongs to {garage.owner} (run it with a --dsn of {garage.owner}, or of a superuser)" in refused
    arguments = ["db", "grant", "--writer", stranger, "--reader", 'No "one"']
    refused = ingestd(*arguments, dsn=garage.dsn(garage.owner), exit_code=1).stderr
    assert 'there is no role No "one" (make it' in refused
    assert 'CREATE ROLE "No ""one""" LOGIN; its password: \\password "No ""one"""' in refused
    assert privileges(garage, stranger) == {"SELECT ON ingestd_version"}
    assert privileges(garage, garage.writer) == before
    assert (
        "there is no role PUBLIC"
        in ingestd("db", "grant", "--reader", "PUBLIC", dsn=garage.dsn(garage.owner), exit_code=1).stderr
    )
    assert "name one with --writer ROLE" in ingestd("db", "grant", dsn=garage.dsn(garage.owner), exit_code=2).stderr


async def test_who_can_do_more_is_named(own_garage: Garage) -> None:
    """A superuser, the owner, a member of the owner or of others, what everybody may, and attributes."""
    garage, owner = own_garage, own_garage.dsn(own_garage.owner)

    async def beyond(role: str) -> list[str]:
        [done] = await grants.grant(owner, [], [role])
        return done.beyond

    assert await beyond(garage.reader) == []
    assert await beyond(garage.role("boss", "SUPERUSER")) == ["is a superuser: nothing is forbidden to it"]
    # A member who does not inherit has it with SET ROLE.
    deputy = garage.role("deputy", f"NOINHERIT IN ROLE {quoted(garage.owner)}")
    can = "it can do everything with them"
    assert await beyond(deputy) == [f"is a member of {garage.owner}, who owns the tables: {can}"]
    psql(garage.admin, "GRANT DELETE ON feeds TO PUBLIC", "GRANT CREATE ON SCHEMA public TO PUBLIC")
    other = garage.role("other", f"CREATEROLE IN ROLE {quoted(garage.writer)}, pg_write_all_data")
    members, everybody, *rest = sorted(await beyond(other), key=len, reverse=True)
    assert members.endswith(f", as a member of {garage.writer}")
    assert "INSERT ON frame_chunks" in members
    assert "SELECT ON sessions" not in members, "that is what a reader has anyway"
    assert "has CREATE ON SCHEMA public, perhaps as everybody" in everybody
    assert sorted(rest) == ["can DELETE ON feeds, as everybody can", "has CREATEROLE",
                            "is a member of pg_write_all_data"]  # fmt: skip
    granted = ingestd("db", "grant", "--reader", other, dsn=owner)
    assert f"warning: {other} can DELETE ON feeds, as everybody can" in granted.stderr
    mine = [f"owns the tables: {can}"]
    [done] = await grants.grant(owner, [garage.owner], [])
    assert done.beyond == mine


async def test_what_another_than_the_owner_gave(own_garage: Garage) -> None:
    """It cannot be taken away by the owner, and is told."""
    garage, owner = own_garage, own_garage.dsn(own_garage.owner)
    between, name = garage.role("between"), psql(own_garage.admin, "SELECT current_database()")
    psql(owner, f"GRANT DELETE ON feeds TO {quoted(between)} WITH GRANT OPTION")
    psql(garage.dsn(between), f"GRANT DELETE ON feeds TO {quoted(garage.reader)}")
    [done] = await grants.grant(owner, [], [garage.reader])
    assert done.beyond == ["can DELETE ON feeds, given by another than the owner"]
    psql(garage.admin, f"GRANT CREATE ON DATABASE {name} TO {quoted(garage.reader)}")
    [done] = await grants.grant(owner, [], [garage.reader])
    assert "CREATE ON DATABASE" in done.beyond[-1]


def test_an_upgrade_names_the_command(own_garage: Garage) -> None:
    """What is new belongs to the owner: the roles that wrote and read are named, as the shell takes them."""
    owner = own_garage.dsn(own_garage.owner)
    ingestd("db", "downgrade", "0003", "--yes", dsn=owner)
    said = ingestd("db", "upgrade", dsn=owner).stdout
    command = re.search(r"run: ingestd (db grant .*)$", said, re.MULTILINE)
    assert command is not None
    arguments = shlex.split(command[1])
    assert arguments == ["db", "grant", "--writer", own_garage.writer, "--reader", own_garage.reader]
    assert "given EXECUTE ON forget_empty_imports(text)" in ingestd(*arguments, dsn=owner).stdout
    assert "ingestd db grant" not in ingestd("db", "upgrade", dsn=owner).stdout
