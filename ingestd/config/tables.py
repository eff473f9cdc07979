"""Tables of the file to structs, and the table of a signal database, which buses and serial lines have."""

from __future__ import annotations

import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import msgspec

from ingestd.config.readers import BAD, Place, Reader, choice, kind_of, listing, path_in_folder, suggestion

DATABASE_SUFFIXES = (".dbc", ".kcd", ".sym", ".arxml")

Check = Callable[[dict[str, Any], Mapping[str, Any], Place], None]


def table(struct: type[msgspec.Struct], check: Check | None = None) -> Reader:
    """A reader of tables that become a struct.

    `check` is given the values by field name, those that are wrong left out, the table as it was, and the place; it
    reports what does not go together and may fill in defaults that depend on other keys.
    """

    def read(value: Any, at: Place) -> Any:
        if not isinstance(value, dict):
            hint = f"write [{at.key}] once" if isinstance(value, list) else f"write [{at.key}]"
            return at.wrong(f"must be a table, not {kind_of(value)}", hint)
        mistakes_before = len(at.mistakes)
        values: dict[str, Any] = {}
        hints = get_type_hints(struct, include_extras=True)
        fields = {field.encode_name: field for field in msgspec.structs.fields(struct)}
        for key in sorted(value.keys() - fields.keys()):
            (at / key).wrong("there is no such key", suggestion(key, fields))
        for key, field in fields.items():
            if key in value:
                values[field.name] = hints[field.name].__metadata__[0](value[key], at / key)
            elif field.default is not msgspec.NODEFAULT:
                values[field.name] = field.default
            elif field.default_factory is not msgspec.NODEFAULT:
                values[field.name] = field.default_factory()
            else:
                (at / key).wrong("is missing")
        if check is not None:
            values = {name: one for name, one in values.items() if one is not BAD}
            check(values, value, at)
        return BAD if len(at.mistakes) > mistakes_before else struct(**values)

    return read


def tables(struct: type[msgspec.Struct], check: Check | None = None) -> Reader:
    """A reader of [[tables]]."""
    read_all = listing(table(struct, check))

    def read(value: Any, at: Place) -> Any:
        if isinstance(value, dict):
            return at.wrong("is one table, and there may be several", f"write [[{at.key}]]")
        return read_all(value, at)

    return read


class DatabaseFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file of message definitions, and how frames find theirs."""

    file: Annotated[Path, path_in_folder]
    match: Annotated[str, choice(("auto", "id", "pgn"), "a way to match")] = "auto"


def database_file(value: Any, at: Place) -> Any:
    """A signal database: its path, or a table of `file` and `match`."""
    if isinstance(value, str):
        value, at_file = {"file": value}, at
    elif isinstance(value, dict):
        at_file = at / "file"
    else:
        return at.wrong(
            f"must be a path or a table, not {kind_of(value)}", 'write "car.dbc" or { file = "…", match = "…" }'
        )
    found = table(DatabaseFile)(value, at)
    if found is BAD:
        return BAD
    if found.file.suffix.lower() not in DATABASE_SUFFIXES:
        return at_file.wrong(f"{found.file}: unknown kind of file", "supported are " + ", ".join(DATABASE_SUFFIXES))
    try:
        if stat.S_ISREG(found.file.stat().st_mode):
            return found
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        return at_file.wrong(f"{found.file}: {error.strerror}", "it must be a file that ingestd may read")
    return at_file.wrong(f"{found.file}: there is no such file", "relative paths start at the configuration's folder")
