"""The page: two customers side by side, and under them what their requests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from kvshare_mm.apps.desk import tree_svg, views
from kvshare_mm.apps.desk.events import MODES, Desk
from kvshare_mm.apps.desk.parts import Photo, Voice
from kvshare_mm.apps.desk.session import Session
from kvshare_mm.apps.desk.shop import CUSTOMERS, MAX_NAME, MAX_ORDER, MAX_QUESTION, TEXT_EXAMPLES

# What is known of a request besides its answer: whether it is the same without reuse.
_TOLD = ("check", "number", "compare")
STYLE = Path(__file__).with_name("style.css")
_LOGOUT = '<form class="desk-logout" method="post" action="logout"><button>Log out</button></form>'


def build(desk: Desk, logout: bool = False) -> gr.Blocks:
    """The page.

    Args:
        desk: what answers its events.
        logout: whether visitors have logged in, and can log out.
    """
    with gr.Blocks(title="KVShare desk", analytics_enabled=False) as page:
        session = gr.State(Session)
        gr.HTML(
            '<div class="desk-title"><h1>Customer service, with shared KV cache</h1><p>Two '
            "customers write to the same shop. Let one ask, then the other: what their requests "
            f"have in common is computed once.</p>{_LOGOUT if logout else ''}</div>"
        )
        about = gr.HTML(views.about(("The model is loading ...",)), elem_id="desk-about")
        with gr.Row(equal_height=False, elem_classes="desk-controls"):
            mode = gr.Radio(
                list(MODES), value="KVShare", label="Reuse", scale=4, elem_id="desk-mode"
            )
            restart = gr.Button(
                "Start over", scale=0, min_width=120, size="md", elem_id="desk-restart"
            )
        gr.HTML(views.legend())
        with gr.Row():
            columns = [_column(i, name, order) for i, (name, order) in enumerate(CUSTOMERS)]
        with gr.Accordion("DELTA tree of stored requests", open=False):
            tree = gr.HTML(tree_svg.draw([]), elem_id="desk-tree")
        with gr.Accordion("All requests", open=True):
            log = gr.HTML("", elem_id="desk-log")

        for column in columns:
            told = [column[part] for part in _TOLD]
            outputs = [column["answer"], column["report"], tree, log, *told]
            inputs = [
                session,
                mode,
                *(column[k] for k in ("name", "order", "question", "photo", "voice")),
            ]
            for trigger in (column["send"].click, column["question"].submit):
                trigger(
                    desk.ask, inputs, outputs, concurrency_limit=None, show_progress="hidden",
                    api_visibility="private",
                )  # fmt: skip
            column["compare"].click(
                desk.compare, [session, column["number"]], [column["check"], column["compare"]],
                concurrency_limit=None, show_progress="hidden", api_visibility="private",
            )  # fmt: skip
            for number, button in enumerate(column["examples"]):
                fill = button.click(
                    desk.filled(number),
                    None,
                    [column["question"], column["photo"], column["voice"]],
                    show_progress="hidden",
                    api_visibility="private",
                )
                fill.then(
                    desk.ask, inputs, outputs, concurrency_limit=None, show_progress="hidden",
                    api_visibility="private",
                )  # fmt: skip
        fitted = [about]
        for column in columns:
            fitted += [column["photo"], column["voice"], *column["examples"]]
        page.load(
            desk.fitted, None, fitted, concurrency_limit=None,
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        shown = [column[part] for column in columns for part in ("answer", "report", *_TOLD)]
        restart.click(
            desk.restarted, session, [session, *shown, tree, log],
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip
    return page


def _column(index: int, name: str, order: str) -> dict[str, Any]:
    made: dict[str, Any] = {}
    with gr.Column(min_width=320, elem_id=f"desk-customer-{index + 1}"):
        with gr.Row():
            made["name"] = gr.Textbox(name, label="Customer", min_width=100, max_length=MAX_NAME)
            made["order"] = gr.Textbox(
                order, label="Order number", min_width=100, max_length=MAX_ORDER
            )
        made["photo"] = Photo(
            type="filepath", label="Product photo", height=150, visible=False,
            sources=["upload"], elem_classes="desk-photo",
        )  # fmt: skip
        made["voice"] = Voice(
            type="filepath", label="Voice message", visible=False,
            sources=["upload", "microphone"],
        )  # fmt: skip
        made["question"] = gr.Textbox(
            label="Question", lines=2, max_lines=4, max_length=MAX_QUESTION, submit_btn=False,
            placeholder="What would you like to know?",
        )  # fmt: skip
        made["send"] = gr.Button("Ask", variant="primary")
        with gr.Row(elem_classes="desk-examples"):
            made["examples"] = [
                gr.Button(example.label, size="sm", variant="secondary", interactive=False)
                for example in TEXT_EXAMPLES
            ]
        made["answer"] = gr.HTML(views.answer(None))
        with gr.Row(elem_classes="desk-compare"):
            made["compare"] = gr.Button(
                "Same without reuse?", size="sm", interactive=False, scale=0, min_width=170,
                elem_classes="desk-check-button",
            )  # fmt: skip
            made["check"] = gr.HTML("", min_width=220)
        made["number"] = gr.State()
        made["report"] = gr.HTML("")
    return made
