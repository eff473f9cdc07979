"""The configuration: what a file means, and what is said about one that means nothing."""

from __future__ import annotations

import json
import re
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_args, get_type_hints

import can.interfaces
import msgspec
import pytest

from ingestd import config as configuration
from ingestd.config import (
    Address,
    Config,
    Filter,
    describe,
    existing_journal,
    find_control_socket,
    journal_for,
    load_config,
)
from ingestd.config.readers import BAD, Place
from ingestd.config.serial_lines import CHECKSUMS, PROTOCOLS
from ingestd.config.tables import DATABASE_SUFFIXES
from ingestd.decode.checksums import CHECKS
from ingestd.decode.databases import FORMATS, Match
from ingestd.errors import ConfigError
from ingestd.framing import FRAMERS
from tests.plugins import install_example

DOCS = Path(__file__).parents[2] / "docs"
MINIMAL = '[database]\ndsn = "postgresql://db/telemetry"\n[[can]]\nname = "can0"\n'
NO_DATABASE = '[[can]]\nname = "can0"\n'


def load(tmp_path: Path, content: str, **how: Any) -> Config:
    path = tmp_path / "car.toml"
    path.write_text(content, encoding="utf-8")
    return load_config(path, **{"environment": {}, **how})


def mistakes(tmp_path: Path, content: str, **how: Any) -> list[str]:
    """The lines about mistakes, without the file's name."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, content, **how)
    assert caught.value.exit_code == 2
    first, *rest = str(caught.value).splitlines()
    assert first.startswith(f"{tmp_path / 'car.toml'}: ")
    said = first.removeprefix(f"{tmp_path / 'car.toml'}: ")
    if not rest:
        return [said]
    assert said == f"{len(rest)} mistakes"
    return [line.strip() for line in rest]


def mistake(tmp_path: Path, content: str, **how: Any) -> str:
    [only] = mistakes(tmp_path, content, **how)
    return only


def test_four_lines_are_enough(tmp_path: Path) -> None:
    """Everything else has a default, and the network interface is the source's name."""
    config = load(tmp_path, MINIMAL)
    [bus] = config.can
    assert (bus.name, bus.channel, bus.interface, bus.fd, bus.filters) == ("can0", "can0", "socketcan", True, "none")
    assert config.database.store_frames
    assert config.http.listen == Address("127.0.0.1", 9464)
    assert config.journal.max_bytes == 8 * 1024**3
    assert (config.journal.sync_interval_seconds, config.batch.interval_seconds) == (0.1, 0.5)
    with pytest.raises(AttributeError):
        config.batch.interval_seconds = 1.0  # type: ignore[misc]


def test_a_file_with_everything(tmp_path: Path) -> None:
    """Each key arrives where it belongs, in the unit that the field names; paths start at the file's folder."""
    (tmp_path / "a.dbc").touch()
    (tmp_path / "b.KCD").touch()
    config = load(
        tmp_path,
        """
        session = { car_id = "rig-7", name = "n", driver = "d", track = "t", notes = "x" }
        http.listen = "[::1]:0"
        batch.interval = "1.5s"
        [database]
        embedded = true
        store_frames = false
        [journal]
        path = "spool"
        max_bytes = "500MB"
        when_full = "drop-newest"
        sync_interval = "10 ms"
        [[can]]
        name = "truck"
        channel = "can7"
        fd = false
        dbc = ["a.dbc", { file = "b.KCD", match = "pgn" }]
        filters = "databases"
        receive_buffer = "1MiB"
        [[can]]
        name = "usb"
        interface = "slcan"
        channel = 3
        bitrate = 500_000
        options = { listen_only = true, sleep_after_open = 0.5 }
        [[serial]]
        name = "gps"
        port = "/dev/ttyACM0"
        baudrate = 38400
        protocol = "nmea"
        bytesize = 7
        parity = "even"
        stopbits = 1.5
        """,
    )
    assert (config.session.car_id, config.session.notes) == ("rig-7", "x")
    assert config.http.listen == Address("::1", 0)
    assert config.batch.interval_seconds == 1.5
    assert (config.database.dsn, config.database.embedded, config.database.store_frames) == (None, True, False)
    assert (config.journal.path, config.journal.max_bytes) == (tmp_path / "spool", 500_000_000)
    assert (config.journal.when_full, config.journal.sync_interval_seconds) == ("drop-newest", 0.01)
    truck, usb = config.can
    assert [(d.file, d.match) for d in truck.dbc] == [(tmp_path / "a.dbc", "auto"), (tmp_path / "b.KCD", "pgn")]
    assert (truck.fd, truck.filters, truck.receive_buffer_bytes) == (False, "databases", 1024**2)
    assert (usb.channel, usb.bitrate, usb.fd) == (3, 500_000, False)
    assert usb.options == {"listen_only": True, "sleep_after_open": 0.5}
    [gps] = config.serial
    assert (gps.baudrate, gps.protocol, gps.bytesize, gps.parity, gps.stopbits) == (38400, "nmea", 7, "even", 1.5)
    assert json.loads(json.dumps(describe(config)))["can"][0]["dbc"][1]["match"] == "pgn"


