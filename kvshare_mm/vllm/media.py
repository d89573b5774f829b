"""A request with media as one stream: what stands at vLLM's placeholders, and where it is.

vLLM fills a picture's places with one and the same token. Their keys are made of what vLLM itself
tells pictures apart by, so only exactly the same picture aligns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvshare_mm.identity import identity, text_identity
from kvshare_mm.stream import (
    MediaItem,
    Modality,
    Segment,
    SegmentStream,
    media_keys,
    text_stream,
)

logger = logging.getLogger(__name__)

Positions = Callable[[list[int], list[Any]], np.ndarray | None]
"""``[3, N]`` int64 rotary positions of a prompt with vLLM's features; None: its index."""

# A video is pictures, one behind the other.
_MODALITIES = {"image": Modality.IMAGE, "video": Modality.IMAGE, "audio": Modality.AUDIO}


def request_stream(
    token_ids: Sequence[int], features: Sequence[Any], positions: Positions | None
) -> SegmentStream | None:
    """The stream of a prompt as vLLM's scheduler has it.

    Args:
        token_ids: the prompt, as many placeholders in it as its media take.
        features: vLLM's ``MultiModalFeatureSpec`` of each medium.
        positions: of this model; None: its media are not shared.

    Returns:
        None if something in it is not known, or has a place that is not.
    """
    if not features:
        return text_stream(token_ids)
    if positions is None:
        return None
    try:
        where = positions(list(token_ids), list(features))
    except Exception as error:  # of a model's code, which is made for its workers
        logger.debug("media are not shared: %r", error)
        return None
    ids = np.array(token_ids, dtype=np.int64)
    keys = ids.astype(np.uint64)
    segments: list[Segment] = []
    items: list[MediaItem] = []
    end = 0
    for feature in sorted(features, key=lambda f: f.mm_position.offset):
        modality, place = _MODALITIES.get(feature.modality), feature.mm_position
        if modality is None or place.get_num_embeds() < 1:
            return None
        # vLLM counts tokens around it to its place, which are text.
        runs = place.extract_embeds_range()
        start, before, end = int(runs[0][0]), end, int(runs[-1][1]) + 1
        if start < before:
            return None
        if start > before:
            segments.append(Segment(Modality.TEXT, before, start))
        # What stands in between too (ends of rows, times of frames), and how it is laid out: an
        # identifier may be the sender's own.
        made_of = text_identity(feature.identifier).encode() + ids[start:end].tobytes()
        if where is not None:
            made_of += (where[:, start:end] - where[:, start : start + 1]).tobytes()
        length = end - start
        item = MediaItem(modality, identity(made_of), length, None, f"{length} tokens", dict)
        keys[start:end] = media_keys(item.digest, length)
        segments.append(Segment(item.modality, start, end, item.content_hash, item.label))
        items.append(item)
    if end < len(ids):
        segments.append(Segment(Modality.TEXT, end, len(ids)))
    return SegmentStream(ids, keys, tuple(segments), tuple(items), where)
