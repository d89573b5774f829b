"""A request with pictures as one stream: what stands at vLLM's placeholders, and where it is.

vLLM fills a picture's places with one and the same token. Their keys are made of what vLLM itself
tells pictures apart by, so only exactly the same picture aligns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvshare_mm.identity import text_identity
from kvshare_mm.stream import (
    MediaItem,
    Modality,
    Segment,
    SegmentStream,
    media_keys,
    mrope_positions,
    text_stream,
)


def request_stream(
    token_ids: Sequence[int], features: Sequence[Any], merge: int | None
) -> SegmentStream | None:
    """The stream of a prompt as vLLM's scheduler has it.

    Args:
        token_ids: the prompt, as many placeholders in it as its media take.
        features: vLLM's ``MultiModalFeatureSpec`` of each medium.
        merge: patches of a picture, along each side, that become one position; None: this model's
            pictures are not known here.

    Returns:
        None if something in it is no picture, or one whose place is not known.
    """
    if not features:
        return text_stream(token_ids)
    if merge is None:
        return None
    ids = np.array(token_ids, dtype=np.int64)
    keys = ids.astype(np.uint64)
    segments: list[Segment] = []
    items: list[MediaItem] = []
    end = 0
    for feature in sorted(features, key=lambda f: f.mm_position.offset):
        item = _picture(feature, merge)
        start = int(feature.mm_position.offset)
        if item is None or start < end:
            return None
        if start > end:
            segments.append(Segment(Modality.TEXT, end, start))
        end = start + item.length
        keys[start:end] = media_keys(item.digest, item.length)
        segments.append(Segment(item.modality, start, end, item.content_hash, item.label))
        items.append(item)
    if end < len(ids):
        segments.append(Segment(Modality.TEXT, end, len(ids)))
    return SegmentStream(ids, keys, tuple(segments), tuple(items), mrope_positions(segments, items))


def _picture(feature: Any, merge: int) -> MediaItem | None:
    if feature.modality != "image" or feature.data is None:
        return None
    # Missing if only the workers have the data (a cache in shared memory).
    grid = feature.data.get("image_grid_thw")
    if grid is None or grid.data is None:
        return None
    frames, height, width = (int(n) for n in grid.data)
    rows, columns = height // merge, width // merge
    place = feature.mm_position
    taken = place.get_num_embeds()
    if frames != 1 or taken < 1 or not rows * columns == place.length == taken:
        return None
    return MediaItem(
        Modality.IMAGE,
        # The grid too: an identifier may be the sender's own, and a picture that is laid out
        # otherwise is another one.
        text_identity(f"{feature.identifier}\0{rows}x{columns}"),
        place.length,
        (rows, columns),
        f"{columns}x{rows} tokens",
        dict,
    )