def test_every_mistake_is_reported_at_once(tmp_path: Path) -> None:
    """Key, what is wrong and what to do, for each, in one error; none hides another."""
    said = mistakes(
        tmp_path,
        """
        [database]
        dsn = "host=db password=hunter2"
        [journal]
        max_bytes = "1MiB"
        sync_interval = 100
        [batch]
        intervall = "1s"
        [[can]]
        name = "a/b"
        interface = "sockectan"
        dbc = ["gone.dbc"]
        [[can]]
        chanel = "can1"
        """,
    )
    assert [line.partition(": ")[0] for line in said] == [
        "database.dsn",
        "journal.max_bytes",
        "journal.sync_interval",
        "batch.intervall",
        "can[0].name",
        "can[0].interface",
        "can[0].dbc[0]",
        "can[1].chanel",
        "can[1].name",
    ]
    assert all("(" in line for line in said[:-1])
    assert 'did you mean "interval"?' in said[3]
    assert 'did you mean "socketcan"?' in said[5]
    assert str(tmp_path / "gone.dbc") in said[6]
    assert "hunter2" not in "".join(said)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('sesion = { car_id = "x" }', 'sesion: there is no such key (did you mean "session"?)'),
        ('"a\\nb\\u202e" = 1', '"a\\nb\\u202e": there is no such key'),
        ('[journal]\npath = "' + "a" * 300 + '"', "journal.path: "),
        ('[batch]\ninterval = "' + "1" * 5000 + 's"', "batch.interval: "),
        (f"[batch]\ninterval = 0x{'F' * 5000}", "batch.interval: is a whole number beyond 64 bits"),
        ("[[can]]\nname = 'b'\ninterface = []", "can[1].interface: must be a text, not a list"),
        (f"[[can]]\nname = 'b'\ndbc = ['{'a' * 300}.dbc']", "can[1].dbc[0]: "),
        ("[[can]]\nname = 'b'\ninterface = 'virtual'\noptions = {a = nan}", "can[1].options.a: is nan"),
        ("[[can]]\nname = 'b'\ninterface = 'virtual'\noptions = {a = \"\\u0000\"}", "can[1].options.a: has a NUL"),
        ("session = 3", "session: must be a table, not a whole number (write [session])"),
        ("[[batch]]", "batch: must be a table, not a list (write [batch] once)"),
        ("[session]\ncar_id = 7", 'session.car_id: must be a text, not a whole number (write it in quotes: "…")'),
        ('[session]\nname = "\\u0000"', "session.name: has a NUL character, which no database can store"),
        ('[session]\n"a b" = 1', 'session."a b": there is no such key'),
        ('[journal]\nmax_bytes = "63MiB"', "journal.max_bytes: 63MiB is out of range (from 64MiB to 1024TiB)"),
        ('[journal]\nmax_bytes = "8G"', 'journal.max_bytes: "8G" is not a size'),
        (
            '[journal]\nwhen_full = "stop"',
            'journal.when_full: "stop" is not a policy (known: drop-newest, drop-oldest)',
        ),
        ('[journal]\nsync_interval = "0.9ms"', "journal.sync_interval: 0.9ms is out of range (from 1ms to 10s)"),
        ('[journal]\nsync_interval = "11s"', "journal.sync_interval: 11s is out of range"),
        ('[journal]\npath = ""', "journal.path: is empty"),
        ('[journal]\npath = "car.toml"', "journal.path: "),
        ('[batch]\ninterval = "9ms"', "batch.interval: 9ms is out of range (from 10ms to 60s)"),
        ('[batch]\ninterval = "2min"', "batch.interval: 2min is out of range"),
        ('[batch]\ninterval = "fast"', 'batch.interval: "fast" is not a duration'),
        ('[http]\nlisten = "localhost"', 'http.listen: "localhost" is not an address to listen at'),
        ('[http]\nlisten = "h:65536"', 'http.listen: "h:65536" is not'),
        ('[http]\nlisten = "::1:80"', 'http.listen: "::1:80" is not'),
        ("[http]\nlisten = true", "http.listen: must be a text, not true"),
        ("[[can]]\nname = 'can1'\nfd = 1", "can[1].fd: must be true or false, not a whole number"),
        ("[[can]]\nname = 'can0'\nchannel = 'can1'", 'can[1].name: "can0" is the name of can[0] already'),
        ("[[can]]\nname = 'other'\nchannel = 'can0'", 'can[1].channel: "can0" is recorded by can[0] already'),
        ("[[can]]\nname = 'can1'\nchannel = 'sixteen-bytes-xx'", 'can[1].channel: "sixteen-bytes-xx" cannot be'),
        ("[[can]]\nname = 'can1'\nchannel = 1", "can[1].channel: 1 cannot be a network interface"),
        ("[[can]]\nname = 'can1'\nchannel = ''", "can[1].channel: is empty"),
        ("[[can]]\nname = ' x'\nchannel = 'can1'", "can[1].name: ' x' cannot be a name"),
        (f"[[can]]\nname = '{'é' * 51}'\nchannel = 'can1'", "can[1].name: is 102 bytes long (at most 100)"),
        ("[[can]]\nname = 'can1'\nbitrate = 500000", "can[1].bitrate: is set in the system for socketcan (ip link set"),
        ("[[can]]\nname = 'can1'\noptions = { a = 1 }", "can[1].options: are for python-can's other interfaces"),
        ("[[can]]\nname = 'x'\ninterface = 'pcan'\noptions = { fd = true }", "can[1].options.fd: is a key of [[can]]"),
        (
            "[[can]]\nname = 'x'\ninterface = 'pcan'\noptions = { a = [1] }",
            "can[1].options.a: must be a text, a number",
        ),
        ("[[can]]\nname = 'x'\ninterface = 'pcan'\nfilters = ['7E8']", "can[1].filters: is for socketcan alone"),
        ("[[can]]\nname = 'can1'\nfilters = 'databases'", 'can[1].filters: "databases" needs signal databases'),
        ("[[can]]\nname = 'can1'\ndbc = 'a.dbc'", "can[1].dbc: must be a list, not a text"),
        ("[[can]]\nname = 'can1'\ndbc = [{ match = 'id' }]", "can[1].dbc[0].file: is missing"),
        ("[[can]]\nname = 'can1'\ndbc = ['car.toml']", "can[1].dbc[0]: "),
        ("[[serial]]\nname = 'can0'\nport = 'p'\nprotocol = 'nmea'", 'serial[0].name: "can0" is the name of can[0]'),
        ("[[serial]]\nname = 'g'\nport = 'p'\nprotocol = 'nema'", 'serial[0].protocol: "nema" is not a protocol (did'),
        ("[[serial]]\nname = 'g'\nport = 'p'", "serial[0].protocol: is missing"),
        ("[[serial]]\nname = 'g'\nport = ''\nprotocol = 'nmea'", "serial[0].port: is empty"),
        ("[[serial]]\nname='g'\nport='p'\nprotocol='nmea'\nbytesize = 9", "serial[0].bytesize: 9 is not a number of"),
        (
            "[[serial]]\nname='g'\nport='p'\nprotocol='nmea'\nstopbits = true",
            "serial[0].stopbits: true is not a number",
        ),
        ("[[serial]]\nname='g'\nport='p'\nprotocol='nmea'\nbaudrate = 3", "serial[0].baudrate: 3 is out of range"),
        ("[serial]\nname = 'g'", "serial: is one table, and there may be several (write [[serial]])"),
    ],
)
def test_a_mistake_is_named_with_its_key(tmp_path: Path, line: str, expected: str) -> None:
    """One mistake in a file that is right otherwise is one line that says where, what, and mostly what to do."""
    content = f"{MINIMAL}{line}\n" if line.startswith("[") else f"{line}\n{MINIMAL}"
    assert mistake(tmp_path, content).startswith(expected)


