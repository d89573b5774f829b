"""Calls of tools, read from an answer as it comes."""

from __future__ import annotations

import json
from typing import Any

from kvshare_mm.outputs import ToolCall
from kvshare_mm.tools import CLOSE, OPEN, Style, Tools


class CallReader:
    """Tells calls from words in an answer that comes piece by piece.

    What is no call of a tool that may be called, with an object of arguments, is words: nothing is
    lost. Blanks around calls are left out.
    """

    def __init__(self, tools: Tools, style: Style) -> None:
        self._names = set(tools.callable)
        self._parallel = tools.several
        self._style = style
        self._left = ""
        self._blanks = ""
        self._tried = 0
        self._plain = False
        self._num_calls = 0

    def feed(self, text: str) -> list[str | ToolCall]:
        """The words and calls that are known with this piece of the answer."""
        if not self._names:
            return [text] if text else []
        self._left += text
        return self._joined(self._llama(False) if self._style == "llama" else self._hermes(False))

    def end(self) -> list[str | ToolCall]:
        """What was held back."""
        found = self._llama(True) if self._style == "llama" else self._hermes(True)
        if not self._num_calls and self._blanks:
            found.append(self._blanks)
        return self._joined(found)

    def _hermes(self, last: bool) -> list[str | ToolCall]:
        found: list[str | ToolCall] = []
        while self._left:
            start = self._left.find(OPEN)
            if start != 0:
                end = start if start > 0 else len(self._left) - _begun(self._left, OPEN)
                words = self._left if last and start < 0 else self._left[:end]
                self._left = self._left[len(words) :]
                found += self._words(words)
                if start < 0:
                    break
                continue
            end = self._left.find(CLOSE, max(self._tried, len(OPEN)))
            if end < 0 and not last:
                break
            inside = self._left[len(OPEN) : end if end >= 0 else None]
            call, may_go_on = self._call(inside)
            if call is None and may_go_on and end >= 0 and not last:
                self._tried = end + len(CLOSE)
                continue
            self._tried = 0
            if call is None:
                # Words, up to the next that may be a call.
                found += self._words(OPEN)
                self._left = self._left[len(OPEN) :]
            else:
                found += self._take(call)
                self._left = self._left[end + len(CLOSE) :] if end >= 0 else ""
        return found

    def _llama(self, last: bool) -> list[str | ToolCall]:
        if not last and not self._plain and self._left.lstrip()[:1] in ("", "{"):
            return []
        text, self._left, at = self._left, "", 0
        calls: list[ToolCall] = []
        while (
            last
            and not self._plain
            and (at := len(text) - len(text[at:].lstrip("; \n\t"))) < len(text)
        ):
            try:
                value, at = json.JSONDecoder().raw_decode(text, at)
            except (ValueError, RecursionError):
                value = None
            if (call := self._named(value, "parameters")) is None:
                return self._words(text)
            calls.append(call)
        if calls:
            return [call for each in calls for call in self._take(each)]
        self._plain = True
        return self._words(text)

    def _call(self, text: str) -> tuple[ToolCall | None, bool]:
        """The call that stands between its tags; whether it may if more of the text does."""
        try:
            return self._named(json.loads(text), "arguments"), False
        except ValueError as error:
            return None, "Unterminated string" in str(error)
        except RecursionError:
            return None, False

    def _named(self, value: Any, arguments: str) -> ToolCall | None:
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        given = value.get(arguments, {})
        if not isinstance(given, dict):
            return None
        return ToolCall(value["name"], json.dumps(given, ensure_ascii=False))

    def _take(self, call: ToolCall) -> list[str | ToolCall]:
        self._blanks = ""
        self._num_calls += 1
        return [call] if self._parallel or self._num_calls == 1 else []

    def _words(self, text: str) -> list[str | ToolCall]:
        """Words without the blanks behind them, which may stand before a call."""
        text = self._blanks + text
        words = text.rstrip()
        self._blanks = text[len(words) :]
        return [words] if words else []

    @staticmethod
    def _joined(found: list[str | ToolCall]) -> list[str | ToolCall]:
        joined: list[str | ToolCall] = []
        for each in found:
            if isinstance(each, str) and joined and isinstance(joined[-1], str):
                joined[-1] += each
            else:
                joined.append(each)
        return joined


def _begun(text: str, tag: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`."""
    sizes = range(min(len(tag) - 1, len(text)), 0, -1)
    return next((n for n in sizes if text.endswith(tag[:n])), 0)
