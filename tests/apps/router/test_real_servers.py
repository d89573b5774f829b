"""A router before real servers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from kvshare_mm import KVShare

from ..server.conftest import Running, start
from .conftest import Route

_REPORT = (
    "Laboratory report of patient {0}. Haemoglobin {1} g/L, sodium 141 mmol/L, potassium 4.2"
    " mmol/L, all seen on the second floor, by the doctor on call. Question: is it fine?"
)


@pytest.fixture(scope="module")
def servers(tiny_folder: Path) -> Iterator[list[Running]]:
    running = [start(lambda: KVShare(str(tiny_folder), embedder=None)) for _ in range(3)]
    for each in running:
        each.wait_ready()
    yield running
    for each in running:
        each.stop()


def test_what_is_alike_is_reused_though_stores_are_apart(
    servers: list[Running], route: Route
) -> None:
    routed = route([each.url for each in servers])
    shared = []
    for i in range(6):
        text = _REPORT.format(48210 + i, 100 + 7 * i)
        # Nothing a model of random weights says is near: no bound.
        told = routed.chat(text, max_tokens=4, kvshare={"max_divergence": 1e6}).json()["kvshare"]
        shared.append(
            1 - told["recomputed"] / (told["exact"] + told["reused"] + told["recomputed"])
        )
    assert shared[0] == 0 and min(shared[1:]) > 0.5


def test_exact_reuse_through_it_gives_what_no_reuse_gives(
    servers: list[Running], route: Route
) -> None:
    routed = route([each.url for each in servers])
    for i in range(2):
        for j in range(3):
            text = _REPORT.format(j, j) + " And then?" * i
            ours = {"temperature": 0, "max_tokens": 8, "cache_salt": "exact"}
            off = servers[0].chat(text, **ours, kvshare={"reuse": "off", "store": False}).json()
            exact = routed.chat(text, **ours, kvshare={"reuse": "exact"}).json()
            assert exact["choices"] == off["choices"]
            assert (exact["kvshare"]["exact"] > 16) == (i == 1)


def test_the_official_client_streams_and_lists(servers: list[Running], route: Route) -> None:
    routed = route([each.url for each in servers])
    with openai.OpenAI(base_url=f"{routed.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        stream = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=4, stream=True
        )
        assert [c.choices[0].finish_reason for c in stream if c.choices][-1] in {"length", "stop"}
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="other", prompt="hi")
        with pytest.raises(openai.BadRequestError) as error:
            client.completions.create(model="tiny", prompt="hi", top_p=7)
        assert error.value.param == "top_p"
