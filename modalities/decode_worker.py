"""A process that decodes one file after the other, and may be killed at any time.

It imports no torch. What it says is data, not code: the process that asks has to live with whatever
a hostile file makes of this one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from typing import Any

from PIL import Image

from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.modalities.framing import receive, send
from kvshare_mm.modalities.picture_file import load_picture
from kvshare_mm.modalities.sound_file import load_sound

_BAND = 1 << 20  # bytes of pixels that are sent at a time
_NICE = 15  # the model comes first, and who asks without a picture


def bands(width: int, height: int) -> list[tuple[int, int]]:
    """First and last row (exclusive) of the pieces that a picture travels in."""
    rows = max(1, _BAND // (3 * width))
    return [(top, min(height, top + rows)) for top in range(0, height, rows)]


def main(fd: int, memory: int) -> None:
    """Decode until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides when it ends
    _limit(memory)
    os.nice(_NICE)
    with socket.socket(fileno=fd) as other:
        send(other, json.dumps({}).encode())
        with contextlib.suppress(EOFError, OSError):
            while True:
                head = json.loads(receive(other))
                content = bytes(receive(other))
                # Ends this process if nobody is left to do it.
                signal.setitimer(signal.ITIMER_REAL, 2 * head["deadline_s"])
                _answer(other, head, content)
                signal.setitimer(signal.ITIMER_REAL, 0)


def _answer(other: socket.socket, head: dict[str, Any], content: bytes) -> None:
    where = head["where"]
    try:
        if head["kind"] == "picture":
            picture = load_picture(content, where, head["max_pixels"])
        else:
            sound = load_sound(content, where, head["rate"], head["max_s"])
    except InvalidRequestError as error:
        send(other, json.dumps({"error": str(error), "field": error.field}).encode())
        return
    except MemoryError:
        told = {"error": f"{where} takes too much memory to decode", "field": where}
        send(other, json.dumps(told).encode())
        return
    if head["kind"] == "picture":
        image: Image.Image = picture.image
        told = {"size": image.size, "notes": picture.notes, "cpu_s": picture.cpu_s}
        send(other, json.dumps(told).encode())
        for top, bottom in bands(*image.size):
            send(other, image.crop((0, top, image.width, bottom)).tobytes())
        return
    told = {"rate": sound.rate, "channels": sound.channels, "cpu_s": sound.cpu_s}
    send(other, json.dumps(told).encode())
    send(other, sound.samples.tobytes())


def _limit(memory: int) -> None:
    import resource

    # What is allocated; and, where that is not counted, what is mapped, libraries included.
    for limit, size in ((resource.RLIMIT_DATA, memory), (resource.RLIMIT_AS, memory + (1 << 30))):
        _, most = resource.getrlimit(limit)
        wanted = size if most == resource.RLIM_INFINITY else min(size, most)
        with contextlib.suppress(ValueError, OSError):  # macOS takes only some values
            resource.setrlimit(limit, (wanted, wanted))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
