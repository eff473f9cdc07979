"""Blocks of a file that the disk refuses to read: for tests that run without such a disk (tests/disk has one)."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from ingestd.journal.segment import BLOCK_BYTES


class BadBlocks:
    """Such a file, from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path, *blocks: int) -> None:
        self.path, self.blocks, self.error = path, blocks, errno.EIO
        self._open, self._pread = Path.open, os.pread
        monkeypatch.setattr(Path, "open", lambda path, mode="r", *more: self._opened(path, mode, *more))
        monkeypatch.setattr(os, "pread", self._read)

    def _opened(self, path: Path, *arguments: Any) -> Any:
        file = self._open(path, *arguments)
        return _Refusing(self, file) if path == self.path else file

    def _read(self, descriptor: int, size: int, offset: int) -> bytes:
        if os.path.samestat(os.fstat(descriptor), self.path.stat()):
            self.check(offset, offset + size)
        return self._pread(descriptor, size, offset)

    def check(self, start: int, end: int) -> None:
        """Raises OSError if one of the blocks is touched."""
        if any(start < (block + 1) * BLOCK_BYTES and end > block * BLOCK_BYTES for block in self.blocks):
            raise OSError(self.error, os.strerror(self.error))


class _Refusing:
    """An open file with bad blocks."""

    def __init__(self, disk: BadBlocks, file: Any) -> None:
        self._disk, self._file = disk, file

    def __enter__(self) -> _Refusing:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> Any:
        """Raises OSError, as it is buffered, for any block of those that are asked for."""
        start = self._file.tell()
        end = os.fstat(self._file.fileno()).st_size if size < 0 else start + size
        self._disk.check(start, end)
        return self._file.read(size)
