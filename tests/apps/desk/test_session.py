"""The desk's requests: numbers, donors, modes, media."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kvshare_mm import InvalidRequestError, KVShare
from kvshare_mm.apps.desk import events as desk_events
from kvshare_mm.apps.desk.events import Desk
from kvshare_mm.apps.desk.limits import DeskLimits
from kvshare_mm.apps.desk.page import build
from kvshare_mm.apps.desk.session import MAX_TOKENS, Cost, Session, Turn
from kvshare_mm.apps.desk.shop import PHOTO_EXAMPLES, TEXT_EXAMPLES, Letter
from kvshare_mm.apps.desk.uploads import Uploads
from kvshare_mm.apps.desk.visitors import Visitors
from kvshare_mm.apps.server import limits as limits_module
from kvshare_mm.apps.server.keys import Caller, Limits
from kvshare_mm.apps.server.limits import Meter
from kvshare_mm.apps.server.options import ServerOptions
from kvshare_mm.apps.server.service import Service
from kvshare_mm.config import RequestOptions
from kvshare_mm.errors import KVShareError
from kvshare_mm.outputs import RequestOutput

from ...helpers import Clock
from ...modalities.media import encoded

_ANNA = Letter("Anna", "48210", "How long does it take?")
_BORIS = Letter("Boris", "77345", "How long does it take?")


class Loaded(Service):
    """A service around an engine of the tests."""

    def __init__(self, get_llm: Callable[[], KVShare]) -> None:
        super().__init__(get_llm, ServerOptions("tiny"))
        self.get_llm = get_llm
        self.told: list[RequestOutput] = []

    @property
    def llm(self) -> KVShare:
        return self.get_llm()

    def finished(self, output: RequestOutput, *_: Any) -> None:
        self.told.append(output)


class Page:
    """An open page, and the desk behind it."""

    session_hash = "page"

    def __init__(self, llm: Callable[[], KVShare], caller: Caller = Caller("shop")) -> None:  # noqa: B008
        limits = DeskLimits()
        self.service = Loaded(llm)
        self.uploads = Uploads(limits)
        visitors = Visitors(limits, self.uploads, lambda _: caller)
        self.visitor = visitors.of_cookie(visitors.enter(caller, None))
        assert self.visitor is not None
        visitors.claim(self.visitor, self.session_hash)
        self.desk = Desk(self.service, visitors, self.uploads, limits, "/ui")

    def ask(self, *arguments: Any) -> list[tuple[Any, ...]]:
        async def collect() -> list[tuple[Any, ...]]:
            request: Any = self
            return [event async for event in self.desk.ask(*arguments, request)]

        return asyncio.run(collect())

    def compare(self, session: Session, number: int | None) -> list[tuple[Any, ...]]:
        async def collect() -> list[tuple[Any, ...]]:
            request: Any = self
            return [event async for event in self.desk.compare(session, number, request)]

        return asyncio.run(collect())


def ask(session: Session, llm: KVShare, letter: Letter, reuse: Any = "similar") -> list[Turn]:
    async def collect() -> list[Turn]:
        return [turn async for turn in session.ask(llm, letter, reuse)]

    return asyncio.run(collect())


@pytest.fixture(autouse=True)
def frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a key has used does not flow in again."""
    monkeypatch.setattr(limits_module, "Meter", lambda limits: Meter(limits, Clock()))


@pytest.fixture
def llm(open_llm: Callable[..., Any]) -> KVShare:
    opened: KVShare = open_llm(repair="none")
    return opened


def test_the_second_customer_is_answered_from_the_first(llm: KVShare) -> None:
    session = Session()
    first = ask(session, llm, _ANNA)[-1]
    second = ask(session, llm, _BORIS)[-1]
    assert [t.number for t in session.turns] == [1, 2]
    assert first.output is not None and second.output is not None
    assert first.output.provenance.reused == 0 and first.full == Cost.of(first.output)
    assert second.output.provenance.reused > 0
    assert second.donors == [(1, "")]
    whole = len(second.output.prompt_token_ids)
    assert second.full is not None and second.full.computed == whole
    # Prefix caching ends at the name, and never learns from what KVShare stored.
    assert second.prefix is not None and first.prefix is not None
    assert first.prefix.computed == len(first.output.prompt_token_ids)
    assert Cost.of(second.output).computed < second.prefix.computed < whole
    donors = session.donors(llm)
    assert [number for _, number in donors] == [1, 2]
    assert donors[1][0].parent == donors[0][0].donor_id
    assert second.text == second.output.text


