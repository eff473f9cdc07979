"""The configuration of the daemon: a TOML file to frozen structs, with every mistake in it reported at once.

The structs are the description of the file. A field's annotation holds its type and the reader that makes such a value
from what TOML gives; `name=` is the key where the field says its unit and the key does not. docs/configuration.md is
tested against them.

Invariants of a `Config`: it has at least one source; names of sources are unique; files of signal databases exist;
paths are absolute, relative ones having been taken from the folder of the file; the database is known. The password in
a DSN is in `Database.dsn` alone: neither `repr` nor `describe` nor any mistake shows it.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import msgspec
import platformdirs

from ingestd.config.readers import (
    BAD,
    Address,
    Filter,
    Place,
    address,
    choice,
    device,
    duration,
    filters,
    flag,
    listing,
    password_hashes,
    path_in_folder,
    postgres_dsn,
    scalars,
    size,
    source_name,
    suggestion,
    text,
    whole,
)
from ingestd.config.serial_lines import Serial, check_serial, protocol_options
from ingestd.config.tables import DatabaseFile, database_file, table, tables
from ingestd.errors import ConfigError

__all__ = ["Address", "Batch", "Can", "Config", "Control", "Database", "DatabaseFile", "Filter", "Http", "Journal",
           "Metrics", "Serial", "Session", "control_socket", "describe", "existing_journal", "find_control_socket",
           "likely_control_socket", "load_config", "protocol_options"]  # fmt: skip

# What python-can 4.6 brings; drivers installed beside it announce themselves as entry points. Asking python-can itself
# would import it, which takes longer than all the rest of the start.
INTERFACES = frozenset(
    {
        "canalystii", "cantact", "etas", "gs_usb", "iscan", "ixxat", "kvaser", "neousys", "neovi", "nican", "nixnet",
        "pcan", "robotell", "seeedstudio", "serial", "slcan", "socketcan", "socketcand", "systec", "udp_multicast",
        "usb2can", "vector", "virtual",
    }
)  # fmt: skip
# What may be shown of a DSN's parameters; of any other, mistyped ones too, nobody knows what is in it.
SHOWN = frozenset({
    "host", "port", "dbname", "database", "user", "sslmode", "sslrootcert", "sslcert", "sslkey", "sslcrl",
    "application_name", "target_session_attrs", "service",
})  # fmt: skip
# Options go to drivers and plug-ins as they are; what is called like this stays between the file and them.
SECRET = re.compile(r"pass(?!ive)|pwd|secret|token|credential|auth|api_?key|private", re.IGNORECASE)
HIDDEN = "…"
ONE_LINE = "it is one line, the DSN"
CREDENTIAL = "ingestd.dsn"  # of systemd, for a DSN that nobody else is to read
SERVICE_CONFIGURATIONS = Path("/etc/ingestd")  # ingestd.toml of systemd/ingestd.service, NAME.toml of ingestd@NAME
SERVICE_JOURNAL = Path("/var/lib/ingestd/journal")  # of the former, and of root; the latter's is ingestd-NAME/journal
INTERFACE_NAME_BYTES_MAX = 15  # IFNAMSIZ of the kernel, without its NUL


def journal_folder() -> Path:
    """Where the journal is by default: below INGESTD_HOME, else /var/lib/ingestd for root, else the user's folder."""
    home = os.environ.get("INGESTD_HOME")
    if home:
        return Path(home).expanduser().absolute() / "journal"
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        return SERVICE_JOURNAL
    return Path(platformdirs.user_data_dir("ingestd", appauthor=False)) / "journal"


def journal_for(configuration: Path, environment: Mapping[str, str] = os.environ) -> Path:
    """The journal of a configuration that names none, whoever asks: in /etc/ingestd it is that of the unit."""
    if environment.get("INGESTD_HOME") or configuration.absolute().parent != SERVICE_CONFIGURATIONS:
        return journal_folder()
    instance = "" if configuration.stem == "ingestd" else f"-{configuration.stem}"
    return SERVICE_JOURNAL.parent.with_name(f"{SERVICE_JOURNAL.parent.name}{instance}") / SERVICE_JOURNAL.name


