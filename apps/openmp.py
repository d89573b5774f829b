"""How the threads of the model wait for each other."""

from __future__ import annotations

import os


def wait_asleep() -> None:
    """Let them sleep, for servers; called before torch is loaded, which reads it.

    They wait for each other many times a token. If they spin, they take the cores from what they
    wait for as soon as anything else runs on these: parsing, decoding, a client.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