@pytest.mark.parametrize(
    ("reuse", "exact", "reused"), [("off", False, False), ("exact", True, False)]
)
def test_the_toggle_decides(llm: KVShare, reuse: str, exact: bool, reused: bool) -> None:
    session = Session()
    ask(session, llm, _ANNA)
    turn = ask(session, llm, _BORIS, reuse)[-1]
    assert turn.output is not None
    p = turn.output.provenance
    assert (p.exact > 0, p.reused > 0) == (exact, reused)


def test_visitors_share_nothing(llm: KVShare) -> None:
    ask(Session(), llm, _ANNA)
    turn = ask(Session(), llm, _ANNA)[-1]
    assert turn.output is not None and turn.output.provenance.declined == "no_donor"


def test_both_customers_may_ask_at_once(llm: KVShare) -> None:
    session = Session()

    async def both() -> None:
        async def one(letter: Letter) -> None:
            async for _ in session.ask(llm, letter, "similar"):
                pass

        await asyncio.gather(one(_ANNA), one(_BORIS))

    asyncio.run(both())
    assert sorted(t.number for t in session.turns) == [1, 2]
    assert {number for _, number in session.donors(llm)} == {1, 2}


def test_an_answer_is_compared_with_the_one_without_reuse(llm: KVShare) -> None:
    """On demand, once, on the account of who asks, and only for requests of the own page."""
    limits = Limits(requests_per_minute=3)
    page = Page(lambda: llm, Caller("shop", key="hash", limits=limits))
    session = Session()
    *_, (_, _, _, _, badge, number, button) = page.ask(
        session, "KVShare", "Anna", "1", "Hi?", None, None
    )
    assert number == 1 and button["interactive"]
    stored = [info.donor_id for info, _ in session.donors(llm)]
    told = len(page.service.told)
    *_, (badge, _) = page.compare(session, number)
    assert "same answer as without reuse" in badge
    assert len(page.service.told) == told + 1
    assert page.service.told[-1].provenance.reused == 0
    assert [info.donor_id for info, _ in session.donors(llm)] == stored
    session.turns[0].text = session.turns[0].text[:-1] + "~ <b>"
    *_, (badge, _) = page.compare(session, number)  # known by now: it costs nothing
    assert "another answer" in badge and "&lt;b&gt;" in badge
    assert len(page.service.told) == told + 1
    for other in (None, 2):
        [(badge, _)] = page.compare(session, other)
        assert "ask something first" in badge
    for problem in (None, "3 requests a minute"):
        session.turns[0].alone = None
        *_, (badge, _) = page.compare(session, number)
        assert problem is None or problem in badge
    assert page.visitor is not None
    page.visitor.questions = DeskLimits().questions
    assert "please wait" in page.compare(session, number)[-1][0]


def test_starting_over_forgets(llm: KVShare) -> None:
    session = Session()
    ask(session, llm, _ANNA)
    page: Any = Page(lambda: llm)
    fresh, *_ = page.desk.restarted(session, page)
    assert llm.cache.list() == []
    assert fresh.turns == []


def test_pictures_are_told_apart(media_folder: Callable[[str], Path]) -> None:
    session = Session()
    with KVShare(str(media_folder("qwen2_5_vl")), embedder=None) as llm:
        for colour in ("red", "red", "blue"):
            letter = Letter(
                "Anna", "48210", "Is it damaged?", encoded(Image.new("RGB", (56, 56), colour))
            )
            turn = ask(session, llm, letter)[-1]
            if colour == "blue":
                assert all(about == "another picture or sound" for _, about in turn.donors)
            elif turn.number == 2:
                assert turn.donors == [(1, "same picture or sound")]


def test_pictures_that_look_alike_are_shown(
    media_folder: Callable[[str], Path], clip_folder: Path
) -> None:
    session = Session()
    model = str(media_folder("qwen2_5_vl"))
    with KVShare(model, embedder=None, media_embedder=str(clip_folder)) as llm:
        page = Page(lambda: llm)
        assert page.visitor is not None
        last: list[tuple[Any, ...]] = []
        tokens = []
        for colour in ("red", "blue", "red"):
            photo = encoded(Image.new("RGB", (56, 56), colour))
            tokens.append(page.uploads.keep(page.visitor.name, photo, "image/png"))
            last = page.ask(session, "KVShare", "Anna", "1", "Hi?", tokens[-1], None)
        report = last[-1][1]
        assert "#1: the same" in report and "#2: cosine" in report
        assert all(f'src="/ui/gradio_api/file={token}"' in report for token in tokens)


def test_a_model_of_text_refuses_a_photo(llm: KVShare) -> None:
    with pytest.raises(InvalidRequestError):
        ask(Session(), llm, Letter("Anna", "1", "?", b"no picture"))