def existing_journal() -> Path:
    """The default journal of who looks and does not record: that of the machine's service, for who has none."""
    own = journal_folder()
    if os.environ.get("INGESTD_HOME") or os.access(own, os.F_OK) or not os.access(SERVICE_JOURNAL, os.F_OK):
        return own
    return SERVICE_JOURNAL


def can_interface(value: Any, at: Place) -> Any:
    """The name of a python-can interface, one that came with it or one that is installed."""
    if text(value, at) is BAD:
        return BAD
    if value in INTERFACES:
        return value
    known = INTERFACES | {point.name for point in entry_points(group="can.interface")}
    return (
        value if value in known else at.wrong(f'"{value}" is not an interface of python-can', suggestion(value, known))
    )


def can_channel(value: Any, at: Place) -> Any:
    """The same, or a number as some drivers want it."""
    return value if type(value) is int else device(value, at)


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """Metadata of what this daemon records."""

    car_id: Annotated[str | None, text] = None
    name: Annotated[str | None, text] = None
    driver: Annotated[str | None, text] = None
    track: Annotated[str | None, text] = None
    notes: Annotated[str | None, text] = None


class Database(msgspec.Struct, frozen=True, kw_only=True):
    """Where everything goes. Without `dsn` it is the embedded server."""

    dsn: Annotated[str | None, postgres_dsn] = None
    embedded: Annotated[bool, flag] = False
    store_frames: Annotated[bool, flag] = True

    def __repr__(self) -> str:
        shown = None if self.dsn is None else without_password(self.dsn)
        return f"Database(dsn={shown!r}, embedded={self.embedded}, store_frames={self.store_frames})"


class Journal(msgspec.Struct, frozen=True, kw_only=True):
    """The folder in which frames are safe until the database has them."""

    path: Annotated[Path, path_in_folder] = msgspec.field(default_factory=journal_folder)
    max_bytes: Annotated[int, size("64MiB", "1024TiB")] = 8 << 30
    when_full: Annotated[str, choice(("drop-oldest", "drop-newest"), "a policy")] = "drop-oldest"
    sync_interval_seconds: Annotated[float, duration("1ms", "10s")] = msgspec.field(default=0.1, name="sync_interval")


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """How frames are put together for the database."""

    interval_seconds: Annotated[float, duration("10ms", "60s")] = msgspec.field(default=0.5, name="interval")


class Http(msgspec.Struct, frozen=True, kw_only=True):
    """Where metrics, health and the page are served, and to whom; None is nowhere, no users are everybody."""

    listen: Annotated[Address | None, address] = Address("127.0.0.1", 9464)
    users: Annotated[dict[str, str], password_hashes] = msgspec.field(default_factory=dict)
    tls_certificate: Annotated[Path | None, path_in_folder] = None
    tls_key: Annotated[Path | None, path_in_folder] = None

    def __repr__(self) -> str:
        return f"Http(listen={self.listen}, users={sorted(self.users)}, tls_certificate={self.tls_certificate})"


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """Channels whose newest values are metrics, by patterns of `source/channel`."""

    channels: Annotated[tuple[str, ...], listing(text)] = ()


class Control(msgspec.Struct, frozen=True, kw_only=True):
    """Where the commands reach the daemon; without `socket` it is beside the journal's folder, see `control_socket`."""

    socket: Annotated[Path | None, path_in_folder] = None


