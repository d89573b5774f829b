"""Features of pictures and clips: known ones come from the store, the others from the encoder."""

from __future__ import annotations

import logging
import time
from collections import Counter

import torch

from kvshare_mm.errors import KVUnavailableError
from kvshare_mm.models.loader import LoadedModel
from kvshare_mm.store.media import as_node, features_of, media_id, media_namespace
from kvshare_mm.store.tiered import TieredStore
from kvshare_mm.stream import MediaItem

logger = logging.getLogger(__name__)


class MediaEncoder:
    """Runs a multimodal model's encoders, once for each medium.

    Args:
        loaded: a model with a family.
        store: where features are kept, or None.

    Attributes:
        counters: ``tower_runs``, ``tower_us`` (their processor's work included) and ``tower_hits``,
            and ``store_error`` for stored features that could not be read or written.
        both_ways: see `models.family.Family`.
    """

    def __init__(self, loaded: LoadedModel, store: TieredStore | None) -> None:
        if loaded.family is None:
            raise ValueError(f"{loaded.name} has no encoders")
        self.counters: Counter[str] = Counter()
        self.both_ways = loaded.family.both_ways
        self._family = loaded.family
        self._device = loaded.device
        self._dtype = loaded.dtype
        self._store = store

    @torch.inference_mode()
    def features(
        self, item: MediaItem, ns: str, *, reuse: bool = True, keep: bool = True
    ) -> tuple[torch.Tensor, bool]:
        """What stands at an item's positions.

        Args:
            ns: namespace of the request.
            reuse: take them from the store if they are there.
            keep: store them if the encoder ran.

        Returns:
            ``[length, hidden_size]`` on the model's device, and whether the encoder ran.
        """
        if reuse and (known := self._stored(item, ns)) is not None:
            self.counters["tower_hits"] += 1
            return known.to(self._device), False
        start = time.perf_counter()
        inputs = {
            name: tensor.to(self._device, self._dtype if tensor.is_floating_point() else None)
            for name, tensor in item.inputs().items()
        }
        features = self._family.encode(item.modality, inputs)
        if len(features) != item.length:
            raise RuntimeError(f"{len(features)} features for {item.length} positions of {item}")
        self.counters["tower_runs"] += 1
        self.counters["tower_us"] += int(1e6 * (time.perf_counter() - start))
        if keep and reuse:
            self._put(item, ns, features)
        return features, True

    def knows(self, item: MediaItem, ns: str) -> bool:
        """Whether an item's features are stored, so that they can be had without running it."""
        return self._store is not None and self._store.resident(media_id(ns, item)) is not None

    def _stored(self, item: MediaItem, ns: str) -> torch.Tensor | None:
        node_id = media_id(ns, item)
        if self._store is None or self._store.resident(node_id) is None:
            return None
        try:
            features = features_of(self._store.get(node_id, media_namespace(ns)))
        except KVUnavailableError as error:
            logger.info("running the encoder again: %s", error)
            self.counters["store_error"] += 1
            return None
        return features if len(features) == item.length else None

    def _put(self, item: MediaItem, ns: str, features: torch.Tensor) -> None:
        if self._store is None:
            return
        try:
            self._store.put(as_node(ns, item, features))
        except Exception:
            # A cache problem is never a request's problem.
            self.counters["store_error"] += 1
            logger.exception("could not keep the features of %s", item)
