"""The desk in front of a server elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from click.testing import Result

from kvshare_mm import KVShare
from kvshare_mm.apps.desk.about import about
from kvshare_mm.apps.desk.endpoint import Endpoint
from kvshare_mm.apps.desk.session import Cost, Session, Terms, Turn
from kvshare_mm.apps.desk.shop import Letter
from kvshare_mm.errors import ConfigError, InvalidRequestError, KVShareError, QueueFullError
from kvshare_mm.stream import Modality

from ...modalities.media import encoded, picture
from ..server.conftest import Running, serving


@pytest.fixture(scope="module")
def served(media_folder: Callable[[str], Path]) -> Iterator[Running]:
    model = str(media_folder("qwen2_5_vl"))
    with serving(lambda: KVShare(model, embedder=None), api_key="secret") as running:
        yield running


def asked(endpoint: Endpoint, *letters: Letter) -> list[Turn]:
    """What becomes of letters, one after the other, on one loop as in a server."""
    session = Session()

    async def run() -> list[Turn]:
        try:
            for letter in letters:
                async for _ in session.ask(endpoint, letter, "similar"):
                    pass
            await session.compare(endpoint, letters[-1], session.turns[-1], Terms())
            return session.turns
        finally:
            await asyncio.to_thread(endpoint.close)

    return asyncio.run(run())


def test_letters_are_answered_and_compared_there(served: Running) -> None:
    photo = encoded(picture(112, 112))
    endpoint = Endpoint(served.url, None, "secret")
    assert endpoint.modalities == {Modality.IMAGE}
    assert about(endpoint)[0] == f"{endpoint.name} answers, at an endpoint."
    first, second = asked(
        endpoint,
        Letter("Anna", "48210", "Is it damaged?", photo),
        Letter("Boris", "77345", "Is it damaged?", photo),
    )
    assert first.output is not None and second.output is not None
    whole = len(second.output.prompt_token_ids)
    assert first.output.provenance.recomputed == len(first.output.prompt_token_ids)
    assert second.output.provenance.media == first.output.provenance.media != ()
    assert second.full is not None and second.full.computed == whole
    assert second.prefix is not None
    assert Cost.of(second.output).computed < second.prefix.computed < whole
    assert second.alone is not None and second.text == second.output.text
    llm = served.service.llm
    assert llm.flush(60)
    # What only measures or compares is not stored beside what customers asked.
    assert sorted(len(v) for v in by_namespace(llm).values()) == [2, 2]


def by_namespace(llm: KVShare) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for info in llm.cache.list():
        found.setdefault(info.namespace, []).append(info.donor_id)
    return found


@pytest.mark.parametrize(
    ("status", "body", "error", "said"),
    [
        (400, '{"error": {"message": "no tools"}}', InvalidRequestError, "endpoint says: no tools"),
        (429, '{"error": {"message": "busy"}}', QueueFullError, "busy"),
        (500, "oops", KVShareError, "oops"),
        (200, 'data: {"error": {"message": "no room"}}', InvalidRequestError, "no room"),
        (200, 'data: {"choices": []}', KVShareError, "broke off"),
        (200, 'data: {"choices": []}\n\ndata: [DONE]', KVShareError, "broke off"),
        (200, "data: {", KVShareError, "broke off"),
    ],
)
def test_what_goes_wrong_there_is_said(
    served: Running, status: int, body: str, error: type[Exception], said: str
) -> None:
    endpoint = Endpoint(served.url, None, "secret")
    answer = httpx2.MockTransport(lambda _: httpx2.Response(status, text=body))
    endpoint._client = httpx2.AsyncClient(transport=answer, base_url="http://endpoint")
    with pytest.raises(error, match=said):
        asked(endpoint, Letter("Anna", "48210", "Is it damaged?"))


@pytest.mark.parametrize(
    ("model", "key", "said"),
    [("other", "secret", "no model 'other'"), (None, "wrong", "API key is wrong")],
)
def test_an_endpoint_is_tried_first(
    served: Running, model: str | None, key: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        Endpoint(served.url, model, key)


@pytest.mark.parametrize("url", ["http://me:word@127.0.0.1:9", "http://127.0.0.1:9", "nowhere"])
def test_no_endpoint(url: str) -> None:
    with pytest.raises(ConfigError, match=r"password in it|does not answer"):
        Endpoint(url, None, None)


def test_options_of_a_model_here_are_none_of_an_endpoint(run: Callable[..., Result]) -> None:
    done = run("desk", "--url", "http://127.0.0.1:9", "--media-embedder", "tiny-clip")
    assert done.exit_code == 1 and "the server's own" in done.output
