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
    """The prompt's text, a colour a span; characters split over a border go to the later span.

    A picture or clip is shown by its size, and by dots for each further span inside it.
    """
    text = Text()
    media = {use.start: use for use in provenance.media}
    ends = {at for use in provenance.media for at in (use.start, use.end)}
    begin = shown = 0  # what was decoded last begins here, and so much of it was shown
    for span in provenance.spans:
        at = span.start
        for end in sorted({e for e in ends if span.start < e < span.end} | {span.end}):
            style = STYLES[span.kind]
            inside = next((u for u in provenance.media if u.start <= at < u.end), None)
            if inside is not None:
                if at in media:
                    text.append(f"[{inside.modality}: {inside.label}]", style)
                elif at < end:
                    text.append("[...]", style)
                begin, shown = end, 0
            else:
                upto = tokenizer.decode(token_ids[begin:end])
                text.append(upto[shown:], style)
                shown = len(upto)
            at = end
    return text


def legend() -> Text:
    """What the colours mean, in one line of 80 columns."""
    meanings = {
        "exact": "identical beginning",
        "reused": "similar, moved",
        "recomputed": "computed now",
    }
    return Text("  ").join(
        Text.assemble((f" {kind} ", STYLES[kind]), f" {meaning}")
        for kind, meaning in meanings.items()
    )
