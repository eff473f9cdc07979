"""The sources that a configuration names. Drivers are imported where they are asked for: some take half a second."""

from __future__ import annotations

from collections.abc import Sequence

from ingestd.config import Can, Config, Filter, Serial, protocol_options
from ingestd.decode.databases import MessageDefinition, SignalDatabase
from ingestd.model import Source
from ingestd.protocols import Line

EXTENDED_FLAG = 0x8000_0000  # CAN_EFF_FLAG of linux/can.h, in an id and in a mask.
EXTENDED_MASK = 0x1FFF_FFFF
STANDARD_MASK = 0x7FF
PGN_MASK, PDU1_MASK = 0x3FFFF00, 0x3FF0000  # of an id: the PGN, without the destination in PDU1 (SAE J1939-21, 5.2)


def open_sources(config: Config) -> list[Source]:
    """A source for every [[can]] and [[serial]], in the order of the file; nothing is opened yet."""
    return [open_source(table) for table in tables_of(config)]


def tables_of(config: Config) -> list[Can | Serial]:
    """Every [[can]] and [[serial]]."""
    return [*config.can, *config.serial]


def open_source(table: Can | Serial) -> Source:
    """The source of one of them; nothing is opened yet."""
    return _can(table) if isinstance(table, Can) else _serial(table)


def _can(bus: Can) -> Source:
    if bus.interface == "socketcan":
        from ingestd.sources.socketcan import SocketCan

        return SocketCan(
            bus.name,
            str(bus.channel),
            fd=bus.fd,
            filters=None if isinstance(bus.filters, str) else kernel_filters(bus.filters),
            receive_buffer_bytes=bus.receive_buffer_bytes,
        )
    from ingestd.sources.canbus import CanBus

    options = dict(bus.options)
    if bus.bitrate is not None:
        options["bitrate"] = bus.bitrate
    if bus.fd:
        options["fd"] = True
    return CanBus(bus.name, bus.interface, bus.channel, **options)


def _serial(line: Serial) -> Source:
    from ingestd.protocols import new_framer
    from ingestd.sources.serial import SerialPort

    return SerialPort(
        line.name, line.port, line.baudrate, new_framer(protocol_of(line)),
        bytesize=line.bytesize, parity=line.parity, stopbits=line.stopbits,
    )  # fmt: skip


def protocol_of(line: Serial) -> Line:
    """The protocol of a serial line with those of its keys that belong to it."""
    return Line(line.protocol, protocol_options(line))


def kernel_filters(filters: Sequence[Filter]) -> list[tuple[int, int]]:
    """Pairs of id and mask as CAN_RAW_FILTER takes them; standard and extended ids are told apart."""
    return [
        (f.id | EXTENDED_FLAG * f.extended, f.mask & (EXTENDED_MASK if f.extended else STANDARD_MASK) | EXTENDED_FLAG)
        for f in filters
    ]


def filter_by_databases(bus: Can, sources: Sequence[Source], databases: Sequence[SignalDatabase]) -> None:
    """Have the kernel pass only what the bus's databases know, if that is what the configuration asks for."""
    if bus.filters != "databases":
        return
    from ingestd.sources.socketcan import SocketCan

    pairs = database_filters(databases)
    for source in sources:
        if isinstance(source, SocketCan) and source.name == bus.name:
            source.set_filters(pairs)


def database_filters(databases: Sequence[SignalDatabase]) -> list[tuple[int, int]]:
    """Pairs of id and mask of everything that the databases know."""
    return sorted({_message_filter(message) for database in databases for message in database.messages})


def _message_filter(message: MessageDefinition) -> tuple[int, int]:
    if not message.extended:
        return message.arbitration_id, STANDARD_MASK | EXTENDED_FLAG
    mask = EXTENDED_MASK
    if message.by_pgn:
        mask = PGN_MASK if (message.arbitration_id >> 16) & 0xFF >= 240 else PDU1_MASK
    return message.arbitration_id & mask | EXTENDED_FLAG, mask | EXTENDED_FLAG
