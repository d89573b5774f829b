"""WildChat-1M: a million conversations with GPT-3.5 and GPT-4 (arXiv 2405.01470, ODC-BY)."""

from kvshare_mm.apps.bench.datasets.base import Conversations, Row, first_turn


def _prompt(row: Row) -> str | None:
    return first_turn(row["conversation"], "role", "content", frozenset({"user"}))


WILDCHAT = Conversations("wildchat", "allenai/WildChat-1M", "conversation", _prompt)
