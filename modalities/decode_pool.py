"""Processes that decode media, each under a deadline and a memory ceiling.

A decoder that hangs, grows or dies takes its process with it, and with that one request; the next
file gets a new process. Results are those of decoding here, byte for byte.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from kvshare_mm.errors import ConfigError, EngineClosedError, InvalidRequestError
from kvshare_mm.modalities.decode_worker import bands
from kvshare_mm.modalities.decoding import DecoderFailedError, asker
from kvshare_mm.modalities.framing import receive, send
from kvshare_mm.modalities.picture_file import Picture
from kvshare_mm.modalities.sound_file import MAX_VALUES, Sound

logger = logging.getLogger(__name__)

T = TypeVar("T")

_START_S = 60.0  # for a new process on a busy machine
_HEAD = 1 << 20  # most bytes of what a worker says of a result


class DecodePool:
    """A `Decoder` with processes of its own. Thread-safe: as many files at once as processes.

    Args:
        workers: processes.
        deadline_s: seconds for a file, after which its process is killed.
        max_pixels: of a picture.
        memory: bytes that a process may allocate; by default what such a picture needs.

    Attributes:
        counters: ``decoded``, ``refused``, ``killed``.

    Raises:
        ConfigError: this platform cannot hand a socket to a new process.
    """

    def __init__(
        self, workers: int, deadline_s: float, max_pixels: int, memory: int | None = None
    ) -> None:
        if os.name != "posix":
            raise ConfigError("media_workers needs a POSIX system; use media_workers=0")
        self.counters: Counter[str] = Counter()
        self._deadline_s = deadline_s
        # A picture in four bytes per pixel, turned, and in RGB; or the samples, as many times.
        memory = memory or (512 << 20) + 16 * max(max_pixels, MAX_VALUES)
        self._changed = threading.Condition()
        self._closed = False
        self._all = [_Worker(memory) for _ in range(workers)]
        for worker in self._all:
            worker.start()
        self._idle = list(self._all)

    def picture(self, content: bytes, where: str, max_pixels: int) -> Picture:
        def read(told: Mapping[str, Any], take: Callable[[int], bytearray]) -> Picture:
            width, height = map(int, told["size"])
            if width * height > max_pixels:
                raise OSError("a picture larger than it may be")
            image = Image.new("RGB", (width, height))
            for top, bottom in bands(width, height):
                size = (width, bottom - top)
                band = Image.frombytes("RGB", size, bytes(take(3 * size[0] * size[1])))
                image.paste(band, (0, top))
            return Picture(image, tuple(map(str, told["notes"])), float(told["cpu_s"]))

        return self._decoded(content, where, {"kind": "picture", "max_pixels": max_pixels}, read)

    def sound(self, content: bytes, where: str, rate: int, max_s: float) -> Sound:
        def read(told: Mapping[str, Any], take: Callable[[int], bytearray]) -> Sound:
            samples = np.frombuffer(take(4 * MAX_VALUES), dtype=np.float32)
            own_rate, channels = int(told["rate"]), int(told["channels"])
            return Sound(samples, own_rate, channels, float(told["cpu_s"]))

        return self._decoded(content, where, {"kind": "sound", "rate": rate, "max_s": max_s}, read)

    def close(self) -> None:
        """Kill all processes, whatever they do."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            for worker in self._idle:
                worker.close()
            for worker in self._all:
                worker.kill()

    def _decoded(
        self,
        content: bytes,
        where: str,
        job: dict[str, Any],
        read: Callable[[Mapping[str, Any], Callable[[int], bytearray]], T],
    ) -> T:
        worker = self._taken()
        waits = asker.get()
        try:
            with nullcontext() if waits is None else waits.served(worker.kill):
                head = json.dumps({**job, "where": where, "deadline_s": self._deadline_s}).encode()
                try:
                    told = worker.asked(self._deadline_s, head, content)
                except (BrokenPipeError, ConnectionResetError):
                    if self._closed or (waits is not None and waits.gone):
                        raise
                    worker.kill()  # it was ending before it had read the file
                    told = worker.asked(self._deadline_s, head, content)
                if "error" in told:
                    self.counters["refused"] += 1
                    raise InvalidRequestError(str(told["error"]), told["field"])
                made = read(told, worker.take)
                self.counters["decoded"] += 1
                return made
        except TimeoutError as error:
            worker.kill()
            said = f"{where} took more than {self._deadline_s:g} s to decode"
            raise self._killed(said, where) from error
        except InvalidRequestError:
            raise
        except (EOFError, OSError, ValueError, KeyError, TypeError) as error:
            worker.kill()
            if waits is not None and waits.gone:
                raise InvalidRequestError("nobody waits for this any more") from error
            if self._closed:
                raise EngineClosedError("the server is shutting down") from error
            raise self._killed(f"{where} ended the process that decoded it", where) from error
        except BaseException:
            worker.kill()
            raise
        finally:
            with self._changed:
                if self._closed:
                    worker.close()
                else:
                    worker.start()  # a new one, if this one ended
                self._idle.append(worker)
                self._changed.notify()

    def _killed(self, said: str, where: str) -> InvalidRequestError:
        self.counters["killed"] += 1
        logger.warning("%s", said)
        return InvalidRequestError(said, where)

    def _taken(self) -> _Worker:
        with self._changed:
            self._changed.wait_for(lambda: self._idle or self._closed)
            if self._closed:
                raise EngineClosedError("the server is shutting down")
            return self._idle.pop()


class _Worker:
    """One process at a time, and the socket to it."""

    def __init__(self, memory: int) -> None:
        self.deadline = 0.0
        self._memory = memory
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._greeted = False

    def start(self) -> None:
        """Start the process if none runs; returns at once."""
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                return
            if self._socket is not None:
                self._socket.close()
            self._socket, theirs = socket.socketpair()
            self._greeted = False
            command = [sys.executable, "-P", "-m", "kvshare_mm.modalities.decode_worker"]
            try:
                self._process = subprocess.Popen(
                    [*command, str(theirs.fileno()), str(self._memory)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,  # of C libraries, which write no lines of our log
                    pass_fds=[theirs.fileno()],
                )
            except OSError as error:
                logger.error("no process to decode media: %s", error)
            finally:
                theirs.close()

    def ready(self) -> None:
        """Wait until a process takes files. Raises DecoderFailedError."""
        self.start()
        if self._greeted:
            return
        self.deadline = time.monotonic() + _START_S
        try:
            self.take(_HEAD)
        except (EOFError, OSError) as error:
            raise DecoderFailedError("the process that decodes media does not start") from error
        self._greeted = True

    def asked(self, deadline_s: float, head: bytes, content: bytes) -> Any:
        """What a process says of a file. Raises EOFError, OSError, TimeoutError among them."""
        self.ready()
        self.deadline = time.monotonic() + deadline_s
        for message in (head, content):
            send(self._timed(), message)
        return json.loads(self.take(_HEAD))

    def take(self, most: int) -> bytearray:
        """Receive; raises EOFError, OSError, TimeoutError among them."""
        return receive(self._timed(), most)

    def kill(self) -> None:
        """End the process now; a thread that waits for it gets EOFError."""
        with self._lock:
            process, self._process = self._process, None
            if process is not None:
                process.kill()
                process.wait()

    def close(self) -> None:
        """Nobody will wait for it any more."""
        self.kill()
        if self._socket is not None:
            self._socket.close()

    def _timed(self) -> socket.socket:
        assert self._socket is not None
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
        return self._socket