def test_a_file_that_is_not_toml(tmp_path: Path) -> None:
    """The line is named, and so is a file that is missing or in another encoding."""
    assert "line 2" in mistake(tmp_path, "[session]\ncar_id = rig\n")
    path = tmp_path / "latin.toml"
    path.write_bytes(b'[session]\ntrack = "N\xfcrburgring"\n')
    with pytest.raises(ConfigError, match="not UTF-8 at line 2"):
        load_config(path)
    for odd in ("1" * 5000, "[" * 2000):
        with pytest.raises(ConfigError, match=r"car\.toml: not TOML"):
            load(tmp_path, f"a = {odd}\n")
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="directory"):
        load_config(tmp_path)


def test_an_empty_file(tmp_path: Path) -> None:
    """It says both things that every file needs."""
    assert [line.partition(" (")[0] for line in mistakes(tmp_path, "")] == [
        "there is no source",
        "database.dsn: there is no database",
    ]


def test_which_database(tmp_path: Path) -> None:
    """The call goes before the environment, the environment before the file; one of them is needed."""
    assert load(tmp_path, MINIMAL).database.dsn == "postgresql://db/telemetry"
    environment = {"INGESTD_DSN": "postgresql://env/x"}
    assert load(tmp_path, MINIMAL, environment=environment).database.dsn == "postgresql://env/x"
    given = load(tmp_path, MINIMAL, environment=environment, dsn="postgres://given/x")
    assert given.database.dsn == "postgres://given/x"
    embedded = MINIMAL.replace('dsn = "postgresql://db/telemetry"', "embedded = true")
    assert load(tmp_path, embedded).database.embedded
    overridden = load(tmp_path, embedded, environment=environment).database
    assert (overridden.dsn, overridden.embedded) == ("postgresql://env/x", False)
    assert "there is a dsn as well" in mistake(tmp_path, MINIMAL.replace("[[can]]", "embedded = true\n[[can]]"))
    assert mistake(tmp_path, MINIMAL, environment={"INGESTD_DSN": "db"}).startswith("INGESTD_DSN: is not an address")


