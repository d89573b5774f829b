"""Answers in JSON with lists whose items differ: what a grammar cannot see, it remembers.

The text is followed byte by byte. An item that equals an earlier one is not let end, and nothing is
let begin that could only end so: where the item so far is the beginning of an earlier one, a way to
become another is searched for in the grammar.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self

from kvshare_mm.json_places import Places

_MOST_TRIED = 10_000  # bytes, to find a way behind one token
_MASK = 20  # bytes that are tried in the time that it takes to tell which may come
_MOST_DEPTH = 200  # of what is in a list whose items must differ
_LONGEST_NUMBER = 20  # characters that are tried; more digits make no other number
_LARGEST = 1e300  # numbers beyond are taken to be equal
_BLANK = frozenset(b" \t\n\r")
_DIGITS = frozenset(b"-0123456789")
_ENDS = b'"]},'
_ORDER = bytes(dict.fromkeys(_ENDS + b"9876543210" + bytes(range(256))))


# How deep its list is, and its number there.
_Item = tuple[int, str | int | None]


class _List(NamedTuple):
    """An object or a list that is open.

    Attributes:
        places, place: of the schema, and which it is.
        at: name of the property that comes, or number of the item; None: a name comes.
        unique: whether its items must differ.
        said: items so far, as JSON in one spelling.
        texts: as they came, each text and number in one spelling, without blanks.
        text: of the item that comes, so far.
        alike: those of `texts` that begin with it, up to what will be spelled in another way when
            it has ended: a number (1.0 is 1), a text with a backslash.
    """

    places: Places
    place: tuple[int, ...]
    at: str | int | None
    unique: bool = False
    said: frozenset[str] = frozenset()
    texts: tuple[bytes, ...] = ()
    text: bytes = b""
    alike: tuple[bytes, ...] = ()


class _State(NamedTuple):
    """What was read.

    Attributes:
        open: from the outermost.
        token: the text, name, number or word that is being read, or what stands before JSON.
        text: whether that is in quotes.
        escaped: whether a backslash was the last.
        root: of the JSON that comes, if it does.
    """

    open: tuple[_List, ...] = ()
    token: bytes = b""
    text: bool = False
    escaped: bool = False
    root: Places | None = None

    @property
    def decided(self) -> bool:
        """Whether every open item differs from the earlier ones, however it ends."""
        return not any(each.alike for each in self.open)

    @property
    def fresh(self) -> bool:
        """Whether that is not so of items alone that have not begun."""
        return not any(each.alike and each.text for each in self.open)


class UniqueItems:
    """Follows one answer.

    Args:
        parts: what stands before each JSON that may come, and its schema; before an answer that is
            JSON stands nothing.
        matcher: llguidance's `LLMatcher` of the same grammar, with a byte a token.
    """

    def __init__(self, parts: Sequence[tuple[bytes, Places]], matcher: Any) -> None:
        self._parts = parts
        self._matcher = matcher
        self._longest = max(len(before) for before, _ in parts)
        self._state = _State() if self._longest else _State(root=parts[0][1])
        self._way = b""  # bytes that lead to where it is decided
        self._left = _MOST_TRIED

    def copy(self) -> Self:
        """The same for another answer that has not begun."""
        return type(self)(self._parts, self._matcher.deep_copy())

    def add(self, text: bytes) -> int | None:
        """The answer goes on with this; None: it may.

        Returns:
            The place in `text` of the first byte that must not come; then nothing is added.

        Raises:
            TimeoutError: it takes too long to tell.
        """
        state, way = self._state, self._way
        for i, byte in enumerate(text):
            self._matcher.consume_token(byte)
            self._check()
            after = self._read(state, byte)
            if after is None or after.decided:
                way = b""
            elif after is not state:
                way = way[1:] if way[0:1] == text[i : i + 1] else b""
                way = way or self._search(after)
            if after is None or not (after.decided or way):
                self._matcher.rollback(i + 1)
                return i
            state = after
        self._state, self._way, self._left = state, way, _MOST_TRIED
        return None

    def _check(self) -> None:
        if self._left < 0 or self._matcher.is_error():
            raise TimeoutError("uniqueItems of items that are too much alike")

    # -- ways to differ -------------------------------------------------------------------------

    def _search(self, start: _State) -> bytes:
        """Bytes that may come and decide it; none: there are none.

        Of lists that must have many items, that the next one differs too is enough.
        """
        path: list[bytes] = []
        another = [_item(start, None)]
        tried = [self._steps(start, another[-1])]
        while tried:
            said, after = next(tried[-1], (b"", start))
            if not said:
                tried.pop()
                another.pop()
                if path:
                    self._matcher.rollback(len(path.pop()))
            elif _is_found(after, another[-1]):
                self._matcher.rollback(sum(map(len, path)))
                return b"".join([*path, said])
            else:
                self._matcher.consume_tokens([*said])
                path.append(said)
                another.append(_item(after, another[-1]))
                tried.append(self._steps(after, another[-1]))
        return b""

    def _steps(self, state: _State, another: _Item | None) -> Iterator[tuple[bytes, _State]]:
        """What may come and what is then: one with which it is found, or all others."""
        self._left -= _MASK
        if forced := self._matcher.compute_ff_bytes():
            yield from self._forced(state, forced, another)
            return
        bias = self._matcher.compute_logit_bias()
        may = [byte for byte in _ORDER if bias[byte]]
        if not state.text and state.open:
            may = [byte for byte in may if byte not in _BLANK] or may
            if len(state.token) >= _LONGEST_NUMBER:
                may = [byte for byte in may if byte in _ENDS]
        others = []
        for byte in may:
            self._left -= 1
            self._check()
            after = self._read(state, byte)
            if after is not None and _is_found(after, another):
                yield bytes([byte]), after
                return
            if after is not None:
                others.append((bytes([byte]), after))
        yield from others

    def _forced(
        self, state: _State, forced: bytes, another: _Item | None
    ) -> Iterator[tuple[bytes, _State]]:
        """All that must come, or so much of it as is needed."""
        for i, byte in enumerate(forced):
            self._left -= 1
            self._check()
            after = self._read(state, byte)
            if after is None:
                return
            if _is_found(after, another):
                yield forced[: i + 1], after
                return
            state = after
        yield forced, state

    # -- reading --------------------------------------------------------------------------------

    def _read(self, state: _State, byte: int) -> _State | None:
        """What is then; None: an item would equal an earlier one."""
        if not state.open and self._longest and state.root is None:
            return self._before(state.token + bytes([byte]))
        if state.text:
            token = state.token + bytes([byte])
            opened = _more(state.open, byte, b"\\" in token)
            state = state._replace(open=opened, token=token)
            if state.escaped or byte != ord('"'):
                return state._replace(escaped=not state.escaped and byte == ord("\\"))
            opened = _respelled(state.open, token)
            if opened and opened[-1].at is None:
                name = json.loads(token.decode(errors="replace"))
                return _State((*opened[:-1], opened[-1]._replace(at=name)))
            return _ended(opened)
        if state.token:
            if byte not in _BLANK and byte not in b",]}":
                opened = _more(state.open, byte, state.token[0] in _DIGITS)
                return _State(opened, state.token + bytes([byte]))
            ended = _ended(_respelled(state.open, state.token))
            return ended if ended is None or byte in _BLANK else self._read(ended, byte)
        if byte in _BLANK:
            return state
        if byte in b"]}":
            return _ended(_more(state.open[:-1], byte))
        if byte == ord(","):
            *outer, last = state.open
            return _State((*_more(tuple(outer), byte), _next(last)))
        if byte == ord(":"):
            return _State(_more(state.open, byte))
        opened = _more(state.open, byte, byte in _DIGITS)
        if byte not in b"[{":
            return _State(opened, bytes([byte]), text=byte == ord('"'))
        if len(opened) >= _MOST_DEPTH and any(each.unique for each in opened):
            return None
        if not opened:
            assert state.root is not None
            return _State((_begun(state.root, state.root.root, byte),))
        last = opened[-1]
        assert last.at is not None  # a name is no list
        return _State((*opened, _begun(last.places, last.places.inside(last.place, last.at), byte)))

    def _before(self, text: bytes) -> _State:
        for before, places in self._parts:
            if text.endswith(before):
                return _State(root=places)
        return _State(token=text[-self._longest :])


def _is_found(state: _State, another: _Item | None) -> bool:
    if state.decided or another is None or not state.fresh:
        return state.decided
    depth, at = another
    return depth == len(state.open) and at != state.open[-1].at


def _item(state: _State, before: _Item | None) -> _Item | None:
    """The one that a list has come to last."""
    return (len(state.open), state.open[-1].at) if state.fresh else before


def _begun(places: Places, place: tuple[int, ...], byte: int) -> _List:
    is_list = byte == ord("[")
    return _List(places, place, 0 if is_list else None, is_list and places.unique(place))


def _more(opened: tuple[_List, ...], byte: int, respelled: bool = False) -> tuple[_List, ...]:
    """The item that comes in each list goes on."""
    if not any(each.unique for each in opened):
        return opened
    said = bytes([byte])
    if respelled:
        return tuple(each._replace(text=each.text + said) for each in opened)
    return tuple(_going_on(each, each.text + said, each.alike) for each in opened)


def _going_on(last: _List, text: bytes, alike: Iterable[bytes]) -> _List:
    if not last.unique:
        return last
    return last._replace(text=text, alike=tuple(each for each in alike if each.startswith(text)))


def _respelled(opened: tuple[_List, ...], token: bytes) -> tuple[_List, ...]:
    """The text, name, number or word that has ended is taken for all that are equal to it."""
    if not any(each.unique for each in opened):
        return opened
    spelled = _one_spelling(token).encode(errors="surrogatepass")
    return tuple(_going_on(each, each.text[: -len(token)] + spelled, each.texts) for each in opened)


def _ended(opened: tuple[_List, ...]) -> _State | None:
    """A value has ended."""
    if not opened or not opened[-1].unique:
        return _State(opened)
    *outer, last = opened
    said = _one_spelling(last.text)
    if said in last.said:
        return None
    kept = last._replace(said=last.said | {said}, texts=(*last.texts, last.text), alike=())
    return _State((*outer, kept))


def _one_spelling(text: bytes) -> str:
    value = json.loads(text.decode(errors="replace"), parse_int=_number, parse_float=_number)
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _next(last: _List) -> _List:
    if isinstance(last.at, int):
        return last._replace(at=last.at + 1, text=b"", alike=last.texts)
    return last._replace(at=None)


def _number(text: str) -> float:
    return max(-_LARGEST, min(float(text), _LARGEST)) + 0.0  # -0.0 is 0.0
