"""Who uses a folder of nodes: any number of servers, or one program that repairs it."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: nobody is kept out
    fcntl = None  # type: ignore[assignment]

_TRIES, _PAUSE_S = 10, 0.1


class FolderLock:
    """An advisory lock on a folder itself, so that it leaves no file. It ends with its process,
    however that ends. Where the file system knows no locks, nobody is kept out.

    Args:
        folder: exists.
        alone: wait for nobody and keep everybody out; else keep out who wants it alone.

    Raises:
        BlockingIOError: somebody else has it.
        OSError: the folder cannot be opened.
    """

    def __init__(self, folder: Path, alone: bool = False) -> None:
        self.close: Callable[[], object] = lambda: None
        if fcntl is None:
            return
        descriptor = os.open(folder, os.O_RDONLY)
        self.close = weakref.finalize(self, os.close, descriptor)
        kind = (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB
        # Who only looks whether a folder is in use has it alone for a moment.
        for left in reversed(range(1 if alone else _TRIES)):
            try:
                fcntl.flock(descriptor, kind)
            except BlockingIOError:
                if left:
                    time.sleep(_PAUSE_S)
                    continue
                self.close()
                raise
            except OSError:
                pass
            return


def in_use(folder: Path) -> bool:
    """Whether a server has a folder open now."""
    with suppress(OSError):
        try:
            FolderLock(folder, alone=True).close()
        except BlockingIOError:
            return True
    return False