def test_a_credential_of_systemd(tmp_path: Path) -> None:
    """It goes before the file and behind the environment; one that cannot be used is named, and not shown."""
    (tmp_path / "secrets").mkdir()
    environment = {"CREDENTIALS_DIRECTORY": str(tmp_path / "secrets")}
    assert load(tmp_path, MINIMAL, environment=environment).database.dsn == "postgresql://db/telemetry"
    credential = tmp_path / "secrets" / "ingestd.dsn"
    credential.write_text("postgresql://secret:hush@db/x\n")
    assert load(tmp_path, MINIMAL, environment=environment).database.dsn == "postgresql://secret:hush@db/x"
    with_both = environment | {"INGESTD_DSN": "postgresql://env/x"}
    assert load(tmp_path, MINIMAL, environment=with_both).database.dsn == "postgresql://env/x"
    credential.write_text("hush")
    said = mistake(tmp_path, MINIMAL, environment=environment)
    assert said.startswith("the credential ingestd.dsn: is not an address")
    assert "hush" not in said
    credential.write_bytes(b"\xff")
    said = mistake(tmp_path, MINIMAL, environment=environment)
    assert said.startswith("the credential ingestd.dsn: cannot be read: it is no UTF-8")


def test_a_dsn_beside_the_configuration(tmp_path: Path) -> None:
    """It goes before the file, and before the credential that was made of it when the service started.

    An empty credential, which a unit has without such a file, is none; an empty file is a mistake.
    """
    beside, secrets = tmp_path / "car.dsn", tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "ingestd.dsn").write_text(" ")
    environment = {"CREDENTIALS_DIRECTORY": str(secrets)}
    assert load(tmp_path, MINIMAL, environment=environment).database.dsn == "postgresql://db/telemetry"
    beside.write_text("postgresql://beside/x\n")
    assert load(tmp_path, MINIMAL).database.dsn == "postgresql://beside/x"
    (secrets / "ingestd.dsn").write_text("postgresql://credential/x")
    assert load(tmp_path, MINIMAL, environment=environment).database.dsn == "postgresql://beside/x"
    for content, said in (("", "is empty"), ("a\nb\n", "has more than one line"), ("x", "is not an address")):
        beside.write_text(content)
        assert mistake(tmp_path, MINIMAL).startswith(f"car.dsn beside it: {said}")
    beside.unlink()
    beside.mkdir()
    assert mistake(tmp_path, NO_DATABASE).startswith("car.dsn beside it: cannot be read: Is a directory")


