"""A prompt with every token coloured by where its KV came from."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from kvshare_mm.outputs import Provenance

STYLES = {
    "exact": "black on green3",
    "reused": "black on sky_blue1",
    "recomputed": "black on gold1",
}


def token_view(tokenizer: Any, token_ids: tuple[int, ...], provenance: Provenance) -> Text:
    """The prompt's text, a colour a span; characters split over a border go to the later span."""
    text = Text()
    shown = 0
    for span in provenance.spans:
        upto = tokenizer.decode(token_ids[: span.end])
        text.append(upto[shown:], STYLES[span.kind])
        shown = len(upto)
    return text


def legend() -> Text:
    """What the colours mean."""
    text = Text()
    for kind, meaning in (
        ("exact", "identical beginning, reused"),
        ("reused", "similar request's KV, moved and reused"),
        ("recomputed", "computed for this request"),
    ):
        text.append(f" {kind} ", STYLES[kind])
        text.append(f" {meaning}   ")
    return text
