"""The desk's one-click questions about a photo, on the embedded model that sees."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from kvshare_mm import KVShare
from kvshare_mm.apps.desk.events import PICTURES
from kvshare_mm.apps.desk.session import Session, Turn
from kvshare_mm.apps.desk.shop import CUSTOMERS, PHOTO_EXAMPLES, Letter

pytestmark = pytest.mark.e2e

_RIGHT = ("Yes, it is cracked.", "It is red.", "18 months", "No, it is intact.")


@pytest.fixture(scope="module")
def llm() -> Iterator[KVShare]:
    with KVShare("tiny-vl", embedder=None) as opened:
        yield opened


@pytest.mark.parametrize("number", range(len(PHOTO_EXAMPLES)))
def test_both_customers_get_the_right_answer(llm: KVShare, number: int) -> None:
    example = PHOTO_EXAMPLES[number]
    photo = (PICTURES / str(example.photo)).read_bytes()
    session = Session()

    async def ask(letter: Letter) -> Turn:
        return [turn async for turn in session.ask(llm, letter, "similar")][-1]

    for name, order in CUSTOMERS:
        turn = asyncio.run(ask(Letter(name, order, example.question, photo)))
        assert _RIGHT[number] in turn.text
    assert turn.output is not None
    assert turn.donors == [(1, "same picture or sound")]
    assert turn.output.provenance.exact + turn.output.provenance.reused > 100
