"""What attention layers of vLLM's are called with, while a forward runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def watching(layers: Mapping[str, Any], see: Callable[..., None]) -> Iterator[None]:
    """``see(name, q, k, v)`` is called before each layer that is called inside.

    No hooks: vLLM's models made of transformers' call `forward` themselves.
    """

    def seen(name: str, forward: Any) -> Any:
        def call(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            see(name, query, key, value)
            return forward(query, key, value, *args, **kwargs)

        return call

    for name, layer in layers.items():
        layer.forward = seen(name, layer.forward)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward
