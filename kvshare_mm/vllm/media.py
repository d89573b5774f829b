"""A request with media as one stream: what stands at vLLM's placeholders, and where it is.

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

# Of models without M-RoPE: media take positions one behind the other, whatever they are.
IN_A_ROW = 0
# A video is pictures, one behind the other.
_MODALITIES = {"image": Modality.IMAGE, "video": Modality.IMAGE, "audio": Modality.AUDIO}


def request_stream(
    token_ids: Sequence[int], features: Sequence[Any], merge: int | None
) -> SegmentStream | None:
    """The stream of a prompt as vLLM's scheduler has it.

    Args:
        token_ids: the prompt, as many placeholders in it as its media take.
        features: vLLM's ``MultiModalFeatureSpec`` of each medium.
        merge: patches of a picture, along each side, that become one position of a row and a
            column; `IN_A_ROW`; None: this model's media are not known here.

    Returns:
        None if something in it is not known, or has a place that is not.
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
        placed = _picture(feature, merge) if merge else _in_a_row(feature, ids)
        if placed is None or placed[0] < end:
            return None
        start, item = placed
        if start > end:
            segments.append(Segment(Modality.TEXT, end, start))
        end = start + item.length
        keys[start:end] = media_keys(item.digest, item.length)
        segments.append(Segment(item.modality, start, end, item.content_hash, item.label))
        items.append(item)
    if end < len(ids):
        segments.append(Segment(Modality.TEXT, end, len(ids)))
    positions = mrope_positions(segments, items) if merge else None
    return SegmentStream(ids, keys, tuple(segments), tuple(items), positions)


def _in_a_row(feature: Any, ids: np.ndarray) -> tuple[int, MediaItem] | None:
    modality, place = _MODALITIES.get(feature.modality), feature.mm_position
    if modality is None or place.get_num_embeds() < 1:
        return None
    # vLLM counts tokens around it to its place, which are text.
    runs = place.extract_embeds_range()
    start, end = int(runs[0][0]), int(runs[-1][1]) + 1
    # What stands in between too (ends of rows, times of frames): an identifier may be the sender's.
    digest = text_identity(f"{ids[start:end].tolist()}\0{feature.identifier}")
    return start, MediaItem(modality, digest, end - start, None, f"{end - start} tokens", dict)


def _picture(feature: Any, merge: int) -> tuple[int, MediaItem] | None:
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
    return int(place.offset), MediaItem(
        Modality.IMAGE,
        # The grid too: an identifier may be the sender's own, and a picture that is laid out
        # otherwise is another one.
        text_identity(f"{feature.identifier}\0{rows}x{columns}"),
        place.length,
        (rows, columns),
        f"{columns}x{rows} tokens",
        dict,
    )
