"""The page: two customers side by side, and under them what their requests share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from kvshare_mm.apps.desk import tree_svg, views
from kvshare_mm.apps.desk.session import Session
from kvshare_mm.apps.desk.shop import CUSTOMERS, PHOTO_EXAMPLES, TEXT_EXAMPLES, Example, Letter
from kvshare_mm.engine.prefill import Sharing
from kvshare_mm.errors import KVShareError
from kvshare_mm.llm import KVShare
from kvshare_mm.stream import Modality

STYLE = Path(__file__).with_name("style.css")
PICTURES = Path(__file__).with_name("pictures")
_LOADING_POLL_S = 0.5
_MODES: dict[str, Sharing] = {"off": "off", "exact prefix": "exact", "KVShare": "on"}


def build(get_llm: Callable[[], KVShare]) -> gr.Blocks:
    """The page.

    Args:
        get_llm: the engine; raises KVShareError while it is loading.
    """
    with gr.Blocks(title="KVShare desk", analytics_enabled=False) as page:
        session = gr.State(Session)
        gr.HTML(
            '<div class="desk-title"><h1>Customer service, with shared KV cache</h1><p>Two '
            "customers write to the same shop. Let one ask, then the other: what their requests "
            "have in common is computed once.</p></div>"
        )
        with gr.Row(equal_height=False):
            mode = gr.Radio(
                list(_MODES), value="KVShare", label="Sharing", scale=4, elem_id="desk-mode"
            )
            restart = gr.Button(
                "Start over", scale=1, min_width=120, size="md", elem_id="desk-restart"
            )
        gr.HTML(views.legend())
        with gr.Row():
            columns = [_column(i, name, order) for i, (name, order) in enumerate(CUSTOMERS)]
        with gr.Accordion("DELTA tree of the stored requests", open=True):
            tree = gr.HTML(tree_svg.draw([]), elem_id="desk-tree")
        with gr.Accordion("All requests", open=True):
            log = gr.HTML("", elem_id="desk-log")

        for column in columns:
            outputs = [column["answer"], column["report"], tree, log]
            inputs = [
                session,
                mode,
                *(column[k] for k in ("name", "order", "question", "photo", "voice")),
            ]
            ask = partial(_ask, get_llm)
            for trigger in (column["send"].click, column["question"].submit):
                trigger(
                    ask, inputs, outputs, concurrency_limit=None, show_progress="hidden",
                    api_visibility="private",
                )  # fmt: skip
            for number, button in enumerate(column["examples"]):
                fill = button.click(
                    partial(_filled, get_llm, number),
                    None,
                    [column["question"], column["photo"], column["voice"]],
                    show_progress="hidden",
                    api_visibility="private",
                )
                fill.then(
                    ask, inputs, outputs, concurrency_limit=None, show_progress="hidden",
                    api_visibility="private",
                )  # fmt: skip
        fitted = [
            part
            for column in columns
            for part in (column["photo"], column["voice"], *column["examples"])
        ]
        page.load(
            partial(_fitted, get_llm), None, fitted, concurrency_limit=None,
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        shown = [part for column in columns for part in (column["answer"], column["report"])]
        restart.click(
            partial(_restarted, get_llm), session, [session, *shown, tree, log],
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip
    return page


def _column(index: int, name: str, order: str) -> dict[str, Any]:
    made: dict[str, Any] = {}
    with gr.Column(min_width=320, elem_id=f"desk-customer-{index + 1}"):
        with gr.Row():
            made["name"] = gr.Textbox(name, label="Customer", min_width=100, max_length=40)
            made["order"] = gr.Textbox(order, label="Order number", min_width=100, max_length=20)
        made["photo"] = gr.Image(
            type="filepath", label="Product photo", height=210, visible=False,
            sources=["upload", "clipboard"], elem_classes="desk-photo",
        )  # fmt: skip
        made["voice"] = gr.Audio(
            type="filepath", label="Voice message", visible=False,
            sources=["upload", "microphone"],
        )  # fmt: skip
        made["question"] = gr.Textbox(
            label="Question", lines=2, max_lines=4, max_length=1000, submit_btn=False,
            placeholder="What would you like to know?",
        )  # fmt: skip
        made["send"] = gr.Button("Ask", variant="primary")
        with gr.Row(elem_classes="desk-examples"):
            made["examples"] = [
                gr.Button(example.label, size="sm", variant="secondary", interactive=False)
                for example in TEXT_EXAMPLES
            ]
        made["answer"] = gr.HTML(views.answer(None))
        made["report"] = gr.HTML("")
    return made


async def _ask(
    get_llm: Callable[[], KVShare],
    session: Session,
    mode: str,
    name: str,
    order: str,
    question: str,
    photo: str | None,
    voice: str | None,
) -> AsyncIterator[tuple[Any, ...]]:
    if not question.strip() and voice is None:
        yield views.problem("Please write a question."), "", gr.skip(), gr.skip()
        return
    yield views.answer(None, waiting=True), "", gr.skip(), gr.skip()
    try:
        llm = get_llm()
        letter = Letter(
            name.strip() or "Anna",
            order.strip() or "0",
            question.strip(),
            Path(photo).read_bytes() if photo else None,
            Path(voice).read_bytes() if voice else None,
        )
        async for turn in session.ask(llm, letter, _MODES[mode]):
            if turn.output is None:
                yield views.answer(turn), gr.skip(), gr.skip(), gr.skip()
            else:
                yield (
                    views.answer(turn),
                    views.report(turn, llm.tokenizer),
                    tree_svg.draw(session.donors(llm)),
                    views.log(session.turns),
                )
    except (KVShareError, OSError) as error:
        yield views.problem(str(error)), "", gr.skip(), gr.skip()


def _examples(llm: KVShare) -> tuple[Example, ...]:
    return PHOTO_EXAMPLES if Modality.IMAGE in llm.modalities else TEXT_EXAMPLES


async def _fitted(get_llm: Callable[[], KVShare]) -> list[Any]:
    """The two columns' inputs as the model takes them, as soon as it is loaded.

    Examples can only be clicked then: before, it is not known which fit.
    """
    while True:
        try:
            llm = get_llm()
        except KVShareError:
            await asyncio.sleep(_LOADING_POLL_S)
        else:
            break
    # One update a component: Gradio changes those it has sent.
    return [
        update
        for _ in CUSTOMERS
        for update in (
            gr.update(visible=Modality.IMAGE in llm.modalities),
            gr.update(visible=Modality.AUDIO in llm.modalities),
            *(gr.update(value=example.label, interactive=True) for example in _examples(llm)),
        )
    ]


def _filled(get_llm: Callable[[], KVShare], number: int) -> tuple[Any, ...]:
    try:
        example = _examples(get_llm())[number]
    except KVShareError:
        example = TEXT_EXAMPLES[number]
    photo = str(PICTURES / example.photo) if example.photo else None
    return example.question, photo, None


def _restarted(get_llm: Callable[[], KVShare], session: Session) -> tuple[Any, ...]:
    session.close(get_llm())
    empty = views.answer(None)
    return Session(), empty, "", empty, "", tree_svg.draw([]), ""
