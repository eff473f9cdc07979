"""Configurations: a `Config`, or mistakes that each name their place, whatever the file holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

from hypothesis import strategies as st

from ingestd.config import Config, describe, load_config
from ingestd.errors import ConfigError
from tests.property.fuzz.mutations import MADE_HERE, TOKENS, Corpus, Seed, mutated, read
from tests.property.fuzz.target import Strategies, Target, scratch

ROOT: Final = Path(__file__).parents[3]
SECRET: Final = "sEcReT"
# The place comes first, a key as TOML writes it; only what concerns the whole file has none.
MISTAKE = re.compile(r"[\w\[\]\-]+(\.([\w\-]+|\".*\")(\[\d+\])*)*: \S.*|\".*|there is no source .*")

FULL = f"""[session]
car_id = "rig-7"
[database]
dsn = "postgresql://ingestd:{SECRET}@db.garage/telemetry?sslmode=require"
[journal]
path = "journal"
max_bytes = "8GiB"
when_full = "drop-newest"
sync_interval = "100ms"
[batch]
interval = "0.5s"
[http]
listen = "[::1]:9464"
[[can]]
name = "powertrain"
channel = "can0"
dbc = ["a.dbc", {{ file = "a.dbc", match = "pgn" }}]
filters = ["7E8", "700-7FF", "123:7F0", 0x18FEF100]
receive_buffer = "16MiB"
[[can]]
name = "body"
interface = "slcan"
channel = "/dev/ttyACM0"
bitrate = 500_000
options = {{ listen_only = true, note = "x", ratio = 0.5 }}
[[serial]]
name = "gps"
port = "/dev/ttyACM1"
protocol = "nmea"
baudrate = 38400
stopbits = 1.5
""".encode()

TEXTS = (
    b"[[can]]\n", b"[can]\n", b"[[serial]]\n", b"[database]\n", b"dsn = ", b"filters = ", b"options = ", b"= 1979-05-27\n",
    b"'", b'"', b'"""', b"[" * 300, b"{a=" * 300, b"0x" + b"F" * 5000, b"1" * 5000, b"1e400", b"nan", b"\\u0000", b"\\n",
    b"\\u202e", b"true", b"[]", b"{}", b"{ a = [1] }", b"~nobody/", b"/" + b"a" * 300, b"../" * 50, b"0-1FFFFFFF",
    b"a.b.c = 1\n", b"=", b"\xc3\xa9", b"-0", b"99999h", b"9999999999999999999999999GiB", b"1ns", b"#", b"%zz", b"[::",
)  # fmt: skip


class Literal(str):
    """TOML that stands for itself."""


