"""Servers to be killed, as a program: ``python killed_server.py MODEL``.

For each line of JSON on standard input (options of a server, ``seed``) it forks one, which a new
interpreter would need seconds to import torch for, and says on standard output its process id,
then each prompt that was answered and flushed ("kept"), then "dead" when it was killed.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

import numpy as np

_TEXT = (
    "laboratory report patient number haemoglobin sodium value question answer the fox dog "
    "quick lazy brown jumps over what is and nothing else with"
)
WORDS = _TEXT.split()
POLICIES: list[dict[str, Any]] = [
    {},
    {},
    {"repair": "none"},
    {"max_divergence": 0.001},
    {"max_divergence": 0.0},
    {"reuse": "exact"},
]


def prompt(rng: np.random.Generator) -> str:
    """One of a few texts with a few words changed: many share much."""
    text = np.random.default_rng(int(rng.integers(4))).choice(WORDS, 40).tolist()
    for at in rng.integers(0, 40, rng.integers(0, 4)):
        text[at] = f"{rng.choice(WORDS)} {rng.integers(9)}"
    return " ".join(text[: rng.integers(25, 41)])


def serve(model: str, seed: int, **options: Any) -> None:
    """Answer until killed, from three threads."""
    from kvshare_mm import KVShare

    llm = KVShare(model, embedder=None, max_num_seqs=2, max_model_len=512, **options)
    donors: Any = llm._parts.donors
    if donors.shared is not None:  # as `be_patient` does: on a busy machine, too, it publishes
        donors.shared._catalogue._timeout = 60.0
        waits = dict.fromkeys(("socket_timeout", "socket_connect_timeout"), 60.0)
        donors.shared._tier.remote._client.connection_pool.connection_kwargs.update(waits)

    def load(thread: int) -> None:
        rng = np.random.default_rng([seed, thread])
        while True:
            policy = POLICIES[rng.integers(len(POLICIES))]
            llm.generate(
                prompt(rng), max_tokens=int(rng.integers(1, 12)), ignore_eos=True, **policy
            )

    for thread in range(2):
        threading.Thread(target=load, args=(thread,), daemon=True).start()
    rng = np.random.default_rng([seed, 2])
    while True:
        asked = f"{prompt(rng)} {rng.integers(10**9)}"
        llm.generate(asked, max_tokens=2, ignore_eos=True, reuse="exact")
        if llm.flush(60):
            say("kept", asked)


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def main(model: str) -> None:
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import kvshare_mm.llm  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            serve(model, **json.loads(line))
        say("serves", child)
        os.waitpid(child, 0)
        say("dead")


if __name__ == "__main__":
    main(sys.argv[1])
