"""A prompt's media while it is prefilled."""

from __future__ import annotations

import time

import numpy as np
import torch

from kvshare_mm.native.encoder import MediaEncoder
from kvshare_mm.native.inputs import MediaInputs
from kvshare_mm.outputs import MediaUse
from kvshare_mm.stream import SegmentStream


class PromptMedia:
    """A prompt's media while it is prefilled; each is encoded at most once, and only if needed."""

    def __init__(
        self,
        encoder: MediaEncoder | None,
        stream: SegmentStream,
        ns: str,
        reuse: bool,
        store: bool,
    ) -> None:
        if stream.items and encoder is None:
            raise ValueError("the model has no encoder for this prompt's media")
        self.seconds = 0.0
        self._encoder = encoder
        self._stream = stream
        self._ns = ns
        self._options = {"reuse": reuse, "keep": store}
        self._made: dict[int, tuple[torch.Tensor, bool]] = {}

    @property
    def whole(self) -> tuple[tuple[int, int], ...]:
        """``[start, end)`` of media that no chunk may cut, see `inputs.fitting`."""
        if self._encoder is None or not self._encoder.both_ways:
            return ()
        return tuple((segment.start, segment.end) for segment in self._stream.media)

    def inputs(self, compute: np.ndarray) -> MediaInputs | None:
        """What the model needs to compute positions `compute`; None: token ids are enough."""
        stream = self._stream
        if not stream.items:
            return None
        begun = time.perf_counter()
        features = []
        for segment, item in zip(stream.media, stream.items, strict=True):
            low, high = np.searchsorted(compute, (segment.start, segment.end))
            if low == high:
                continue
            if segment.start not in self._made:
                assert self._encoder is not None
                self._made[segment.start] = self._encoder.features(item, self._ns, **self._options)
            features.append((segment.start, self._made[segment.start][0]))
        self.seconds += time.perf_counter() - begun
        return MediaInputs(stream.positions, tuple(features))

    @property
    def uses(self) -> tuple[MediaUse, ...]:
        uses = []
        for segment, item in zip(self._stream.media, self._stream.items, strict=True):
            _, ran = self._made.get(segment.start, (None, None))
            uses.append(
                MediaUse.of(
                    segment, item, "kv" if ran is None else "encoder" if ran else "features"
                )
            )
        return tuple(uses)