LITERALS: Final = tuple(
    map(Literal, ["0x" + "F" * 5000, "1" * 5000, "1e400", "-nan", "1979-05-27", "07:32:00", "[" * 2000 + "]" * 2000])
)
_odd = st.one_of(
    st.sampled_from(LITERALS),
    st.text(max_size=20),
    st.sampled_from(["", " ", "\0", "\n", "a\nb", "a" * 300, f"{'a' * 300}.dbc", "/" * 3, "~nobody", "é", "\u202e", "1" * 5000 + "s", "9" * 5000 + "kB"]),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.booleans(),
)  # fmt: skip
_values = st.recursive(
    _odd,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
GOOD_VALUES: Final[dict[str, dict[str, list[Any]]]] = {
    "session": {"car_id": ["rig"], "name": ["a"], "notes": ["b"]},
    "database": {"dsn": ["postgresql://a@b/c"], "embedded": [True, False], "store_frames": [False]},
    "journal": {
        "path": ["j", "~/j", "a.dbc"],
        "max_bytes": ["8GiB", "1 GB"],
        "when_full": ["drop-oldest"],
        "sync_interval": ["1ms"],
    },
    "batch": {"interval": ["1s"]},
    "http": {"listen": ["off", ":0", "localhost:1", "[::1]:80"]},
    "can": {
        "name": ["can0", "b"], "interface": ["socketcan", "virtual", "pcan"], "channel": ["can0", "vcan1", 0, "PCAN_USBBUS1"],
        "fd": [True, False], "dbc": [[], ["a.dbc"], [{"file": "a.dbc", "match": "id"}]],
        "filters": ["none", "databases", ["7E8"], ["0-1FFFFFFF"]], "receive_buffer": ["64KiB"], "bitrate": [500_000],
        "options": [{}, {"app_name": "x", "fd": True}],
    },
    "serial": {
        "name": ["gps", "can0"], "port": ["/dev/ttyS0", "COM1"], "protocol": ["nmea", "lines"], "baudrate": [9600],
        "bytesize": [8, 7], "parity": ["none"], "stopbits": [1, 1.5, 2],
    },
}  # fmt: skip
LISTS: Final = ("can", "serial")
NEEDED: Final = frozenset({"name", "port", "protocol", "dsn"})  # in the tables that have them
GONE: Final = object()


def _made_here() -> list[Seed]:
    return [Seed("full", FULL), Seed("short", b"[database]\nembedded = true\n[[can]]\nname = 'can0'\n")]


def _draw_text(corpus: Corpus) -> Strategies:
    documents = [ROOT / "docs" / "ingestd.example.toml", *_blocks()]
    seeds = _made_here() + [read(one, -1) if isinstance(one, Path) else one for one in documents]
    return {"content": mutated(seeds, tokens=(*TEXTS, *TOKENS))}


def _blocks() -> list[Seed]:
    """The examples of the documentation."""
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    return [Seed(f"docs {n}", block.encode()) for n, block in enumerate(re.findall(r"```toml\n(.*?)```", text, re.S))]


def _good(known: dict[str, list[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """A table that is right, if the others are."""
    needed = {key: st.sampled_from(values) for key, values in known.items() if key in NEEDED}
    return st.fixed_dictionaries(needed, optional={key: st.sampled_from(known[key]) for key in known.keys() - NEEDED})


_edits = st.lists(
    st.tuples(
        st.one_of(st.sampled_from(sorted(GOOD_VALUES)), st.text(max_size=5)),
        st.one_of(st.none(), st.sampled_from(sorted({key for known in GOOD_VALUES.values() for key in known})), st.text(max_size=5)),
        st.one_of(st.just(GONE), st.text(max_size=12).map(lambda some: f"postgresql://u:{SECRET}{some}@h/d"), _values),
    ),
    max_size=3,
)  # fmt: skip


def _draw_structure(corpus: Corpus) -> Strategies:
    tables = {
        name: st.lists(_good(known), max_size=2) if name in LISTS else _good(known)
        for name, known in GOOD_VALUES.items()
    }
    structures = st.fixed_dictionaries(
        {"database": tables.pop("database"), "serial": tables.pop("serial")}, optional=tables
    )
    return {"structure": st.builds(_edited, structures, _edits)}


def _edited(structure: dict[str, Any], edits: list[tuple[str, str | None, Any]]) -> dict[str, Any]:
    """Each edit replaces a table, or a key in it, or takes it away; in a list of tables, in the last one."""
    edited = dict(structure)
    for name, key, value in edits:
        if isinstance(value, str) and SECRET in value and key != "dsn":
            continue  # Only there is it a secret.
        table = edited.get(name, {})
        last = table[-1] if isinstance(table, list) and table else table
        if key is not None and isinstance(last, dict):
            last = {known: one for known, one in last.items() if known != key} | ({} if value is GONE else {key: value})
            edited[name] = [*table[:-1], last] if isinstance(table, list) else last
        elif value is GONE:
            edited.pop(name, None)
        else:
            edited[name] = value
    return edited


def toml(value: Any) -> str:
    """TOML that means the value; tables inline, so that any structure can be written."""
    if isinstance(value, Literal):
        return value
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(key)} = {toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value).replace("\x7f", "\\u007f") if value.isascii() else _quoted(value)
    if isinstance(value, float):
        text = repr(value)
        return text if any(sign in text for sign in ".en") else f"{text}.0"
    return str(value).lower()


def _quoted(text: str) -> str:
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08X}" for c in text) + '"'


def check_structure(structure: dict[str, Any]) -> None:
    """As `check_text`, for a file that is TOML."""
    check_text("".join(f"{key} = {toml(value)}\n" for key, value in structure.items()).encode())


def check_text(content: bytes) -> None:
    """A configuration that can be used and described as JSON; or a line for each mistake. The password is in neither."""
    folder = scratch()
    (folder / "a.dbc").touch()
    path = folder / "ingestd.toml"
    path.write_bytes(content)
    try:
        config = load_config(path, environment={})
    except ConfigError as error:
        said, is_known = str(error), True
        assert said.startswith(f"{path}: ")
        if said.startswith((f"{path}: not TOML", f"{path}: not UTF-8")):
            assert error.hint
            return
        first, *others = said.removeprefix(f"{path}: ").split("\n  ")
        mistakes = others or [first]
        assert not others or first == f"{len(others)} mistakes"
        for mistake in mistakes:
            assert MISTAKE.fullmatch(mistake), mistake
            assert mistake.isprintable(), mistake
        is_known = SECRET not in said
        assert is_known, said
    else:
        _check_config(config)


def _check_config(config: Config) -> None:
    assert config.can or config.serial
    assert config.database.dsn or config.database.embedded
    assert config.journal.path.is_absolute()
    names = [source.name for source in (*config.can, *config.serial)]
    assert len(set(names)) == len(names)
    described = json.dumps(describe(config), allow_nan=False)  # PostgreSQL's JSON has neither NaN nor NUL.
    assert "\\u0000" not in described
    for shown in (described, repr(config)):
        assert SECRET not in shown


TARGETS = (
    Target("config_text", _draw_text, check_text, 250, (MADE_HERE,)),
    Target("config_structure", _draw_structure, check_structure, 250, (MADE_HERE,)),
)
