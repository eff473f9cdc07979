"""Giving a role exactly what a writer or a reader needs of our tables and functions, and taking away what is beyond.

One transaction, so that a role which writes meanwhile has its privileges before and after; calling it again changes
nothing. What is taken away is what this very role was given on our own tables, columns, sequences and functions. What
it has as a member of another role, or as everybody has it, is not ours to take: it is told.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import asyncpg

from ingestd.errors import StoreError
from ingestd.store.connection import connect, faults
from ingestd.store.migrate import LOCK_KEY
from ingestd.store.privileges import READER, WRITER

# Our own tables with their sequences, and our functions: `name` as it is written in a statement, `key` as in the table.
_OURS: Final = """
WITH wanted AS (SELECT name, coalesce(to_regclass(name)::oid, 0) AS oid FROM unnest($1::text[]) AS name
                WHERE name NOT LIKE '%(%'),
ours AS (
    SELECT 'TABLE' AS kind, w.name AS key, c.oid, c.oid::regclass::text AS name, c.relowner AS owner, c.relacl AS acl,
           c.relnamespace AS namespace
    FROM wanted w JOIN pg_class c USING (oid)
    UNION ALL
    SELECT 'SEQUENCE', s.oid::regclass::text, s.oid, s.oid::regclass::text, s.relowner, s.relacl, s.relnamespace
    FROM wanted w JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = w.oid
        AND d.classid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')
    JOIN pg_class s ON s.oid = d.objid AND s.relkind = 'S'
    UNION ALL
    SELECT 'FUNCTION', f, p.oid, p.oid::regprocedure::text, p.proowner, p.proacl, p.pronamespace
    FROM unnest($1::text[]) AS f JOIN pg_proc p ON p.oid = to_regprocedure(f) WHERE f LIKE '%(%'
),
given AS (
    SELECT kind, key, name, owner, '' AS of_column, a.* FROM ours CROSS JOIN LATERAL aclexplode(acl) a
    UNION ALL
    SELECT kind, key, name, owner, format(' (%I)', attname), a.*
    FROM ours JOIN pg_attribute ON kind = 'TABLE' AND attrelid = ours.oid CROSS JOIN LATERAL aclexplode(attacl) a
)
"""
_GIVEN_TO_ROLE: Final = f"""{_OURS}
SELECT kind, key, name, of_column, privilege_type, is_grantable FROM given WHERE grantee = $2::oid
ORDER BY name, of_column, privilege_type
"""
_NAMES: Final = f"{_OURS} SELECT key, kind, name FROM ours"
_FOREIGN: Final = f"""{_OURS}
SELECT DISTINCT name, pg_get_userbyid(owner) FROM ours WHERE NOT pg_has_role(owner, 'USAGE') ORDER BY 1 LIMIT 1
"""
_BY_OTHERS: Final = f"""{_OURS}
SELECT key, privilege_type || of_column || ' ON ' || name AS what, privilege_type,
       CASE grantee WHEN 0 THEN 'everybody' ELSE pg_get_userbyid(grantee) END AS whose
FROM given
WHERE kind <> 'FUNCTION' AND grantee <> owner
      AND CASE grantee WHEN 0 THEN true ELSE pg_has_role($2::oid, grantee, 'MEMBER') END
ORDER BY 2, 4
"""
_STANDING: Final = f"""{_OURS}
SELECT rolsuper AS is_superuser,
       (SELECT min(pg_get_userbyid(owner)) FROM ours WHERE pg_has_role(r.oid, owner, 'MEMBER')) AS member_of_owner,
       array_remove(ARRAY[CASE WHEN rolcreaterole THEN 'CREATEROLE' END, CASE WHEN rolcreatedb THEN 'CREATEDB' END,
           CASE WHEN rolreplication THEN 'REPLICATION' END], NULL) AS attributes,
       ARRAY(SELECT p.rolname FROM pg_roles p
             WHERE p.rolname LIKE 'pg\\_%' AND pg_has_role(r.oid, p.oid, 'MEMBER') ORDER BY 1)::text[] AS predefined,
       ARRAY(SELECT DISTINCT format('CREATE ON SCHEMA %s', n.oid::regnamespace) FROM ours JOIN pg_namespace n
             ON n.oid = namespace WHERE has_schema_privilege(r.oid, n.oid, 'CREATE')) AS schemas,
       has_database_privilege(r.oid, current_database(), 'CREATE') AS creates_schemas
