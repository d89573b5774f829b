"""Donors on disk, text and pictures: they serve again after a restart, and damage is a miss."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvshare_mm import RequestOutput
from kvshare_mm.assets.shop.pictures import draw, random_photo
from kvshare_mm.node import Node

from .engines import Engine, Prompt, nodes, reason, told
from .test_requests import LOOSE, ids

WORDS = "Which way did it come? " * 8


def about(name: str, photo: int = 0) -> Prompt:
    """A photo between a name and a question."""
    picture = {"type": "image", "image": draw(random_photo(random.Random(photo)))}
    texts = [{"type": "text", "text": text} for text in (f"{name}: ", WORDS)]
    return [{"role": "user", "content": [texts[0], picture, texts[1]]}]


def edited(prompt: list[int]) -> list[int]:
    return [*prompt[:100], *ids(5, 9), *prompt[100:]]


DONORS: list[Prompt] = [*(ids(200, seed) for seed in range(5)), about("Tom")]
ASKED: list[tuple[Prompt, dict[str, Any]]] = [
    (DONORS[0], LOOSE),
    (edited(ids(200, 0)), LOOSE),
    (edited(ids(200, 1)), {**LOOSE, "cache_salt": "salt"}),
    (about("Alexandra 17"), {"store": False, "repair": "tail:16"}),
]


@dataclass
class Restarted:
    """An engine, its store, and what was there in its former life."""

    engine: Engine
    folder: Path
    nodes: list[Node] = field(default_factory=list)
    answers: list[RequestOutput] = field(default_factory=list)


@pytest.fixture(scope="module")
def restarted(
    start: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Restarted]:
    folder = tmp_path_factory.mktemp("donors")
    first = start("tiny-vl", store_dir=folder)
    for prompt in DONORS:
        first.ask(prompt)
    first.ask(DONORS[1], cache_salt="salt")
    answers = [first.ask(prompt, **options) for prompt, options in ASKED]
    known = nodes(first)
    first.close()
    second = start("tiny-vl", store_dir=folder)
    second.ask(ids(20, 99), 1, store=False)  # inside vLLM workers tell then what they found
    yield Restarted(second, folder, known, answers)
    second.close()


def test_donors_outlive_the_engine(restarted: Restarted) -> None:
    for (prompt, options), before in zip(ASKED, restarted.answers, strict=True):
        now = restarted.engine.ask(prompt, **options)
        assert told(now) == told(before) and sum(told(now)[:2]) > 70
        assert now.token_ids == before.token_ids
        assert now.provenance.media == before.provenance.media
    known = {node.node_id: node for node in restarted.nodes}
    found = nodes(restarted.engine)
    assert {node.node_id for node in found} == known.keys() and len(found) == 7
    for node in found:
        was = known[node.node_id]
        assert (node.namespace, node.media) == (was.namespace, was.media)
        assert (node.positions is None) == (not node.media)
        assert node.positions is None or np.array_equal(node.positions, was.positions)


def test_a_picture_is_known_by_its_pixels_and_to_its_own_salt(restarted: Restarted) -> None:
    options = {"store": False, "repair": "tail:16"}
    known = restarted.engine.ask(about("Alexandra 17"), **options)
    (use,) = known.provenance.media
    assert use.source == "kv"
    assert told(known)[1] > use.end - use.start > 8
    for prompt, salt in ((about("Tom", 1), ""), (about("Tom"), "other")):
        other = restarted.engine.ask(prompt, 12, cache_salt=salt, max_divergence=0, store=False)
        plain = restarted.engine.ask(prompt, 12, cache_salt=salt, reuse="off", store=False)
        assert [use.source for use in other.provenance.media] == ["encoder"]
        assert other.token_ids == plain.token_ids
    assert told(other)[:2] == (0, 0)


@pytest.mark.parametrize(
    ("number", "damage", "why"),
    [(2, "flip", "corrupt"), (3, "truncate", "corrupt"), (4, "remove", "evicted")],
)
def test_a_damaged_donor_is_a_miss(
    restarted: Restarted, number: int, damage: str, why: str
) -> None:
    """None of these was read since the start, so RAM has none of them."""
    engine, prompt = restarted.engine, DONORS[number]
    (node,) = (n for n in nodes(engine) if n.align_keys[:200].tolist() == prompt)
    files = {path: path.read_bytes() for path in restarted.folder.rglob("*.kvnode")}
    (path,) = (path for path, content in files.items() if node.node_id.encode() in content)
    content = bytearray(files[path])
    content[-1000] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[:-1000])
    target = edited(ids(200, number))
    output = engine.ask(target, **LOOSE)
    assert told(output) == (0, 0, 205)
    assert reason(output) == why
    assert output.token_ids == engine.ask(target, reuse="off", store=False).token_ids
    # Nobody looks for it again.
    assert node not in nodes(engine)
    assert reason(engine.ask(target, **LOOSE)) in ("no_donor", "below_min_gain")