class Can(msgspec.Struct, frozen=True, kw_only=True):
    """One CAN bus."""

    name: Annotated[str, source_name]
    interface: Annotated[str, can_interface] = "socketcan"
    channel: Annotated[str | int, can_channel] = ""  # the name, where the file says nothing
    fd: Annotated[bool, flag] = True  # false for interfaces other than socketcan, where the file says nothing
    dbc: Annotated[tuple[DatabaseFile, ...], listing(database_file)] = ()
    filters: Annotated[Literal["none", "databases"] | tuple[Filter, ...], filters] = "none"
    receive_buffer_bytes: Annotated[int, size("64KiB", "1GiB")] = msgspec.field(default=16 << 20, name="receive_buffer")
    bitrate: Annotated[int | None, whole(1_000, 20_000_000)] = None
    options: Annotated[dict[str, Any], scalars] = msgspec.field(default_factory=dict)


def _check_can(values: dict[str, Any], given: Mapping[str, Any], at: Place) -> None:
    if "channel" not in given and "name" in values:
        values["channel"] = values["name"]
    if values.get("filters") == "databases" and given.get("dbc", []) == []:
        (at / "filters").wrong('"databases" needs signal databases, and there are none', 'name them in "dbc"')
    if values.get("interface") != "socketcan":
        if "fd" not in given:
            values["fd"] = False
        for key in sorted({"name", "interface", "channel", "bitrate", "fd"} & values.get("options", {}).keys()):
            (at / "options" / key).wrong("is a key of [[can]] itself", "move it out of options")
        for key in ("filters", "receive_buffer"):
            if "interface" in values and key in given:
                (at / key).wrong("is for socketcan alone", "leave it out")
        return
    channel = values.get("channel", "")
    if type(channel) is int:
        (at / "channel").wrong(f"{channel} cannot be a network interface", 'write a name such as "can0"')
    elif len(channel.encode()) > INTERFACE_NAME_BYTES_MAX or "/" in channel or any(map(str.isspace, channel)):
        problem = f'"{channel}" cannot be a network interface'
        (at / "channel").wrong(problem, f"at most {INTERFACE_NAME_BYTES_MAX} bytes, no blanks; `ip link` lists them")
    if values.get("bitrate") is not None:
        hint = f"ip link set {channel} type can bitrate {values['bitrate']}"
        (at / "bitrate").wrong("is set in the system for socketcan", hint)
    if values.get("options"):
        (at / "options").wrong("are for python-can's other interfaces; socketcan is read without it", "leave them out")


def _check_database(values: dict[str, Any], given: Mapping[str, Any], at: Place) -> None:
    if "dsn" in given and values.get("embedded"):
        (at / "embedded").wrong("there is a dsn as well", "leave one of the two out")


def _check_http(_: dict[str, Any], given: Mapping[str, Any], at: Place) -> None:
    if "tls_key" in given and "tls_certificate" not in given:
        (at / "tls_key").wrong("there is no certificate for it", "set tls_certificate, or leave it out")


def _check_journal(values: dict[str, Any], _: Mapping[str, Any], at: Place) -> None:
    path, hint = values.get("path"), "write a folder that is empty or not there yet"
    if path is None:
        return
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            (at / "path").wrong(f"{path} is not a folder", hint)
    except (FileNotFoundError, PermissionError):
        pass  # It will be made; and who may not look may still read the rest of the configuration.
    except OSError as error:
        (at / "path").wrong(f"{path}: {error.strerror}", hint)


