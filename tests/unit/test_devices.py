"""What a configuration makes of devices: filters for the kernel."""

from __future__ import annotations

from pathlib import Path

from ingestd.config import Filter
from ingestd.daemon.devices import database_filters, kernel_filters
from ingestd.decode.databases import load

DBC = """VERSION ""

NS_ :

BS_:

BU_: ECU

BO_ 291 Standard: 8 ECU
 SG_ A : 0|8@1+ (1,0) [0|0] "" ECU

BO_ 2566844926 Broadcast: 8 ECU
 SG_ B : 0|8@1+ (1,0) [0|0] "" ECU

BO_ 2564489214 Addressed: 8 ECU
 SG_ C : 0|8@1+ (1,0) [0|0] "" ECU
"""


def passes(filters: list[tuple[int, int]], can_id: int) -> bool:
    """The kernel's rule (linux/can.h): a frame passes if it agrees with one filter in the bits of its mask."""
    return any(received & mask == wanted & mask for received, (wanted, mask) in ((can_id, f) for f in filters))


def test_filters_of_the_configuration_tell_standard_from_extended_ids() -> None:
    """A standard filter lets no extended frame of the same number pass, and the other way round."""
    filters = kernel_filters([Filter(0x123, 0x7FF, False), Filter(0x18FEF100, 0x1FFFFFFF, True)])
    assert passes(filters, 0x123)
    assert passes(filters, 0x98FEF100)
    assert not passes(filters, 0x80000123)
    assert not passes(filters, 0x124)
    assert not passes(filters, 0x98FEF101)


def test_filters_of_databases_let_pass_what_can_be_decoded(tmp_path: Path) -> None:
    """By id as they are; by PGN any sender and priority, and of addressed messages any destination."""
    path = tmp_path / "car.dbc"
    path.write_text(DBC)
    by_id, by_pgn = database_filters([load(path, "id")]), database_filters([load(path, "pgn")])
    for filters in (by_id, by_pgn):
        assert passes(filters, 0x123)
        assert passes(filters, 0x98FEF1FE)
        assert passes(filters, 0x98DAFFFE)
        assert not passes(filters, 0x80000123)
        assert not passes(filters, 0x98FEF2FE)
    assert not passes(by_id, 0x9CFEF121)
    assert passes(by_pgn, 0x9CFEF121)
    assert not passes(by_id, 0x98DA17FE)
    assert passes(by_pgn, 0x98DA17FE)
