"""Counts what a model really computes, probes of repair policies included."""

from __future__ import annotations

from typing import Any

from torch import nn


def decoder_layers(model: nn.Module, num_layers: int) -> nn.ModuleList:
    """A transformers decoder's layers. Raises ValueError: it has no such list."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    layers = next((m for m in lists if len(m) == num_layers), None)
    if layers is None:
        raise ValueError(f"the model has no list of {num_layers} layers")
    return layers


class LayerCounter:
    """Positions run through each decoder layer, summed over layers.

    A policy's own measurements (CacheBlend's pass over the first layers) are no positions that it
    repairs, but they cost like any others. Counting them in the model itself leaves nothing out. A
    pass that is ended inside a layer counts that layer as whole.

    Args:
        model: a transformers decoder; its layers are the ``nn.ModuleList`` of `num_layers` modules.
        num_layers: of the model.

    Raises:
        ValueError: the model has no such list.
    """

    def __init__(self, model: nn.Module, num_layers: int) -> None:
        self.num_layers = num_layers
        self._positions = 0
        self._hooks = [
            layer.register_forward_pre_hook(self._count, with_kwargs=True)
            for layer in decoder_layers(model, num_layers)
        ]

    def take(self) -> float:
        """Positions through all layers since the last call; a part of the layers is a fraction."""
        positions, self._positions = self._positions, 0
        return positions / self.num_layers

    def forget(self, positions: int) -> None:
        """So many went through all layers that do not count."""
        self._positions -= positions * self.num_layers

    def close(self) -> None:
        """Count no more."""
        for hook in self._hooks:
            hook.remove()

    def _count(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self._positions += hidden.shape[0] * hidden.shape[1]
