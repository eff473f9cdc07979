"""A database with an owner, a writer and a reader, none of them a superuser, whose names are as awkward as allowed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.parse import quote, urlsplit, urlunsplit
from uuid import uuid4

from ingestd.store import grants, migrate
from tests.conftest import on_database, psql


def as_role(dsn: str, role: str) -> str:
    """The DSN for another user, whatever its name."""
    parts = urlsplit(dsn)
    return urlunsplit(parts._replace(netloc=f"{quote(role, safe='')}@{parts.netloc.rpartition('@')[2]}"))


def quoted(name: str) -> str:
    """A name in a statement."""
    return '"' + name.replace('"', '""') + '"'


@dataclass(slots=True)
class Garage:
    """Who is who. `admin` is a DSN of a superuser; roles made with `role` go with the garage."""

    admin: str
    owner: str
    writer: str
    reader: str
    roles: list[str] = field(default_factory=list)

    def dsn(self, role: str) -> str:
        """Of the database, for a role."""
        return as_role(self.admin, role)

    def role(self, name: str, options: str = "LOGIN") -> str:
        """Make a role, with a name of this garage's own."""
        name = f"{name} {uuid4().hex[:12]}"
        psql(self.admin, f"CREATE ROLE {quoted(name)} {options}")
        self.roles.append(name)
        return name


@contextlib.contextmanager
def open_garage(server: str) -> Iterator[Garage]:
    """The schema is made by its owner, who also gives the writer and the reader what they need."""
    database = f"ingestd_test_{uuid4().hex}"
    garage = Garage(on_database(server, database), "", "", "")
    try:
        psql(server, f"CREATE DATABASE {database}")
        garage.owner, garage.writer, garage.reader = map(garage.role, ("Owner", 'Car "7"', "grafana's"))
        psql(server, f"ALTER DATABASE {database} OWNER TO {quoted(garage.owner)}")
        psql(garage.admin, f"GRANT CREATE ON SCHEMA public TO {quoted(garage.owner)}")  # before PostgreSQL 15
        with ThreadPoolExecutor(1) as thread:  # A loop of its own, whatever the loop of the test.
            thread.submit(asyncio.run, _furnish(garage)).result()
        yield garage
    finally:
        psql(server, f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")
        for role in garage.roles:
            psql(server, f"DROP ROLE {quoted(role)}")


async def _furnish(garage: Garage) -> None:
    await migrate.upgrade(garage.dsn(garage.owner))
    await grants.grant(garage.dsn(garage.owner), [garage.writer], [garage.reader])
