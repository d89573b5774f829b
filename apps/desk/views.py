"""What the desk shows of a request, as HTML. Every word of a customer or a model is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from kvshare_mm.apps.desk.session import Cost, Turn
from kvshare_mm.apps.token_view import token_view
from kvshare_mm.config import Reuse
from kvshare_mm.outputs import Provenance, RequestOutput

_KINDS = {
    "exact": "identical beginning",
    "reused": "from a similar request",
    "recomputed": "computed now",
}
METHODS: dict[Reuse, str] = {
    "off": "full recompute",
    "exact": "prefix caching",
    "similar": "KVShare",
}


@dataclass(frozen=True, slots=True)
class Alike:
    """A picture that was sent before and looks like the one of a letter.

    Attributes:
        number: of the request that brought it.
        similarity: cosine, -1 to 1; 1: the same.
        url: of the picture; None: it is no longer here.
    """

    number: int
    similarity: float
    url: str | None = None


def answer(turn: Turn | None, waiting: bool = False) -> str:
    """The answer so far."""
    if turn is None:
        text = "thinking ..." if waiting else "Ask something."
        return f'<div class="desk-answer desk-quiet" aria-live="polite">{text}</div>'
    caret = "" if turn.output is not None else '<span class="desk-caret"></span>'
    number = f'<span class="desk-number">#{turn.number}</span>'
    text = escape(turn.text.strip())
    return f'<div class="desk-answer" aria-live="polite">{number}{text}{caret}</div>'


def problem(message: str) -> str:
    """Why there is no answer."""
    return f'<div class="desk-answer desk-problem" role="alert">{escape(message)}</div>'


def about(paragraphs: Sequence[str]) -> str:
    """Who answers, and what it cannot know."""
    head, *more = (escape(text) for text in paragraphs)
    rest = "".join(f"<p>{text}</p>" for text in more)
    return f'<details class="desk-about"><summary>{head}</summary>{rest}</details>'


def report(turn: Turn | None, tokenizer: Any, alike: Sequence[Alike] = ()) -> str:
    """What a request and the other methods cost, donors, pictures alike and the coloured prompt.

    Args:
        tokenizer: of the model; None: it is not here, and the prompt is not shown.
    """
    if turn is None or turn.output is None:
        return ""
    output = turn.output
    return (
        f"{_times(turn)}{_costs(turn)}{_bar(output.provenance)}"
        f"{_origin(turn, output.provenance)}{_alike(alike)}"
        + ("" if tokenizer is None else _prompt(output, tokenizer))
    )


def check(turn: Turn | None, waiting: bool = False) -> str:
    """Whether a request's answer is the one without any reuse."""
    if waiting:
        return '<p class="desk-check desk-quiet" role="status">computing it without reuse ...</p>'
    if turn is None or turn.alone is None:
        return ""
    here, alone = turn.text.strip(), turn.alone.strip()
    if here == alone:
        return (
            '<p class="desk-check" role="status"><b class="desk-same">✓ same answer as without '
            f"reuse</b> #{turn.number}</p>"
        )
    shorter = min(len(here), len(alone))
    same = next((i for i in range(shorter) if here[i] != alone[i]), shorter)
    at = here.rfind(" ", 0, same) + 1  # where the word begins that differs
    rows = "".join(
        f"<br><b>{who}:</b> {escape(text[:at])}<mark>{escape(text[at:]) or '(it ends)'}</mark>"
        for who, text in ((METHODS[turn.reuse], here), ("without reuse", alone))
    )
    return (
        '<p class="desk-check" role="status"><b class="desk-other">≠ another answer than without '
        f"reuse</b> #{turn.number}, from word {len(here[:at].split()) + 1} on{rows}</p>"
    )


def log(turns: list[Turn]) -> str:
    """All requests so far, the newest first."""
    rows = "".join(
        f"<tr><td>#{t.number}</td><td>{escape(t.customer)}</td>"
        f"<td>{t.output.provenance.exact}</td><td>{t.output.provenance.reused}</td>"
        f"<td>{t.output.provenance.recomputed}</td><td>{_ms(Cost.of(t.output))}</td>"
        f"<td>{_ms(t.prefix)}</td><td>{_ms(t.full)}</td></tr>"
        for t in reversed(turns)
        if t.output is not None
    )
    if not rows:
        return ""
    counts = ("#", "customer", "exact", "reused", "computed", "here", "prefix", "in full")
    head = "".join(f'<th scope="col">{name}</th>' for name in counts)
    return scrolling(
        "All requests",
        '<table class="desk-log"><caption>Prompt tokens, and milliseconds to the first token here, '
        f"with prefix caching and in full.</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table>",
    )


def scrolling(name: str, html: str) -> str:
    """What may be wider than the page: it scrolls, with the keyboard too."""
    return (
        '<div class="desk-wide"><div class="desk-scroll" role="region" tabindex="0" '
        f'aria-label="{escape(name)}">{html}</div></div>'
    )


def legend() -> str:
    """What the colours mean."""
    items = "".join(
        f'<span><i class="desk-{kind}"></i>{kind}: {words}</span>' for kind, words in _KINDS.items()
    )
    return f'<div class="desk-legend">{items}</div>'


