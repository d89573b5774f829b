"""Threads that leave the cores to the model."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch


def start_on_one_core(target: Callable[[], None], name: str) -> threading.Thread:
    """Start a daemon thread in which torch uses one core.

    `torch.set_num_threads` also decides what threads get that have not used torch yet, whoever
    started them: the model's would run on one core too. So the caller sets its own number again.
    """
    before = torch.get_num_threads()
    limited = threading.Event()

    def run() -> None:
        torch.get_num_threads()  # the first call in a thread would undo what was set before it
        torch.set_num_threads(1)
        limited.set()
        target()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    limited.wait()
    torch.set_num_threads(before)
    return thread