def _check_all(_: dict[str, Any], given: Mapping[str, Any], at: Place) -> None:
    """What holds across tables: there are sources, names tell them apart, and none is recorded twice.

    Asks the file and not the values, so that a source with a mistake elsewhere is looked at too.
    """
    if not given.get("can") and not given.get("serial"):
        at.wrong("there is no source", "add a [[can]] or a [[serial]]")
    first_with: dict[tuple[str, ...], str] = {}
    for kind, device_key in (("can", "channel"), ("serial", "port")):
        sources = given.get(kind)
        for index, source in enumerate(sources if isinstance(sources, list) else ()):
            if not isinstance(source, dict):
                continue
            here = (at / kind)[index]
            name, device = source.get("name"), source.get(device_key)
            if isinstance(name, str) and (first := first_with.setdefault(("name", name), here.key)) != here.key:
                (here / "name").wrong(f'"{name}" is the name of {first} already', "names tell sources apart")
            bus = (kind, str(source.get("interface", "socketcan")), str(device or name), str(source.get("options")))
            first = first_with.setdefault(bus, here.key)
            if device is not None and first != here.key:
                (here / device_key).wrong(f'"{device}" is recorded by {first} already', "record each device once")


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The whole file."""

    session: Annotated[Session, table(Session)] = Session()
    database: Annotated[Database, table(Database, _check_database)] = Database()
    journal: Annotated[Journal, table(Journal, _check_journal)] = msgspec.field(default_factory=Journal)
    batch: Annotated[Batch, table(Batch)] = Batch()
    http: Annotated[Http, table(Http, _check_http)] = msgspec.field(default_factory=Http)
    metrics: Annotated[Metrics, table(Metrics)] = Metrics()
    control: Annotated[Control, table(Control)] = Control()
    can: Annotated[tuple[Can, ...], tables(Can, _check_can)] = ()
    serial: Annotated[tuple[Serial, ...], tables(Serial, check_serial)] = ()


def load_config(path: Path, *, dsn: str | None = None, environment: Mapping[str, str] = os.environ) -> Config:
    """Read the file. A `dsn`, else INGESTD_DSN, else a file that holds one alone goes before its database.

    Raises ConfigError with one line for every mistake.
    """
    raw = _read_toml(path)
    at = Place("", path.absolute().parent, [])
    _check_numbers(raw, at)
    if at.mistakes:  # The readers' own messages would show the numbers.
        raise ConfigError(f"{path}: {at.mistakes[0]}")
    config: Config = table(Config, _check_all)(raw, at)
    mistakes_count = len(at.mistakes)
    override, where = (dsn, "--dsn") if dsn else _dsn_of(path, environment, at)
    if override:
        postgres_dsn(override, Place(where, at.folder, at.mistakes))
    elif len(at.mistakes) == mistakes_count:  # One that cannot be read may be all that is wrong.
        given = raw.get("database", {})
        if isinstance(given, dict) and "dsn" not in given and not given.get("embedded"):
            (at / "database" / "dsn").wrong(
                "there is no database", f"set it, or {path.with_suffix('.dsn').name}, INGESTD_DSN, or embedded = true"
            )
    if len(at.mistakes) == 1:
        raise ConfigError(f"{path}: {at.mistakes[0]}")
    if at.mistakes:
        raise ConfigError("\n  ".join([f"{path}: {len(at.mistakes)} mistakes", *at.mistakes]))
    if "path" not in raw.get("journal", {}):
        journal = msgspec.structs.replace(config.journal, path=journal_for(path, environment))
        config = msgspec.structs.replace(config, journal=journal)
    if override:
        database = msgspec.structs.replace(config.database, dsn=override, embedded=False)
        config = msgspec.structs.replace(config, database=database)
    return config


def _dsn_of(path: Path, environment: Mapping[str, str], at: Place) -> tuple[str, str]:
    """The DSN of the environment, else of a file that holds nothing else, and what to call it; "" where none is.

    That file is beside the configuration. Where it is not for us, systemd may have made a credential of it.
    """
    if environment.get("INGESTD_DSN"):
        return environment["INGESTD_DSN"], "INGESTD_DSN"
    beside = path.with_suffix(".dsn")
    places = {f"{beside.name} beside it": beside}
    if folder := environment.get("CREDENTIALS_DIRECTORY"):  # systemd.exec(5), LoadCredential=
        places[f"the credential {CREDENTIAL}"] = Path(folder) / CREDENTIAL
    refused: tuple[str, str, str] | None = None
    for where, file in places.items():
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            continue
        except PermissionError:
            refused = where, "cannot be read: Permission denied", "it is for root and the group ingestd, mode 640"
            continue
        except (OSError, UnicodeDecodeError) as error:
            refused = where, f"cannot be read: {getattr(error, 'strerror', None) or 'it is no UTF-8'}", ONE_LINE
            break
        text, *more = [line.strip() for line in lines if line.strip()] or [""]
        if text and not more:
            return text, where
        if more or file == beside:  # A unit has an empty credential where there is no such file.
            refused = where, "has more than one line" if more else "is empty", ONE_LINE
            break
    if refused is not None:
        where, reason, hint = refused
        Place(where, at.folder, at.mistakes).wrong(reason, hint)
    return "", ""


def control_socket(control: Control, journal: Path) -> Path:
    """The control socket of the daemon with this journal: that is what no two daemons share."""
    return control.socket or journal.with_name(f"{journal.name}.sock")


def find_control_socket(path: Path | None) -> Path:
    """The control socket of the daemon that runs with a configuration file, or of one with the default journal.

    Looks at nothing else in the file: whoever asks a daemon need not know that the rest of it is in order. Raises
    ConfigError.
    """
    if path is None:
        return control_socket(Control(), existing_journal())
    return _control_socket_in(_read_toml(path), path)


def likely_control_socket(path: Path) -> Path:
    """The same for a file that cannot be used any more, from what can still be read of it, else the default one.

    It may be another daemon's: whoever asks there has to make sure.
    """
    found: dict[str, Any] = {}
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        content = ""
    for part in re.split(r"^(?=[ \t]*\[)", content, flags=re.MULTILINE):  # table by table
        with suppress(ValueError, RecursionError):
            found |= tomllib.loads(part)
    try:
        return _control_socket_in(found, path)
    except ConfigError:
        return find_control_socket(None)


def _control_socket_in(raw: dict[str, Any], path: Path) -> Path:
    at = Place("", path.absolute().parent, [])
    control = table(Control)(raw.get("control", {}), at / "control")
    folder = raw.get("journal", {}).get("path") if isinstance(raw.get("journal", {}), dict) else None
    journal = journal_for(path) if folder is None else path_in_folder(folder, at / "journal" / "path")
    if at.mistakes:
        raise ConfigError(f"{path}: {at.mistakes[0]}")
    return control_socket(control, journal)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", "give the path of a configuration file") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}: not UTF-8 at line {line}", "save it as UTF-8") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not TOML: tables or lists are nested too deeply", "see https://toml.io") from error
    except ValueError as error:  # tomllib's own, or int()'s of a number with thousands of digits.
        raise ConfigError(f"{path}: not TOML: {error}", "see https://toml.io") from error


def _check_numbers(value: Any, at: Place) -> None:
    """TOML's whole numbers have 64 bits; of larger ones not even the digits can always be had."""
    if isinstance(value, dict):
        for key, one in value.items():
            _check_numbers(one, at / key)
    elif isinstance(value, list):
        for index, one in enumerate(value):
            _check_numbers(one, at[index])
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        at.wrong("is a whole number beyond 64 bits")


def describe(config: Config) -> dict[str, Any]:
    """The configuration in force as JSON can hold it, without passwords: what `sessions.config` keeps."""
    described: dict[str, Any] = _plain(config)
    if config.database.dsn is not None:
        described["database"]["dsn"] = without_password(config.database.dsn)
    described["http"]["users"] = sorted(config.http.users)
    for source in (*described["can"], *described["serial"]):
        options = source["options"].items()
        source["options"] = {key: HIDDEN if SECRET.search(key) else value for key, value in options}
    return described


def _plain(value: Any) -> Any:
    if isinstance(value, Address):
        return str(value)
    if isinstance(value, msgspec.Struct):
        return {field: _plain(getattr(value, field)) for field in value.__struct_fields__}
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def without_password(dsn: str) -> str:
    """The DSN without any password in it: of its parameters those that are known to be none."""
    parts = urlsplit(dsn)
    user, at, host = parts.netloc.rpartition("@")
    query = [(key, one) for key, one in parse_qsl(parts.query) if key in SHOWN]
    return urlunsplit(parts._replace(netloc=f"{user.partition(':')[0]}{at}{host}", query=urlencode(query, safe="/")))
