"""Nothing of one tenant reaches another: by value, by hash, by name, or by what is reused.

Three tenants and a desk send what is alike to one server, in any order. Each must be told what it
is told where it is alone: the same answers, the same reuse, the same errors. And no reply, page or
metric holds what only another one has said.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvshare_mm import KVShare
from kvshare_mm.apps.desk.session import Session
from kvshare_mm.apps.desk.shop import Letter
from kvshare_mm.apps.server.keys import add_key

from ...modalities import media
from .conftest import Running, image_part, sound_part, start

TENANTS = ("shop-a", "shop-b", "shop-c")
DESK = "desk"
SECRETS = {
    "shop-a": "Quillfeather",
    "shop-b": "Brannigoss",
    "shop-c": "Ostravine",
    DESK: "Merrowdale",
}
_STEPS = 40
_RULES = "You answer for a shop. Lamps are mended within ten days, kettles are not. Be polite. "


@dataclass(frozen=True)
class Step:
    """One thing that somebody does: which, and with what of a few alike things."""

    who: str
    kind: str
    number: int


def picture(number: int) -> dict[str, Any]:
    return image_part(media.encoded(media.picture(112, 112, seed=number)))


def sound(number: int) -> dict[str, Any]:
    return sound_part(media.recorded(media.tone(hertz=300 + number)))


class World:
    """A server, and what each of its users was told until now."""

    def __init__(self, model: str, medium: Callable[[int], dict[str, Any]], folder: Path) -> None:
        folder.mkdir()
        file = folder / "keys"
        self.keys = {name: add_key(file, name) for name in TENANTS}
        self.boss = add_key(file, "office", admin=True)
        self.running: Running = start(
            lambda: KVShare(model, embedder=None, local_media=False),
            keys_file=file,
            scope="tenant",
            admin_key=None,
        )
        self.running.wait_ready()
        self.told: dict[str, list[Any]] = {name: [] for name in SECRETS}
        self.raw: dict[str, list[str]] = {name: [] for name in SECRETS}
        self._medium = medium
        self._desk = Session()

    def run(self, step: Step) -> None:
        getattr(self, f"_{step.kind}")(step)
        assert self.running.llm.flush()

    def _chat(self, step: Step) -> None:
        body = {"messages": [{"role": "user", "content": self._text(step)}]}
        self._generated(step, "/v1/chat/completions", body)

    def _stream(self, step: Step) -> None:
        body = {"messages": [{"role": "user", "content": self._text(step)}], "stream": True}
        self._generated(step, "/v1/chat/completions", body)

    def _responses(self, step: Step) -> None:
        body: dict[str, Any] = {"input": self._text(step), "stream": bool(step.number % 2)}
        body |= {"max_output_tokens": 3, "temperature": 0, "metadata": {"a": "b"}}
        self._asked(step, "POST", "/v1/responses", body)

    def _media(self, step: Step) -> None:
        parts = [self._medium(step.number % 3), {"type": "text", "text": self._text(step)}]
        body = {"messages": [{"role": "user", "content": parts}]}
        self._generated(step, "/v1/chat/completions", body)

    def _completion(self, step: Step) -> None:
        body = {"prompt": self._text(step), "cache_salt": "same" if step.number % 2 else None}
        self._generated(step, "/v1/completions", body)

    def _tokenize(self, step: Step) -> None:
        self._asked(step, "POST", "/tokenize", {"prompt": self._text(step)})

    def _mistake(self, step: Step) -> None:
        name = SECRETS[step.who]
        wrong: list[tuple[str, str, Any]] = [
            ("POST", "/v1/chat/completions", {"messages": [{"role": "user"}], "model": name}),
            ("POST", "/v1/chat/completions", {"messages": [{"role": name, "content": name}]}),
            ("POST", "/v1/completions", {"prompt": name, "cache_salt": f"{name}@"}),
            ("GET", f"/v1/models/{name}", None),
            ("GET", f"/{name}", None),
            ("GET", "/v1/cache/donors", None),
            ("POST", "/v1/cache/lookup", {"prompt": _RULES, "tenant": "shop-a"}),
            ("DELETE", "/v1/cache/donors/0", None),
            ("POST", "/v1/cache/clear", {"all": True}),
        ]
        self._asked(step, *wrong[step.number % len(wrong)])

    def _ask_at_the_desk(self, step: Step) -> None:
        letter = Letter(SECRETS[DESK], "1", f"Is lamp {step.number} mended?")

        async def ask() -> Any:
            async for turn in self._desk.ask(self.running.llm, letter, "similar"):
                last = turn
            return last

        turn = asyncio.run(ask())
        use = turn.output.provenance
        self.told[DESK].append((turn.text, use.exact, use.reused, use.recomputed, turn.donors))
        self.raw[DESK].append(turn.text)

    def _text(self, step: Step) -> str:
        own = SECRETS[step.who] if step.number % 5 == 0 else ""
        return f"Order {step.number % 4}: {own} {4 * _RULES} Is the lamp mended, and when?"

    def _generated(self, step: Step, path: str, body: dict[str, Any]) -> None:
        more: dict[str, Any] = {"max_tokens": 3, "temperature": 0, "ignore_eos": True}
        more["kvshare"] = {"max_divergence": 1}
        self._asked(step, "POST", path, {**body, **more})

    def _asked(self, step: Step, method: str, path: str, body: Any) -> None:
        options = {} if body is None else {"json": body}
        reply = self.running.ask(method, path, self.keys[step.who], **options)
        self.raw[step.who].append(f"{reply.text} {dict(reply.headers)}")
        self.told[step.who].append((reply.status_code, *_content(reply.text)))


def _content(text: str) -> list[Any]:
    """What a reply says, without what differs from one time to the next."""
    events = [line[6:] for line in text.splitlines() if line.startswith("data: {")] or [text]
    content = []
    for event in events:
        try:
            reply = json.loads(event)
        except ValueError:
            content.append(event)
            continue
        reply = reply.get("response", reply)  # that an event holds
        for name in ("id", "created", "created_at", "system_fingerprint", "item_id"):
            reply.pop(name, None)
        for item in (*reply.get("output", ()), reply.get("item", {}), reply.get("part", {})):
            item.pop("id", None)
        if use := reply.get("kvshare"):
            use.pop("seconds")
            use["donors"] = len(use["donors"])
        content.append(reply)
    return content


def steps(seed: int, kinds: list[str]) -> list[Step]:
    rng = random.Random(seed)
    made = []
    for _ in range(_STEPS):
        who = rng.choice([*TENANTS, DESK])
        kind = "ask_at_the_desk" if who == DESK else rng.choice(kinds)
        made.append(Step(who, kind, rng.randrange(10)))
    return made


@pytest.fixture
def open_world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    opened: list[World] = []

    def make(*arguments: Any) -> World:
        world = World(*arguments, tmp_path / str(len(opened)))
        opened.append(world)
        return world

    yield make
    for world in opened:
        world.running.stop()


@pytest.mark.parametrize(("model", "medium"), [("tiny-vl", picture), ("tiny-audio", sound)])
@pytest.mark.parametrize("seed", [1, 2])
def test_everybody_is_told_what_they_are_told_alone(
    open_world: Callable[..., World], model: str, medium: Any, seed: int
) -> None:
    kinds = ["chat", "stream", "responses", "media", "media", "completion", "tokenize", "mistake"]
    made = steps(seed, kinds)
    together = open_world(model, medium)
    for step in made:
        together.run(step)
    for who in SECRETS:
        alone = open_world(model, medium)
        for step in made:
            if step.who == who:
                alone.run(step)
        assert together.told[who] == alone.told[who]
    stats = together.running.llm.stats()["requests"]
    # Or nothing was shared by anybody, which proves nothing.
    assert stats["prompt_tokens_exact"] and stats["prompt_tokens_reused"], stats


@pytest.mark.parametrize(("model", "medium"), [("tiny-vl", picture), ("tiny-audio", sound)])
def test_no_reply_page_or_metric_holds_what_another_has_said(
    open_world: Callable[..., World], model: str, medium: Any, caplog: pytest.LogCaptureFixture
) -> None:
    kinds = ["chat", "stream", "responses", "media", "completion", "tokenize", "mistake"]
    world = open_world(model, medium)
    for step in steps(3, kinds):
        world.run(step)
    llm = world.running.llm
    donors = llm.cache.list()
    assert {d.namespace for d in donors} and len({d.namespace for d in donors}) >= len(TENANTS)
    hashes = {d.namespace.rsplit("-", 1)[1] for d in donors}
    for who in TENANTS:
        said = "\n".join(world.raw[who])
        others = [*(t for t in TENANTS if t != who), *(s for n, s in SECRETS.items() if n != who)]
        own = {d.donor_id for d in donors if d.donor_id in said}
        assert not [word for word in (*others, *hashes, *world.keys.values()) if word in said]
        assert len({d.namespace for d in donors if d.donor_id in own}) <= 2  # with and without salt
    for path in ("/metrics", "/health", "/version", "/openapi.json", "/v1/models"):
        page = world.running.ask("GET", path, world.keys["shop-a"]).text
        everything = (*TENANTS, *SECRETS.values(), *hashes, *(d.donor_id for d in donors))
        assert not [word for word in everything if word in page], path
    # Administrators see what is stored, and nothing of what it says.
    for path in ("/v1/cache", "/v1/cache/donors", "/v1/cache/tree"):
        page = world.running.ask("GET", path, world.boss).text
        assert not [word for word in SECRETS.values() if word in page], path
    assert not [word for word in SECRETS.values() if word in caplog.text]