FROM pg_roles r WHERE r.oid = $2::oid
"""
_LACKS: Final = f"""{_OURS}
SELECT format('USAGE ON SCHEMA %s', n.oid::regnamespace) AS what, pg_get_userbyid(n.nspowner) AS owner,
       has_schema_privilege(n.oid, 'USAGE WITH GRANT OPTION') AS may_give
FROM pg_namespace n
WHERE n.oid IN (SELECT namespace FROM ours) AND NOT has_schema_privilege($2::oid, n.oid, 'USAGE')
UNION ALL
SELECT format('CONNECT ON DATABASE %I', datname), pg_get_userbyid(datdba),
       has_database_privilege(oid, 'CONNECT WITH GRANT OPTION')
FROM pg_database WHERE datname = current_database() AND NOT has_database_privilege($2::oid, oid, 'CONNECT')
"""
# Who could do something with our tables before this release brought new ones.
_HOLDERS: Final = """
SELECT pg_get_userbyid(a.grantee), bool_or(a.privilege_type = 'INSERT'), bool_or(a.privilege_type = 'SELECT')
FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) a
WHERE c.oid = to_regclass('signal_chunks') AND a.grantee NOT IN (0, c.relowner) GROUP BY 1 ORDER BY 1
"""


@dataclass(frozen=True, slots=True)
class Grant:
    """What was done for a role."""

    role: str
    given: list[str]  # as in a statement: "INSERT ON events"
    taken: list[str]  # likewise
    beyond: list[str]  # sentences: what it can do all the same, and why


@dataclass(frozen=True, slots=True)
class Role:
    """A role as the server knows it."""

    oid: int
    name: str
    identifier: str  # quoted where it has to be


async def grant(dsn: str, writers: Collection[str], readers: Collection[str]) -> list[Grant]:
    """Make each of the roles a writer, a reader, or both, and nothing else. The user of `dsn` owns the tables.

    Raises StoreError, and then nothing has changed: a role that does not exist, a user who may not give this.
    """
    wanted: dict[str, dict[str, set[str]]] = {}
    for names, privileges in ((writers, WRITER), (readers, READER)):
        for name in names:
            of_role = wanted.setdefault(name, {})
            for key, needed in privileges.items():
                of_role.setdefault(key, set()).update(needed)
    connection = await connect(dsn, "ingestd/grant")
    try:
        async with faults(dsn):
            await connection.execute("BEGIN")
            # Two that grant at the same time would meet in the rows of the catalogue, and one of them fail.
            await connection.execute(f"SELECT pg_advisory_xact_lock({LOCK_KEY})")
            await _refuse_strangers(connection)
            roles = [await _role(connection, name) for name in wanted]
            grants = [await _grant(connection, role, wanted[role.name]) for role in roles]
            await connection.execute("COMMIT")
    finally:
        connection.terminate()
    return grants


async def holders(dsn: str) -> tuple[list[str], list[str]]:
    """The roles that write and those that read, as they were given: to be named when tables have changed."""
    connection = await connect(dsn, "ingestd/grant")
    try:
        async with faults(dsn):
            rows = await connection.fetch(_HOLDERS)
    finally:
        connection.terminate()
    return [name for name, writes, _ in rows if writes], [name for name, _, reads in rows if reads]


_KEYS: Final = sorted({*WRITER, *READER})


async def _refuse_strangers(connection: asyncpg.Connection) -> None:
    foreign = await connection.fetchrow(_FOREIGN, _KEYS)
    if foreign is not None:
        user = await connection.fetchval("SELECT current_user")
        raise StoreError(
            f"{user} may not give anything on {foreign[0]}: it belongs to {foreign[1]}",
            f"run it with a --dsn of {foreign[1]}, or of a superuser",
        )


async def _role(connection: asyncpg.Connection, name: str) -> Role:
    found = await connection.fetchrow(
        "SELECT oid, rolname, quote_ident(rolname) FROM pg_roles WHERE rolname = $1", name
    )
    if found is not None:
        return Role(*found)
    identifier = await connection.fetchval("SELECT quote_ident($1)", name)
    raise StoreError(
        f"there is no role {name}",
        f"make it, as a superuser in psql: CREATE ROLE {identifier} LOGIN; its password: \\password {identifier}",
    )


async def _grant(connection: asyncpg.Connection, role: Role, wanted: Mapping[str, Collection[str]]) -> Grant:
    objects = {key: (kind, name) for key, kind, name in await connection.fetch(_NAMES, _KEYS)}
    had, taken = set(), []
    for kind, key, name, of_column, privilege, is_grantable in await connection.fetch(_GIVEN_TO_ROLE, _KEYS, role.oid):
        if of_column or privilege not in wanted.get(key, ()):
            await connection.execute(f"REVOKE {privilege}{of_column} ON {kind} {name} FROM {role.identifier}")
            taken.append(f"{privilege}{of_column} ON {name}")
            continue
        had.add((key, privilege))
        if is_grantable:
            await connection.execute(f"REVOKE GRANT OPTION FOR {privilege} ON {kind} {name} FROM {role.identifier}")
            taken.append(f"GRANT OPTION FOR {privilege} ON {name}")
    given = await _give_way_in(connection, role)
    for key, privileges in wanted.items():
        kind, name = objects[key]
        missing = ", ".join(sorted(each for each in privileges if (key, each) not in had))
        if missing:
            await connection.execute(f"GRANT {missing} ON {kind} {name} TO {role.identifier}")
            given.append(f"{missing} ON {name}")
    return Grant(role.name, given, taken, await _beyond(connection, role, wanted))


async def _give_way_in(connection: asyncpg.Connection, role: Role) -> list[str]:
    """CONNECT and USAGE, which everybody has unless somebody took them away."""
    given = []
    for what, owner, may_give in await connection.fetch(_LACKS, _KEYS, role.oid):
        statement = f"GRANT {what} TO {role.identifier}"
        if not may_give:
            raise StoreError(f"{role.name} lacks {what}, which only its owner can give", f"as {owner}: {statement}")
        await connection.execute(statement)
        given.append(what)
    return given


async def _beyond(connection: asyncpg.Connection, role: Role, wanted: Mapping[str, Collection[str]]) -> list[str]:
    """What a role can do that it was not given here, in sentences."""
    standing = await connection.fetchrow(_STANDING, _KEYS, role.oid)
    if standing["is_superuser"]:
        return ["is a superuser: nothing is forbidden to it"]
    if (owner := standing["member_of_owner"]) is not None:
        as_what = "owns the tables" if owner == role.name else f"is a member of {owner}, who owns the tables"
        return [f"{as_what}: it can do everything with them"]
    said = []
    for whose, what in _by_whom(await connection.fetch(_BY_OTHERS, _KEYS, role.oid), wanted):
        how = {"everybody": "as everybody can", role.name: "given by another than the owner"}
        said.append(f"can {', '.join(what)}, {how.get(whose, f'as a member of {whose}')}")
    if standing["attributes"]:
        said.append(f"has {', '.join(standing['attributes'])}")
    if standing["predefined"]:
        said.append(f"is a member of {', '.join(standing['predefined'])}")
    creates = standing["schemas"] + (["CREATE ON DATABASE"] if standing["creates_schemas"] else [])
    if creates:
        said.append(f"can make tables of its own: it has {', '.join(creates)}, perhaps as everybody")
    return said


def _by_whom(rows: Iterable[Any], wanted: Mapping[str, Collection[str]]) -> Iterable[tuple[str, list[str]]]:
    """What is not wanted, by whose it is."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["privilege_type"] not in wanted.get(row["key"], ()):
            found.setdefault(row["whose"], []).append(row["what"])
    return found.items()