def test_a_dsn_that_is_not_for_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the credential of systemd counts; without one it is said what the file should be, and nothing else."""
    (tmp_path / "car.dsn").write_text("postgresql://beside/x\n")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "ingestd.dsn").write_text("postgresql://credential/x")
    read = Path.read_text

    def not_for_us(path: Path, **how: Any) -> str:
        if path.name == "car.dsn":
            raise PermissionError(13, "Permission denied")
        return read(path, **how)

    monkeypatch.setattr(Path, "read_text", not_for_us)
    environment = {"CREDENTIALS_DIRECTORY": str(tmp_path / "secrets")}
    assert load(tmp_path, MINIMAL, environment=environment).database.dsn == "postgresql://credential/x"
    assert mistake(tmp_path, NO_DATABASE) == (
        "car.dsn beside it: cannot be read: Permission denied (it is for root and the group ingestd, mode 640)"
    )


@pytest.mark.parametrize(
    ("name", "journal"),
    [
        ("/etc/ingestd/ingestd.toml", "/var/lib/ingestd/journal"),
        ("/etc/ingestd/engine.toml", "/var/lib/ingestd-engine/journal"),
        ("/etc/other/engine.toml", "own"),
    ],
)
def test_the_journal_of_a_unit(name: str, journal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks with a file of the service means its journal; a place that was named goes before that."""
    monkeypatch.setattr("ingestd.config.journal_folder", lambda: Path("own"))
    assert journal_for(Path(name), {}) == Path(journal)
    assert journal_for(Path(name), {"INGESTD_HOME": "/somewhere"}) == Path("own")


@pytest.mark.parametrize("password", ["hunter#2", "hunter/2", "hunter?2@", "hun@ter/2@"])
def test_a_password_that_ends_the_host_is_refused(tmp_path: Path, password: str) -> None:
    """A part of it would be taken for a port, a path or a name, and be shown."""
    said = mistake(tmp_path, MINIMAL.replace("//db", f"//u:{password}@db"))
    assert said.startswith("database.dsn: is not an address of a database")
    assert "%2F" in said
    assert "hun" not in said


def test_passwords_are_not_shown(tmp_path: Path) -> None:
    """Neither the description that is stored nor what a log would print has one, wherever the URL has it."""
    dsn = "postgresql://u:hunter2@db:5433/x?password=hunter3&sslmode=require&host=/run/postgresql"
    config = load(tmp_path, MINIMAL, dsn=dsn)
    assert config.database.dsn == dsn
    assert describe(config)["database"]["dsn"] == "postgresql://u@db:5433/x?sslmode=require&host=/run/postgresql"
    for shown in (json.dumps(describe(config)), repr(config), str(config.database)):
        assert "hunter" not in shown