def _times(turn: Turn) -> str:
    assert turn.output is not None
    own = Cost.of(turn.output)
    if not turn.output.provenance.exact + turn.output.provenance.reused:
        beside = "everything was computed"
    elif turn.full is None:
        beside = "not measured in full" if turn.measured else "in full: being measured ..."
    else:
        others = {"in full": turn.full, "with prefix caching": turn.prefix}
        beside = ", ".join(
            f"{_ms(cost)} ms {how}{_longer(cost, own)}"
            for how, cost in others.items()
            if cost is not None and METHODS[turn.reuse] not in how
        )
    return (
        f'<div class="desk-times"><b>{_ms(own)} ms</b> to the first token<span>{beside}</span>'
        "</div>"
    )


def _longer(cost: Cost, own: Cost) -> str:
    times = cost.seconds / own.seconds
    return f" ({times:.1f}x)" if times > 1.1 else ""


def _costs(turn: Turn) -> str:
    """Every method with the tokens that it computes and its first token's time."""
    assert turn.output is not None
    own = Cost.of(turn.output)
    costs: dict[str, Cost | None] = {METHODS["off"]: turn.full, METHODS["exact"]: turn.prefix}
    costs[METHODS[turn.reuse]] = own
    whole = len(turn.output.prompt_token_ids)
    rows = "".join(
        f'<tr><th scope="row">{name}</th>{_cost(cost, whole, turn.measured)}</tr>'
        for name, cost in costs.items()
    )
    state = "" if turn.measured else " desk-pending"
    return (
        f'<table class="desk-costs{state}"><thead><tr><td></td><th scope="col" colspan="2">tokens '
        f'computed</th><th scope="col">first token</th></tr></thead><tbody>{rows}</tbody></table>'
    )


def _cost(cost: Cost | None, whole: int, measured: bool) -> str:
    if cost is None:
        return f'<td colspan="3">{"not measured" if measured else "being measured ..."}</td>'
    share = 100 * cost.computed / max(1, whole)
    return (
        f'<td aria-hidden="true"><i style="width:{share:.1f}%"></i></td><td>{cost.computed}</td>'
        f"<td>{_ms(cost)} ms</td>"
    )


def _bar(p: Provenance) -> str:
    total = p.exact + p.reused + p.recomputed
    counts = {"exact": p.exact, "reused": p.reused, "recomputed": p.recomputed}
    parts = "".join(
        f'<div class="desk-{kind}" style="flex-grow:{n}" title="{n} {kind}">{n}</div>'
        for kind, n in counts.items()
        if n
    )
    said = ", ".join(f"{n} {kind}" for kind, n in counts.items())
    return f'<div class="desk-bar" role="img" aria-label="{said} of {total} tokens">{parts}</div>'


def _origin(turn: Turn, p: Provenance) -> str:
    if p.fallback:
        return (
            f"<p>Reuse was given up ({escape(p.fallback.replace('_', ' '))}); computed in full.</p>"
        )
    if not turn.donors and p.exact + p.reused:
        return "<p>Reused from earlier requests; the endpoint does not tell which.</p>"
    if not turn.donors:
        reason = (p.declined or "nothing to reuse").replace("_", " ")
        return f"<p>Nothing was reused: {escape(reason)}.</p>"
    names = []
    for number, media in turn.donors:
        name = f"request #{number}" if number else "an earlier request"
        names.append(f"{name} ({media})" if media else name)
    return (
        f"<p>Reused from {escape(' and '.join(names))}; {p.similarity:.0%} of the prompt was found "
        "there.</p>"
    )


def _alike(alike: Sequence[Alike]) -> str:
    if not alike:
        return ""
    shown = "".join(
        "<li>"
        + (f'<img src="{escape(one.url)}" alt="">' if one.url else "")
        + f"#{one.number}: {_how_alike(one.similarity)}</li>"
        for one in alike
    )
    return (
        '<div class="desk-alike"><p>Pictures most like this one, by CLIP; reuse needs exactly the '
        f"same.</p><ul>{shown}</ul></div>"
    )


def _how_alike(similarity: float) -> str:
    return "the same" if similarity > 1 - 1e-4 else f"cosine {similarity:.2f}"


def _prompt(output: RequestOutput, tokenizer: Any) -> str:
    return (
        '<details class="desk-prompt"><summary>The prompt, '
        f'{len(output.prompt_token_ids)} tokens</summary><p tabindex="0" role="region" '
        f'aria-label="The prompt">{_tokens(output, tokenizer)}</p></details>'
    )


def _tokens(output: RequestOutput, tokenizer: Any) -> str:
    text = token_view(tokenizer, output.prompt_token_ids, output.provenance)
    styles = _style_names()
    return "".join(
        f'<mark class="desk-{styles[str(span.style)]}">'
        f"{escape(text.plain[span.start : span.end])}</mark>"
        for span in text.spans
    ).replace("\n", "<br>")


def _style_names() -> dict[str, str]:
    from kvshare_mm.apps.token_view import STYLES

    return {style: kind for kind, style in STYLES.items()}


def _ms(cost: Cost | None) -> str:
    return "..." if cost is None else f"{1000 * cost.seconds:.0f}"
