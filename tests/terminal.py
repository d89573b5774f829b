"""Programs in a terminal of fixed size, and what stands on its screen when they have ended."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Sequence

ROWS, COLUMNS = 24, 80
_TOKEN = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n])")


def run_in_terminal(command: Sequence[str]) -> tuple[int, str]:
    """A command's exit code, and all that it wrote to a terminal of 80x24."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    with subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env={**env, "TERM": "xterm-256color"}
    ) as process:
        os.close(slave)
        wrote = b""
        try:
            while part := os.read(master, 65536):
                wrote += part
        except OSError:  # so Linux says that nobody can write any more
            pass
        finally:
            os.close(master)
    return process.returncode, wrote.decode()


def lines(wrote: str) -> list[str]:
    """The lines that stand there in the end, with those that scrolled away above.

    Raises:
        ValueError: a control sequence that is none of those known here.
    """
    shown: list[list[str]] = [[]]
    row = column = 0
    at = 0
    while at < len(wrote):
        token = _TOKEN.match(wrote, at)
        if token is None:
            raise ValueError(f"unknown control sequence: {wrote[at : at + 8]!r}")
        at = token.end()
        argument, command, newline, char = token.groups()
        if char is not None:
            if column == COLUMNS:
                row, column = row + 1, 0
            shown += [[] for _ in range(row + 1 - len(shown))]
            line = shown[row]
            line += " " * (column + 1 - len(line))
            line[column] = char
            column += 1
        elif newline == "\r":
            column = 0
        elif newline == "\n":
            row += 1
        elif command == "A":
            row -= int(argument or 1)
        elif command == "K":
            shown[row][0 if argument == "2" else column :] = []
        elif command not in "mhl":  # colours and modes
            raise ValueError(f"unknown control sequence: {token[0]!r}")
    return ["".join(line).rstrip() for line in shown]
