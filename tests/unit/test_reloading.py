"""What a reload takes for a change, and of what."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from ingestd.config import Can, Config, DatabaseFile, Serial
from ingestd.daemon.decoding import load_again
from ingestd.daemon.devices import tables_of
from ingestd.daemon.reloading import _changed_databases, _opened

DBC = 'VERSION ""\nBU_:\nBO_ 256 Engine: 8 ECU\n SG_ %s : 0|16@1+ (1,0) [0|0] "" ECU\n'


@pytest.mark.parametrize(
    "table",
    [Can(name="bus"), Serial(name="bus", port="/dev/ttyUSB0", protocol="nmea")],
    ids=["a bus", "a line, as with a gateway"],
)
async def test_another_signal_database_reopens_no_device(tmp_path: Path, table: Can | Serial) -> None:
    """What decodes frames is not what opens the device that they come from; and it is told which file it was."""
    configs = []
    for name in ("old", "new"):
        (tmp_path / f"{name}.dbc").write_text(DBC % name)
        one = msgspec.structs.replace(table, dbc=(DatabaseFile(file=tmp_path / f"{name}.dbc"),))
        configs.append(Config(can=(one,)) if isinstance(one, Can) else Config(serial=(one,)))
    before, after = [await load_again(config, None) for config in configs]
    (was,), (is_now,) = map(tables_of, configs)
    assert was != is_now
    assert _opened(was) == _opened(is_now)
    assert _changed_databases(before.config, before, after) == ["new.dbc", "old.dbc"]
    assert _changed_databases(before.config, before, before) == []
    assert _changed_databases(before.config, None, after) == ["new.dbc", "old.dbc"]
