"""Loading models with transformers: one at a time, and in silence."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_ONE = threading.Lock()


@contextmanager
def loading() -> Iterator[None]:
    """A model is loaded inside; others wait.

    While transformers loads, it replaces methods of its classes, `PreTrainedModel.tie_weights` for
    one, and puts back what it found: of two loads at once the second finds the first one's, and
    from then on no model's weights are tied in this process. Its progress bars would stand between
    the lines of a server's log.
    """
    from transformers.utils import logging

    with _ONE:
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.enable_progress_bar()
