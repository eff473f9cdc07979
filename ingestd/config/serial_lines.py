"""[[serial]]: a line, its protocol, and the keys that belong to some protocols alone."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Annotated, Any

import msgspec

from ingestd.config.readers import BAD, Place, choice, device, listing, scalars, source_name, suggestion, text, whole
from ingestd.config.tables import DatabaseFile, database_file
from ingestd.struct_fields import StructField

PROTOCOLS = ("nmea", "ubx", "keyvalue", "json", "csv", "cobs", "lines")
PLUGINS = "ingestd.protocols"  # The entry points of protocols that are installed beside it.
CHECKSUMS = (
    "none", "crc8", "crc8-maxim", "crc8-j1850", "crc8-autosar", "crc16-ccitt", "crc16-xmodem", "crc16-kermit",
    "crc16-x25", "crc16-modbus", "crc16-arc", "crc32", "crc32-mpeg2", "crc32c",
)  # fmt: skip
# Keys of [[serial]] that belong to some protocols alone.
PROTOCOL_KEYS = {
    "time_field": ("keyvalue", "json", "csv"),
    "columns": ("csv",),
    "delimiter": ("csv",),
    "units_row": ("csv",),
    "fields": ("cobs",),
    "byte_order": ("cobs",),
    "crc": ("cobs",),
    "crc_byte_order": ("cobs",),
}
PLUGIN_KEYS = {"dbc", "options"}
STRUCT_BYTES_MAX = 1_700  # With its checksum, stuffed, it is to fit into a frame.


def protocol(value: Any, at: Place) -> Any:
    """The name of a protocol, one that comes with ingestd or one that is installed. None is loaded for that."""
    if text(value, at) is BAD:
        return BAD
    if value in PROTOCOLS:
        return value
    known = {*PROTOCOLS, *(point.name for point in entry_points(group=PLUGINS))}
    return value if value in known else at.wrong(f'"{value}" is not a protocol', suggestion(value, known))


def field_name(value: Any, at: Place) -> Any:
    """What a device calls one of its values: a text that is not empty."""
    return at.wrong("is empty", "name it as the device does") if value == "" else text(value, at)


def struct_field(value: Any, at: Place) -> Any:
    """A field of a struct, as text."""
    hint = 'write "name:kind", such as "ms:u32", "rpm:u16*0.25:1/min", "t:i16*0.1-40:degC" or "acc:f32[3]:g"'
    if text(value, at) is BAD:
        return BAD
    try:
        StructField.parse(value)
    except ValueError as error:
        return at.wrong(f'"{value}" {error}', hint)
    return value


def byte_order(value: Any, at: Place) -> Any:
    """Which byte of a number comes first."""
    return choice(("little", "big"), "a byte order")(value, at)


class Serial(msgspec.Struct, frozen=True, kw_only=True):
    """One serial line."""

    name: Annotated[str, source_name]
    port: Annotated[str, device]
    protocol: Annotated[str, protocol]
    baudrate: Annotated[int, whole(50, 20_000_000)] = 9600
    bytesize: Annotated[int, choice((5, 6, 7, 8), "a number of data bits")] = 8
    parity: Annotated[str, choice(("none", "even", "odd", "mark", "space"), "a parity")] = "none"
    stopbits: Annotated[float, choice((1, 1.5, 2), "a number of stop bits")] = 1
    time_field: Annotated[str | None, field_name] = None
    columns: Annotated[tuple[str, ...], listing(field_name)] = ()
    delimiter: Annotated[str, choice(("auto", "tab", "semicolon", "comma"), "a delimiter")] = "auto"
    units_row: Annotated[str, choice(("auto", "always", "never"), "a way to find units")] = "auto"
    fields: Annotated[tuple[str, ...], listing(struct_field)] = ()
    byte_order: Annotated[str, byte_order] = "little"
    crc: Annotated[str, choice(CHECKSUMS, "a checksum")] = "none"
    crc_byte_order: Annotated[str | None, byte_order] = None
    dbc: Annotated[tuple[DatabaseFile, ...], listing(database_file)] = ()
    options: Annotated[dict[str, Any], scalars] = msgspec.field(default_factory=dict)


def protocol_options(line: Serial) -> dict[str, Any]:
    """The keys that belong to the protocol of a line, or what it is to hand on to one that is installed."""
    if line.protocol not in PROTOCOLS:
        return dict(line.options)
    return {key: getattr(line, key) for key, protocols in PROTOCOL_KEYS.items() if line.protocol in protocols}


def check_serial(values: dict[str, Any], given: Mapping[str, Any], at: Place) -> None:
    """What does not go together in one [[serial]]: keys of other protocols, and a struct that is none."""
    if "protocol" not in values:
        return
    if values["protocol"] in PROTOCOLS:
        for key in PLUGIN_KEYS & given.keys():
            (at / key).wrong("is for protocols that are installed beside ingestd", "leave it out")
    for key, protocols in PROTOCOL_KEYS.items():
        if key in given and values["protocol"] not in protocols:
            (at / key).wrong("is for " + ", ".join(protocols) + " alone", "leave it out")
    if values["protocol"] == "cobs" and "fields" in values:
        _check_struct([StructField.parse(field) for field in values["fields"]], at / "fields")


def _check_struct(fields: list[StructField], at: Place) -> None:
    names = [name for field in fields for name in field.names]
    twice = [name for number, name in enumerate(names) if name in names[:number]]
    if not names:
        at.wrong("is missing" if not fields else "has nothing but padding", "name the fields of the struct in order")
    elif twice:
        at.wrong(f'has "{twice[0]}" twice', "names tell channels apart")
    elif (size := sum(field.size for field in fields)) > STRUCT_BYTES_MAX:
        at.wrong(f"is a struct of {size} bytes", f"at most {STRUCT_BYTES_MAX}")
