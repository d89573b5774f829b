"""What the desk shows of a request, as HTML. Every word of a customer or a model is escaped."""

from __future__ import annotations

from html import escape
from typing import Any

from kvshare_mm.apps.desk.session import Turn
from kvshare_mm.apps.token_view import token_view
from kvshare_mm.outputs import Provenance, RequestOutput

_KINDS = {
    "exact": "identical beginning",
    "reused": "from a similar request",
    "recomputed": "computed now",
}


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


def report(turn: Turn | None, tokenizer: Any) -> str:
    """First-token time, the bar, donors and the coloured prompt of a request."""
    if turn is None or turn.output is None:
        return ""
    output = turn.output
    return (
        f"{_times(turn, output)}{_bar(output.provenance)}{_origin(turn, output.provenance)}"
        f'<details class="desk-prompt" open><summary>The prompt, {len(output.prompt_token_ids)} '
        f"tokens</summary><p>{_tokens(output, tokenizer)}</p></details>"
    )


def log(turns: list[Turn]) -> str:
    """All requests so far, the newest first."""
    rows = "".join(
        f"<tr><td>#{t.number}</td><td>{escape(t.customer)}</td>"
        f"<td>{t.output.provenance.exact}</td><td>{t.output.provenance.reused}</td>"
        f"<td>{t.output.provenance.recomputed}</td><td>{_ms(_first(t.output))}</td>"
        f"<td>{_full(t)}</td></tr>"
        for t in reversed(turns)
        if t.output is not None
    )
    heads = ("request", "customer", "exact", "reused", "computed", "first token", "in full")
    head = "".join(f"<th>{h}</th>" for h in heads)
    return (
        '<div class="desk-wide"><div class="desk-scroll"><table class="desk-log"><thead><tr>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div></div>"
        if rows
        else ""
    )


def legend() -> str:
    """What the colours mean."""
    items = "".join(
        f'<span><i class="desk-{kind}"></i>{kind}: {words}</span>' for kind, words in _KINDS.items()
    )
    return f'<div class="desk-legend">{items}</div>'


def _times(turn: Turn, output: RequestOutput) -> str:
    first = _first(output)
    if not output.provenance.exact + output.provenance.reused:
        beside = "everything was computed"
    elif turn.full_s is None:
        beside = "computing everything: being measured ..."
    else:
        beside = f"computing everything: {_ms(turn.full_s)}"
        if turn.full_s > 1.1 * first:
            beside += f", {turn.full_s / first:.1f} times as long"
    return (
        f'<div class="desk-times"><b>{_ms(first)}</b> to the first token<span>{beside}</span></div>'
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


def _full(turn: Turn) -> str:
    if turn.full_s is not None:
        return _ms(turn.full_s)
    assert turn.output is not None
    p = turn.output.provenance
    return "..." if p.exact + p.reused else _ms(_first(turn.output))


def _first(output: RequestOutput) -> float:
    """Without the wait for a slot, which another customer may have caused."""
    return output.metrics.ttft - output.metrics.queue


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"