def test_what_is_described_holds_no_secret(tmp_path: Path) -> None:
    """A parameter of a DSN that nobody knows is left out, an option that is called like a secret is masked."""
    content = MINIMAL.replace("telemetry", "telemetry?passwrod=hunter2&application_name=car")
    content += 'interface = "slcan"\noptions = { listen_only = true, authToken = "hunter2", passive = "yes" }\n'
    described = describe(load(tmp_path, content))
    assert described["database"]["dsn"] == "postgresql://db/telemetry?application_name=car"
    assert described["can"][0]["options"] == {"listen_only": True, "authToken": "…", "passive": "yes"}


@pytest.mark.parametrize("dsn", ["postgresql://u:a@b@db/x", "postgresql://u:1?b@db/x", "postgresql://u@db:65536/x"])
def test_a_dsn_with_signs_that_mean_something_else(tmp_path: Path, dsn: str) -> None:
    """It is refused, not shown, and how to write such signs is said."""
    said = mistake(tmp_path, MINIMAL.replace("postgresql://db/telemetry", dsn))
    assert "@ as %40" in said
    assert dsn not in said


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("off", None),
        (":9464", Address("", 9464)),
        ("0.0.0.0:80", Address("0.0.0.0", 80)),
        ("[fe80::1]:1", Address("fe80::1", 1)),
        ("pit.local:0", Address("pit.local", 0)),
    ],
)
def test_where_to_listen(tmp_path: Path, written: str, expected: Address | None) -> None:
    """Host and port, IPv6 in brackets, every address, or nowhere; and an address prints as it was written."""
    listen = load(tmp_path, f'{MINIMAL}[http]\nlisten = "{written}"\n').http.listen
    assert listen == expected
    assert listen is None or str(listen) == written


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ('"7E8"', [Filter(0x7E8, 0x7FF, False)]),
        ("0x7E8", [Filter(0x7E8, 0x7FF, False)]),
        ("0x18FEF100", [Filter(0x18FEF100, 0x1FFFFFFF, True)]),
        ('"000007E8"', [Filter(0x7E8, 0x1FFFFFFF, True)]),
        ('"123:7F0"', [Filter(0x120, 0x7F0, False)]),
        ('"18FEF100:00FFFF00"', [Filter(0x00FEF100, 0x00FFFF00, True)]),
        ('"000-7FF"', [Filter(0, 0, False)]),
        ('"0x700-0x707"', [Filter(0x700, 0x7F8, False)]),
    ],
)
def test_filters(tmp_path: Path, written: str, expected: list[Filter]) -> None:
    """An id, a number, id and mask, a range: all become pairs of id and mask of one kind of id."""
    assert load(tmp_path, f"{MINIMAL}filters = [{written}]\n").can[0].filters == tuple(expected)


@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 6), (0x123, 0x3A7), (0, 0x7FE), (0x7FF, 0x7FF), (5, 0x7FF)])
def test_a_range_is_covered_exactly(tmp_path: Path, first: int, last: int) -> None:
    """The pairs that a range becomes let through every id in it and none outside."""
    pairs = load(tmp_path, f'{MINIMAL}filters = ["{first:X}-{last:X}"]\n').can[0].filters
    passed = [i for i in range(0x800) if any((i & pair.mask) == pair.id for pair in pairs)]  # type: ignore[union-attr]
    assert passed == list(range(first, last + 1))
    assert len(pairs) <= 20


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ('["700-6FF"]', "can[0].filters[0]: '700-6FF': the range goes backwards (write \"6FF-700\")"),
        ('["7E8", "xyz"]', "can[0].filters[1]: 'xyz' is not an id"),
        ("[-1]", "can[0].filters[0]: -1 is not an id"),
        ("[true]", "can[0].filters[0]: True is not an id"),
        ("[0x20000000]", "can[0].filters[0]: 536870912 is not an id"),
        ('["20000000"]', "can[0].filters[0]: '20000000': an id has at most 29 bits"),
        ("[]", "can[0].filters: is an empty list"),
        ('"all"', 'can[0].filters: "all" is not a filter'),
        ("7", "can[0].filters: is a whole number"),
    ],
)
def test_filters_that_mean_nothing(tmp_path: Path, written: str, expected: str) -> None:
    """What cannot be a filter is refused, with what would be one."""
    assert mistake(tmp_path, f"{MINIMAL}filters = {written}\n").startswith(expected)