def test_the_page_says_what_is_wrong(llm: KVShare) -> None:
    def loading() -> KVShare:
        raise KVShareError("the model is loading")

    session = Session()
    page = Page(lambda: llm)
    [empty] = page.ask(session, "KVShare", "Anna", "1", "  ", None, None)
    assert "write a question" in empty[0]
    waiting = Page(loading).ask(session, "KVShare", "A", "1", "Hi?", None, None)
    assert "is loading" in waiting[-1][0]
    for path in ("/nowhere.png", __file__):
        missing = page.ask(session, "KVShare", "A", "1", "Hi?", path, None)
        assert "choose it again" in missing[-1][0]
    long = page.ask(session, "KVShare", "A", "1", "Hi?" * 1000, None, None)
    assert "more than 1000 characters" in long[-1][0]
    assert page.service.told == [] and session.turns == []
    good = page.ask(session, "KVShare", "", "", "Hi?", None, None)
    assert len(page.service.told) == 2  # once with prefix caching alone, to measure it
    assert "desk-bar" in good[-1][1] and "<svg" in good[-1][2] and "desk-log" in good[-1][3]


def test_a_question_is_its_tenants_and_counts_for_its_key(
    llm: KVShare, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenants: list[str] = []
    read = llm.read

    def noting(prompt: Any, params: Any, options: RequestOptions) -> Any:
        tenants.append(options.tenant)
        return read(prompt, params, options)

    monkeypatch.setattr(llm, "read", noting)
    limits = Limits(requests_per_minute=3, prompt_tokens_per_minute=400)
    page = Page(lambda: llm, Caller("shop", key="hash", limits=limits))
    session = Session()
    asked = [page.ask(session, "KVShare", "A", "1", "Hi?", None, None)[-1] for _ in range(3)]
    assert "desk-bar" in asked[0][1]
    assert all("prompt tokens a minute" in problem for problem, *_ in asked[1:])
    fourth = page.ask(session, "KVShare", "A", "1", "Hi?", None, None)[-1]
    assert "3 requests a minute" in fourth[0]
    assert set(tenants) == {"shop"} and page.visitor is not None and page.visitor.questions == 0
    meter = page.service.meters.of("hash", limits)
    assert meter is not None and meter.running == 0


def test_a_question_that_is_given_up_is_paid_for(llm: KVShare) -> None:
    limits = Limits(output_tokens_per_minute=MAX_TOKENS)
    page = Page(lambda: llm, Caller("shop", key="hash", limits=limits))

    async def give_up() -> None:
        request: Any = page
        answer = page.desk.ask(Session(), "KVShare", "A", "1", "Hi?", None, None, request)
        async with aclosing(answer):
            async for shown, *_ in answer:
                if "desk-number" in shown:
                    break

    asyncio.run(give_up())
    again = page.ask(Session(), "KVShare", "A", "1", "Hi?", None, None)
    assert "output tokens a minute" in again[-1][0]


def test_the_page_fits_the_model(
    llm: KVShare, media_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk_events, "_LOADING_POLL_S", 0)
    asked: list[int] = []

    def loading_for_a_while() -> KVShare:
        asked.append(1)
        if len(asked) < 4:
            raise KVShareError("the model is loading")
        return llm

    waiting = Page(loading_for_a_while)
    build(waiting.desk)  # a page can be made before there is a model
    assert len(TEXT_EXAMPLES) == len(PHOTO_EXAMPLES)
    updates = asyncio.run(waiting.desk.fitted())
    assert len(asked) == 4 and len(updates) == 1 + 2 * (2 + len(TEXT_EXAMPLES))
    assert not updates[1]["visible"] and not updates[2]["visible"]
    assert [u["value"] for u in updates[3:7]] == [e.label for e in TEXT_EXAMPLES]
    assert all(u["interactive"] for u in updates[3:7])
    request: Any = waiting
    assert waiting.desk.filled(0)(request) == (TEXT_EXAMPLES[0].question, None, None)
    with KVShare(str(media_folder("qwen2_5_vl")), embedder=None) as seeing:
        updates = asyncio.run(Page(lambda: seeing).desk.fitted())
        assert "--media-embedder" in updates[0] and updates[1]["visible"]
        assert [u["value"] for u in updates[3:7]] == [e.label for e in PHOTO_EXAMPLES]
        page: Any = Page(lambda: seeing)
        question, photo, _ = page.desk.filled(0)(page)
        assert question == PHOTO_EXAMPLES[0].question
        sent = page.uploads.get(page.visitor.name, photo["path"])
        assert Image.open(io.BytesIO(sent.content)).size[0] > 0
