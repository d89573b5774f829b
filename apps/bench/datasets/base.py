"""What a conversation dataset is: a name on the hub, and where a row has its first prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Conversations:
    """A public dataset of conversations.

    Attributes:
        name: on the command line.
        hub_id: on the Hugging Face hub.
        field: what tells its rows from those of others.
        prompt: the first user turn of a row, or None if it has none.
    """

    name: str
    hub_id: str
    field: str
    prompt: Callable[[Row], str | None]


def first_turn(turns: Any, role: str, text: str, users: frozenset[str]) -> str | None:
    """The first turn of a user, or None.

    Args:
        turns: a list of turns, or (as parquet files have it) an object of lists.
        role: the field that says who speaks.
        text: the field that has the words.
        users: roles of users.
    """
    if isinstance(turns, Mapping):
        turns = [
            dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)
        ]
    if not isinstance(turns, list | tuple):
        return None
    for turn in turns:
        if isinstance(turn, Mapping) and turn.get(role) in users:
            said = turn.get(text)
            return said if isinstance(said, str) and said.strip() else None
    return None
