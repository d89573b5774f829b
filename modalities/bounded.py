"""A file in memory that can be read only so often: formats are mazes, and some have no way out.

Chains of directories, comments in a million pieces, tags that each name the whole file: what a
decoder does with them is reading. Honest files are read a few times over, in large pieces.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

_READS = 10_000
_BYTES_A_READ = 2_048  # PNG's usual pieces have 8 KiB and take three reads each
_TIMES = 24  # of TIFF's strips of 8 KiB, Pillow reads 64 KiB each


class TooManyReads(Exception):
    """A decoder was led around in a file; not an OSError, which decoders swallow."""

    def __init__(self) -> None:
        super().__init__("it is made of too many parts")


class BoundedFile(BytesIO):
    """A file's content with an end to reading.

    Args:
        content: of the file.
        raises: raise TooManyReads at the end; else there is nothing to be read from then on.

    Attributes:
        exhausted: the end was reached.
    """

    def __init__(self, content: bytes, raises: bool = True) -> None:
        super().__init__(content)
        self.exhausted = False
        self._raises = raises
        self._reads = _READS + len(content) // _BYTES_A_READ
        self._bytes = (1 << 20) + _TIMES * len(content)

    def read(self, size: int | None = -1, /) -> bytes:
        return b"" if self._over() else self._counted(super().read(size))

    def readinto(self, buffer: Any, /) -> int:
        if self._over():
            return 0
        size = super().readinto(buffer)
        self._bytes -= size
        return size

    def _counted(self, piece: bytes) -> bytes:
        self._bytes -= len(piece)
        return piece

    def _over(self) -> bool:
        self._reads -= 1
        if self._reads >= 0 and self._bytes >= 0:
            return False
        self.exhausted = True
        if self._raises:
            raise TooManyReads
        return True
