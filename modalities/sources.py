"""Where the bytes of a medium come from: a path, a URL, base64. Every mistake names the part."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvshare_mm.errors import InvalidRequestError, KVShareError
from kvshare_mm.modalities import data_url

_FETCHED = ("http:", "https:", "data:")


def given(part: Mapping[str, Any], field: str) -> Any:
    """What a part of a message holds: of an ``..._url``, the URL itself.

    Raises:
        InvalidRequestError: nothing.
    """
    value = part.get(part["type"])
    if part["type"].endswith("_url") and isinstance(value, Mapping):
        value = value.get("url")
    if value is None or (isinstance(value, str) and not value):
        raise InvalidRequestError(f"{field} is missing", field)
    return value


class MediaSources:
    """Reads the bytes of media.

    Args:
        max_bytes: largest file, wherever it comes from.
        local_files: whether paths on this machine may be read.
    """

    def __init__(self, max_bytes: int = 64 << 20, local_files: bool = True) -> None:
        self.max_bytes = max_bytes
        self._local_files = local_files

    def read(self, place: object, where: str) -> bytes:
        """The bytes at a URL (http, https, data) or a path, or as they were given.

        Raises:
            InvalidRequestError: there is nothing to be read; `where` is its field.
        """
        if isinstance(place, bytes | bytearray | memoryview):
            return self._checked(bytes(place), where)
        if isinstance(place, str) and place.lower().startswith(_FETCHED):
            return self._checked(self._fetch(place, where), where)
        if not isinstance(place, str | os.PathLike):
            raise InvalidRequestError(
                f"{where} is neither a path nor bytes but a {type(place).__name__}", where
            )
        if not place:
            raise InvalidRequestError(f"{where} is empty", where)
        return self._checked(self._file(os.fspath(place), where), where)

    def base64(self, text: object, where: str) -> bytes:
        """Decoded base64. Raises InvalidRequestError with `where` as its field."""
        if not isinstance(text, str):
            raise InvalidRequestError(f"{where} must be base64 text", where)
        # Four characters for three bytes: what is too large is known before it is decoded.
        if len(text) > self.max_bytes // 3 * 4 + 4:
            raise self._too_large(where)
        try:
            content = data_url.from_base64(data_url.pieces(text))
        except ValueError as error:
            raise InvalidRequestError(f"{where} is no base64: {error}", where) from error
        return self._checked(content, where)

    def _fetch(self, url: str, where: str) -> bytes:
        from kvshare_mm.modalities.fetch import FetchPolicy, MediaFetcher

        fetcher = MediaFetcher(FetchPolicy(max_bytes=self.max_bytes))
        try:
            content: bytes = fetcher.fetch(url)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"{where}: {error}", where) from error
        except (KVShareError, OSError, ValueError) as error:
            raise InvalidRequestError(f"{where} could not be fetched: {error}", where) from error
        return content

    def _file(self, path: Any, where: str) -> bytes:
        if not self._local_files:
            raise InvalidRequestError(
                f"{where} is a path on this machine, which may not be read here; send the content",
                where,
            )
        file = Path(str(path)).expanduser()
        try:
            found = file.stat()
            if not stat.S_ISREG(found.st_mode):
                raise InvalidRequestError(f"{where}: {file} is no file", where)
            if found.st_size > self.max_bytes:
                raise self._too_large(where)
            return file.read_bytes()
        except FileNotFoundError as error:
            raise InvalidRequestError(f"{where}: there is no file {file}", where) from error
        except InvalidRequestError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise InvalidRequestError(f"{where} cannot be read: {error}", where) from error

    def _checked(self, content: bytes, where: str) -> bytes:
        if not content:
            raise InvalidRequestError(f"{where} is empty", where)
        if len(content) > self.max_bytes:
            raise self._too_large(where)
        return content

    def _too_large(self, where: str) -> InvalidRequestError:
        return InvalidRequestError(
            f"{where} has more than {self.max_bytes} bytes, the most that is taken", where
        )
