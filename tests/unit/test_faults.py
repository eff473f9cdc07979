"""What errors of PostgreSQL mean: the fate of a batch, and the sentence for the operator."""

from __future__ import annotations

import asyncpg
import pytest
from sqlalchemy.exc import InvalidRequestError

from ingestd.errors import StoreError, StoreRejected, StoreUnavailable
from ingestd.store.dsn import place, secrets_in, without_secrets
from ingestd.store.faults import Cause, classify, translate

DSN = "postgresql://me:s3cret@db.garage/telemetry"


def server_error(code: str, message: str = "said so") -> asyncpg.PostgresError:
    """An error as asyncpg makes it from a server's answer."""
    return asyncpg.PostgresError.new({"S": "ERROR", "C": code, "M": message})


@pytest.mark.parametrize(
    ("code", "cause", "unavailable", "hint"),
    [
        ("08006", Cause.TRANSIENT, True, ""),
        ("08P01", Cause.UNKNOWN, False, ""),
        ("22003", Cause.DATA, False, ""),
        ("22023", Cause.UNKNOWN, False, ""),
        ("22P04", Cause.DATA, False, ""),
        ("23514", Cause.DATA, False, ""),
        ("25006", Cause.STATE, True, "standby"),
        ("28P01", Cause.STATE, False, "pgpass"),
        ("2BP01", Cause.STATE, False, r"\d+"),
        ("3D000", Cause.STATE, False, "createdb"),
        ("40P01", Cause.TRANSIENT, True, ""),
        ("42501", Cause.STATE, False, "ingestd db grant"),
        ("42P01", Cause.STATE, False, "ingestd db init"),
        ("53100", Cause.STATE, True, "free space"),
        ("53300", Cause.TRANSIENT, True, "max_connections"),
        ("57014", Cause.TRANSIENT, True, "statement_timeout"),
        ("57P01", Cause.TRANSIENT, True, ""),
        ("XX000", Cause.UNKNOWN, False, ""),
        ("ZZZZZ", Cause.UNKNOWN, False, ""),
    ],
)
def test_sqlstates(code: str, cause: Cause, unavailable: bool, hint: str) -> None:
    """Each class of error has its cause; only data that can never go in is rejected."""
    error = server_error(code)
    assert classify(error).cause is cause
    translated = translate(error, DSN)
    assert isinstance(translated, StoreRejected) == (cause is Cause.DATA)
    assert isinstance(translated, StoreUnavailable) == unavailable
    assert hint in translated.hint


@pytest.mark.parametrize(
    ("error", "unavailable", "said"),
    [
        (ConnectionRefusedError(111, "Connection refused"), True, "cannot be reached at db.garage:5432/telemetry"),
        (TimeoutError(), True, "did not answer in time"),
        (asyncpg.InterfaceError("connection is closed"), True, "broke"),
        (asyncpg.InternalClientError("cannot switch to state 15"), True, "broke"),
        (ValueError("invalid port"), False, "address of the database cannot be used"),
    ],
)
def test_errors_of_the_way_there(error: Exception, unavailable: bool, said: str) -> None:
    """What goes wrong before the server can say anything is named too, and a lost connection may be tried again."""
    translated = translate(error, DSN)
    assert isinstance(translated, StoreError)
    assert isinstance(translated, StoreUnavailable) == unavailable
    assert said in str(translated)


def test_what_nobody_knows_may_not_be_the_datas_fault() -> None:
    """An error that is neither the server's nor the system's has no place in the table: it is kept, and said."""
    error = InvalidRequestError("this session is closed")
    assert classify(error).cause is Cause.UNKNOWN
    translated = translate(error, DSN)
    assert type(translated) is StoreError
    assert "failed: this session is closed" in str(translated)


def test_an_address_that_cannot_be_parsed_has_a_place() -> None:
    """Not even its host can be told then, and nothing in it is taken for a password."""
    broken = "postgresql://me:s3cret@[::1/telemetry"
    assert place(broken) == "(a DSN that cannot be parsed)"
    translated = translate(ValueError("invalid DSN"), broken)
    assert "cannot be used: it is no such address" in str(translated)
    assert "s3cret" not in str(translated)


@pytest.mark.parametrize(
    ("dsn", "said"),
    [
        ("postgresql://me@/telemetry?host=/run/postgresql", "telemetry in /run/postgresql"),
        ("postgresql://me@/?host=/run/postgresql", "/run/postgresql"),
        ("postgresql://me@db.garage", "db.garage:5432"),
        ("postgresql://me@[::1]:6543/telemetry", "[::1]:6543/telemetry"),
    ],
)
def test_the_place_of_a_database(monkeypatch: pytest.MonkeyPatch, dsn: str, said: str) -> None:
    """Host and port, or the folder of a socket, and the database where one is named."""
    for name in ("PGHOST", "PGPORT", "PGDATABASE"):
        monkeypatch.delenv(name, raising=False)
    assert place(dsn) == said


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://me:s3cret/more@db/x",
        "postgresql://me:s3cret?more@db/x",
        "postgresql://me:12?s3cret@db/x",
        "postgresql://me:s3cret#more@db/x",
        "postgresql://me:s3cret#more",
        "postgresql://me:[s3cret]@db/x",
        "postgresql://me:s3cret℀@db/x",
        "mysql://me:s3cret/more@db/x",
        "host=db password=s3cret",
        "postgresql://db/x?password=more&s3cret",
    ],
)
def test_a_password_with_signs_that_mean_something_else(dsn: str) -> None:
    """Nothing of it is shown, wherever the signs have moved it to, whatever Python's own words quote."""
    quoting = ValueError(f"invalid literal for int() with base 10: '{dsn}'")
    assert "s3cret" not in str(translate(quoting, dsn))
    assert "s3cret" not in place(dsn)


def test_a_dsn_without_its_passwords() -> None:
    """The rest stays to the letter, and every form of a password is known, so that it can be kept out of messages."""
    dsn = "postgresql://m%40e:h%75sh@db:1/x?sslmode=verify-full&sslpassword=o+pen%21&password=2nd&sslkey=/k%20ey"
    assert without_secrets(dsn) == ("postgresql://m%40e@db:1/x?sslmode=verify-full&sslkey=/k%20ey", "hush")
    assert without_secrets("postgresql://me@db/x?password=a%25+b")[1] == "a% b"
    for bare in ("postgresql:///x?host=/run/postgresql", "postgresql://me@/x", "postgresql://me@db", "postgresql://"):
        assert without_secrets(bare) == (bare, None)
    assert set(secrets_in(dsn)) == {"h%75sh", "hush", "o+pen%21", "o+pen!", "o pen!", "2nd"}
    assert secrets_in("postgresql://me@db/x") == []


def test_no_message_shows_a_password() -> None:
    """Not even where the driver's own words contain it."""
    translated = translate(ValueError(f"cannot parse {DSN}"), DSN)
    assert "s3cret" not in str(translated)
    assert "s3cret" not in place(DSN)