def test_more_filters_than_the_kernel_takes(tmp_path: Path) -> None:
    """It is said before the socket refuses them all."""
    assert "513 pairs" in mistake(tmp_path, f"{MINIMAL}filters = {list(range(513))}\n")


def test_names_known_here_are_those_of_the_libraries() -> None:
    """The lists that save an import are those of what would be imported."""
    installed_beside = {point.name for point in entry_points(group="can.interface")}
    assert set(can.interfaces.BACKENDS) - installed_beside == configuration.INTERFACES
    assert set(DATABASE_SUFFIXES) == set(FORMATS)
    assert set(PROTOCOLS) == set(FRAMERS)
    assert ("none", *CHECKS) == CHECKSUMS
    matches = get_type_hints(configuration.DatabaseFile, include_extras=True)["match"].__metadata__[0]
    place = Place("match", Path(), [])
    assert [matches(one, place) for one in get_args(Match)] == list(get_args(Match))


# ---------------------------------------------------------------------------------------------------- documentation


def structs() -> dict[str, type[msgspec.Struct]]:
    """The heading under which each struct is documented."""
    return {
        "[session]": configuration.Session,
        "[database]": configuration.Database,
        "[journal]": configuration.Journal,
        "[batch]": configuration.Batch,
        "[http]": configuration.Http,
        "[metrics]": configuration.Metrics,
        "[control]": configuration.Control,
        "[[can]]": configuration.Can,
        "dbc": configuration.DatabaseFile,
        "[[serial]]": configuration.Serial,
    }


