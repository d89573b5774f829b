"""ShareGPT-90K: conversations that users of ChatGPT shared."""

from kvshare_mm.apps.bench.datasets.base import Conversations, Row, first_turn


def _prompt(row: Row) -> str | None:
    return first_turn(row["conversations"], "from", "value", frozenset({"human", "user"}))


SHAREGPT = Conversations("sharegpt", "RyokoAI/ShareGPT52K", "conversations", _prompt)
