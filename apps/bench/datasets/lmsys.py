"""LMSYS-Chat-1M: a million conversations with 25 models (arXiv 2309.11998; gated on the hub)."""

from kvshare_mm.apps.bench.datasets.base import Conversations
from kvshare_mm.apps.bench.datasets.wildchat import WILDCHAT

# Both have a list of {"role", "content"} turns in the same field.
LMSYS = Conversations("lmsys", "lmsys/lmsys-chat-1m", "conversation", WILDCHAT.prompt)