def documented() -> dict[str, dict[str, str]]:
    """Heading to key to default, as docs/configuration.md has them."""
    found: dict[str, dict[str, str]] = {}
    heading = ""
    for line in (DOCS / "configuration.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = line.split("`")[1]
        elif line.startswith("A signal database in `dbc`"):
            heading = "dbc"
        elif row := re.match(r"\| `(\w+)` \| (.*?) \| ", line):
            found.setdefault(heading, {})[row[1]] = row[2].strip("`")
    return found


@pytest.mark.parametrize("heading", structs())
def test_the_documentation_has_every_key_and_its_default(heading: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page says is read as the file would be, and gives the default of the field."""
    monkeypatch.delenv("INGESTD_HOME", raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    struct = structs()[heading]
    fields = {field.encode_name: field for field in msgspec.structs.fields(struct)}
    page = documented()[heading]
    assert list(page) == list(fields)
    for key, said in page.items():
        field = fields[key]
        default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        if said == "–":
            assert field.required, key
        elif said in ("none", "the name"):
            assert default == (None if said == "none" else ""), key
        else:
            value = tomllib.loads(f"x = {said}")["x"] if key != "path" else said
            read = get_type_hints(struct, include_extras=True)[field.name].__metadata__[0]
            place = Place(key, Path("/"), [])
            assert read(value, place) == default, (key, place.mistakes)
            assert default is not BAD


def test_the_example_is_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It loads as it is; with every commented key it still does, and then it names them all."""
    install_example(tmp_path / "packages", monkeypatch)
    example = (DOCS / "ingestd.example.toml").read_text(encoding="utf-8")
    plain = load(tmp_path, example)
    assert (plain.can[0].name, plain.serial[0].baudrate) == ("powertrain", 38400)
    everything = re.sub(r"^# (?=[a-z_]+ = |\[\[)", "", example, flags=re.MULTILINE).replace("embedded = true", "")
    (tmp_path / "powertrain.dbc").touch()
    (tmp_path / "truck.dbc").touch()
    config = load(tmp_path, everything)
    assert [bus.interface for bus in config.can] == ["socketcan", "slcan"]
    for heading, struct in structs().items():
        for field in msgspec.structs.fields(struct):
            assert re.search(rf"\b{field.encode_name} = ", example), (heading, field.encode_name)
    was, is_now = ((each.batch, each.journal.max_bytes, each.http.listen) for each in (plain, config))
    assert was == is_now


@pytest.mark.parametrize("page", ["docs/configuration.md", "README.md"])
def test_the_first_file_of_the_documentation(tmp_path: Path, page: str) -> None:
    """It is whole."""
    text = (DOCS.parent / page).read_text(encoding="utf-8")
    assert load(tmp_path, text.split("```toml\n")[1].split("```")[0]).can[0].channel == "can0"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("protocol='nmea'\ntime_field='t'", "serial[0].time_field: is for keyvalue, json, csv alone (leave it out)"),
        ("protocol='json'\ncolumns=['a']", "serial[0].columns: is for csv alone (leave it out)"),
        ("protocol='json'\ndbc=[]", "serial[0].dbc: is for protocols that are installed beside ingestd (leave it out)"),
        ("protocol='csv'\ncolumns=['a', '']", "serial[0].columns[1]: is empty (name it as the device does)"),
        ("protocol='csv'\ndelimiter=','", 'serial[0].delimiter: "," is not a delimiter'),
        ("protocol='csv'\nunits_row='yes'", 'serial[0].units_row: "yes" is not a way to find units'),
        ("protocol='cobs'", "serial[0].fields: is missing (name the fields of the struct in order)"),
        ("protocol='cobs'\nfields=['_:u8']", "serial[0].fields: has nothing but padding"),
        ("protocol='cobs'\nfields=['rpm']", 'serial[0].fields[0]: "rpm" is not a field (write "name:kind", such as'),
        ("protocol='cobs'\nfields=['a:u12']", 'serial[0].fields[0]: "a:u12" has the kind "u12", and there are u8, u16'),
        ("protocol='cobs'\nfields=['a:u8[0]']", "has 0 elements, and there may be 1 to 255"),
        ("protocol='cobs'\nfields=['a:u8', 'a:u8']", 'serial[0].fields: has "a" twice (names tell channels apart)'),
        ("protocol='cobs'\nfields=['a:f64[250]']", "serial[0].fields: is a struct of 2000 bytes (at most 1700)"),
        ("protocol='cobs'\nfields=['a:u8']\ncrc='crc16'", 'serial[0].crc: "crc16" is not a checksum (did you mean'),
        ("protocol='cobs'\nfields=['a:u8']\nbyte_order='middle'", "is not a byte order"),
    ],
)
def test_mistakes_in_the_keys_of_a_protocol(tmp_path: Path, keys: str, said: str) -> None:
    """Each names the key and what to do."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f"database.dsn = 'postgresql:///x'\n[[serial]]\nname = 'g'\nport = 'p'\n{keys}")
    assert said in str(caught.value)


def test_who_has_no_journal_means_the_machines_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To look, not to record; one's own goes before it, and so does a place that was named."""
    own, service = tmp_path / "own" / "journal", tmp_path / "service" / "journal"
    monkeypatch.delenv("INGESTD_HOME", raising=False)
    monkeypatch.setattr("ingestd.config.journal_folder", lambda: own)
    monkeypatch.setattr("ingestd.config.SERVICE_JOURNAL", service)
    assert existing_journal() == own
    service.mkdir(parents=True)
    assert existing_journal() == service
    assert find_control_socket(None) == tmp_path / "service" / "journal.sock"
    own.mkdir(parents=True)
    assert existing_journal() == own
    own.rmdir()
    monkeypatch.setenv("INGESTD_HOME", str(tmp_path))
    assert existing_journal() == own
