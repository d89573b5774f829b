"""What happens when a visitor clicks."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from kvshare_mm.apps.desk import tree_svg, views
from kvshare_mm.apps.desk.about import about
from kvshare_mm.apps.desk.door import FILE
from kvshare_mm.apps.desk.engine import Engine
from kvshare_mm.apps.desk.limits import DeskLimits
from kvshare_mm.apps.desk.parts import shown
from kvshare_mm.apps.desk.session import MAX_TOKENS, Session, Terms, Turn
from kvshare_mm.apps.desk.shop import (
    CUSTOMERS,
    PHOTO_EXAMPLES,
    TEXT_EXAMPLES,
    Asked,
    Example,
    Letter,
)
from kvshare_mm.apps.desk.uploads import Uploads
from kvshare_mm.apps.desk.visitors import Visitor, Visitors
from kvshare_mm.apps.server.errors import ApiError
from kvshare_mm.apps.server.limits import Bill
from kvshare_mm.apps.server.service import Service
from kvshare_mm.config import Reuse
from kvshare_mm.errors import InvalidRequestError, KVShareError
from kvshare_mm.outputs import RequestOutput
from kvshare_mm.request import RequestSpec
from kvshare_mm.stream import Modality

PICTURES = Path(__file__).with_name("pictures")
MODES: dict[str, Reuse] = {"off": "off", "exact prefix": "exact", "KVShare": "similar"}
NO_TREE = (
    '<p class="desk-quiet">The stored requests are the endpoint\'s, which keeps their tree.</p>'
)
_LOADING_POLL_S = 0.5
_MOST_ALIKE = 3


class Desk:
    """Answers the page's events, each for the session whose page sent it.

    Args:
        service: what answers.
        visitors: sessions.
        uploads: their files.
        limits: of the desk.
        path: where it is mounted.
    """

    def __init__(
        self,
        service: Service,
        visitors: Visitors,
        uploads: Uploads,
        limits: DeskLimits,
        path: str,
    ) -> None:
        self._service = service
        self._visitors = visitors
        self._uploads = uploads
        self._limits = limits
        self._path = path

    async def ask(
        self,
        session: Session,
        mode: str,
        name: str | None,
        order: str | None,
        question: str | None,
        photo: str | None,
        voice: str | None,
        request: gr.Request,
    ) -> AsyncGenerator[tuple[Any, ...]]:
        """Answer a letter. Yields its number too, once it has one, for `compare`."""
        name, order, question = ((text or "").strip() for text in (name, order, question))
        if not question and voice is None:
            yield _problem("Please write a question.")
            return
        yield views.answer(None, waiting=True), "", gr.skip(), gr.skip(), "", None, _check(False)
        asked = Asked(name or "Anna", order or "0", question, photo, voice)
        try:
            llm = self._service.llm
            visitor = self._visitors.of_page(request.session_hash)
            letter = self._letter(visitor, asked)
            with self._charged(visitor) as terms:
                turns = session.ask(llm, letter, MODES[mode], terms)
                async with aclosing(turns):
                    async for turn in turns:
                        self._visitors.of_page(request.session_hash)  # a key may end meanwhile
                        session.letters[turn.number] = asked
                        alike = await self._alike(visitor, session, turn, llm, terms)
                        yield _shown(turn, session, llm, alike)
        except (KVShareError, ApiError) as error:
            yield _problem(str(error))

    async def compare(
        self, session: Session, number: int | None, request: gr.Request
    ) -> AsyncGenerator[tuple[Any, ...]]:
        """Answer the letter of a request again, without reuse, and say whether that is the same."""
        turn = next((t for t in session.turns if t.number == number), None)
        if turn is None or turn.output is None:
            yield views.problem("Please ask something first."), gr.skip()
            return
        yield views.check(None, waiting=True), _check(False)
        try:
            llm = self._service.llm
            visitor = self._visitors.of_page(request.session_hash)
            letter = self._letter(visitor, session.letters[turn.number])
            if turn.alone is None:
                with self._charged(visitor) as terms:
                    await session.compare(llm, letter, turn, terms)
            yield views.check(turn), _check(True)
        except (KVShareError, ApiError) as error:
            yield views.problem(str(error)), _check(True)

    @contextmanager
    def _charged(self, visitor: Visitor) -> Iterator[Terms]:
        """Around a question or a comparison, which counts as a request of its visitor's key.

        Raises:
            ApiError: 429, the key may use no more now.
            InvalidRequestError: too many of the visitor's are being answered.
        """
        if visitor.questions >= self._limits.questions:
            raise InvalidRequestError("please wait for the answers to your other questions")
        service, caller = self._service, visitor.caller
        meter = service.meters.of(caller.key, caller.limits)
        read_tokens = answered = 0

        async def read(make: Callable[..., RequestSpec], prompt: Any, *more: Any) -> RequestSpec:
            nonlocal read_tokens
            line = service.lines.of(prompt)
            spec: RequestSpec = await line.run(caller.tenant, make, prompt, *more)
            bill.read(read_tokens + len(spec.stream))
            read_tokens += len(spec.stream)
            return spec

        def finished(output: RequestOutput) -> None:
            nonlocal answered
            answered += len(output.token_ids)
            bill.answered(answered)
            service.finished(output, f"desk-{uuid.uuid4().hex}", {})

        if meter is not None:
            meter.begin()
        visitor.questions += 1
        bill = Bill()
        try:
            if meter is not None:
                bill = meter.reserve(0, MAX_TOKENS)
            yield Terms(caller.tenant, read, finished)
        except BaseException:
            # Of an answer that was given up nobody has counted the tokens.
            bill.answered(max(answered, MAX_TOKENS))
            raise
        finally:
            bill.settle()
            visitor.questions -= 1
            if meter is not None:
                meter.end()

    async def _alike(
        self, visitor: Visitor, session: Session, turn: Turn, llm: Engine, terms: Terms
    ) -> list[views.Alike]:
        """Pictures of this session that look like a request's, once everything else is known."""
        photo = session.letters[turn.number].photo
        if not turn.measured or photo is None:
            return []
        try:
            part = {"type": "image", "image": self._file(visitor, photo)}
            line = self._service.lines.media
            found = await line.run(
                terms.tenant, llm.similar_media, part, _MOST_ALIKE + 1, session.salt
            )
        except (KVShareError, ApiError):
            return []  # no embedder, or others wait: nothing depends on it
        alike = []
        for medium in found:
            number = session.first_with(medium.content_hash)
            token = session.letters[number].photo if number else None
            if number is None or token is None or number == turn.number:
                continue
            here = self._uploads.get(visitor.name, token) is not None
            url = f"{self._path}{FILE}{token}" if here else None
            alike.append(views.Alike(number, medium.similarity, url))
        return alike[:_MOST_ALIKE]

    def _letter(self, visitor: Visitor, asked: Asked) -> Letter:
        """Raises InvalidRequestError: it is too long, or its files are here no longer."""
        files = (self._file(visitor, asked.photo), self._file(visitor, asked.voice))
        return Letter(asked.name, asked.order, asked.question, *files)

    def _file(self, visitor: Visitor, token: str | None) -> bytes | None:
        if token is None:
            return None
        upload = self._uploads.get(visitor.name, token)
        if upload is None:
            raise InvalidRequestError("the file was sent too long ago; please choose it again")
        return upload.content

    def filled(self, number: int) -> Callable[[gr.Request], tuple[Any, ...]]:
        """What fills in an example: its question, its photo, no voice."""

        def fill(request: gr.Request) -> tuple[Any, ...]:
            visitor = self._visitors.of_page(request.session_hash)
            try:
                example = _examples(self._service.llm)[number]
            except (KVShareError, ApiError):
                example = TEXT_EXAMPLES[number]
            if example.photo is None:
                return example.question, None, None
            content = (PICTURES / example.photo).read_bytes()
            tenant = visitor.caller.tenant
            token = self._uploads.keep(visitor.name, content, "image/png", tenant)
            return example.question, shown(self._path, token, example.photo, "image/png"), None

        return fill

    async def fitted(self) -> list[Any]:
        """The parts of the page that depend on the model, once it is there."""
        while True:
            try:
                llm = self._service.llm
            except (KVShareError, ApiError):
                await asyncio.sleep(_LOADING_POLL_S)
            else:
                break
        # One update a component: Gradio changes those it has sent.
        return [
            views.about(about(llm)),
            *(
                update
                for _ in CUSTOMERS
                for update in (
                    gr.update(visible=Modality.IMAGE in llm.modalities),
                    gr.update(visible=Modality.AUDIO in llm.modalities),
                    *(
                        gr.update(value=example.label, interactive=True)
                        for example in _examples(llm)
                    ),
                )
            ),
        ]

    def restarted(self, session: Session, request: gr.Request) -> tuple[Any, ...]:
        """A page as it was, with nothing stored."""
        self._visitors.of_page(request.session_hash)
        session.close(self._service.llm)
        column = views.answer(None), "", "", None, _check(False)
        return Session(), *column, *column, tree_svg.draw([]), ""


def _problem(message: str) -> tuple[Any, ...]:
    return views.problem(message), "", gr.skip(), gr.skip(), "", None, _check(False)


def _check(possible: bool) -> dict[str, Any]:
    """Whether the button that compares can be pressed."""
    button: dict[str, Any] = gr.update(interactive=possible)
    return button


def _shown(
    turn: Turn, session: Session, llm: Engine, alike: Sequence[views.Alike]
) -> tuple[Any, ...]:
    if turn.output is None:
        return views.answer(turn), *(gr.skip() for _ in range(6))
    return (
        views.answer(turn),
        views.report(turn, llm.tokenizer, alike),
        tree_svg.draw(session.donors(llm)) if llm.has_cache else NO_TREE,
        views.log(session.turns),
        gr.skip(),
        turn.number,
        _check(True),
    )


def _examples(llm: Engine) -> tuple[Example, ...]:
    return PHOTO_EXAMPLES if Modality.IMAGE in llm.modalities else TEXT_EXAMPLES
