"""Serving models with recurrent layers: what follows a beginning whose state was kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvshare_mm import KVShare, RequestOptions, RequestOutput

from ..models.test_states import CONTINUED
from ..models.test_support import SHAPE
from .asking import _PROMPTS, idle, inside, params

_SYSTEM = {"role": "system", "content": "Answer in one line: g/L, mmol/L. " * 6}
_DELTA, _STILL = "qwen3.5 (gated DeltaNet)", "gpt-j"
_TYPES = [_DELTA, _STILL, "mamba-2 (Mamba 2 alone)", "falcon-h1 (Mamba 2 beside attention)"]


def _folder(name: str, tiny: Path, folder: Path) -> Path:
    kind, options = CONTINUED[name]
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink()
    own = AutoConfig.from_pretrained(tiny)
    words = {name: getattr(own, name) for name in ("vocab_size", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(kind, **{**SHAPE, **options, **words, "bos_token_id": None})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.08)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _folder(_DELTA, tiny_folder, tmp_path_factory.mktemp("delta"))


@pytest.fixture
def llm(folder: Path) -> Iterator[KVShare]:
    with KVShare(str(folder), embedder=None, max_num_seqs=2, prefill_chunk=32) as llm:
        yield llm


def _ask(llm: KVShare, question: str, tokens: int = 6, **options: Any) -> RequestOutput:
    messages = [_SYSTEM, {"role": "user", "content": question}]
    return llm.chat(messages, params(tokens), RequestOptions(**options))


def _states(llm: KVShare) -> list[str]:
    llm.flush()
    return [name for name in inside(llm).donors.store.ids() if name.startswith("state:")]


@pytest.mark.parametrize("name", _TYPES)
def test_identical_beginnings_are_reused_and_answers_stay(
    name: str, tiny_folder: Path, tmp_path: Path
) -> None:
    with KVShare(str(_folder(name, tiny_folder, tmp_path)), embedder=None) as llm:
        why = "unsupported_model" if name == _STILL else "recurrent_layers"
        first = _ask(llm, "What is the value of sodium?")
        n = len(first.prompt_token_ids)
        assert (first.provenance.exact, first.provenance.declined) == (0, why)

        again = _ask(llm, "What is the value of sodium?")
        assert (again.provenance.exact, again.provenance.recomputed) == (n - 1, 1)
        assert again.provenance.declined is None and again.token_ids == first.token_ids

        # Others meet behind the system prompt, and the next turn behind the answer.
        whole = _ask(llm, "Zebra, yak and gnu?", reuse="off")
        other = _ask(llm, "Zebra, yak and gnu?")
        system = first.prompt_token_ids.index(llm.tokenizer.eos_token_id) + 1
        assert other.provenance.exact >= system and other.provenance.reused == 0
        assert other.provenance.declined == why and other.token_ids == whole.token_ids
        turn = [*first.prompt_token_ids, *first.token_ids, *other.prompt_token_ids[-9:]]
        found = llm.lookup(turn)
        assert found is not None and found.plan.num_exact == n + 5
        whole = llm.generate(turn, params(6), RequestOptions(reuse="off"))
        asked = llm.generate(turn, params(6), RequestOptions(reuse="exact"))
        assert (asked.provenance.exact, asked.provenance.declined) == (n + 5, "exact_only")
        assert asked.token_ids == whole.token_ids
        assert asked.provenance.spans[0].kind == "exact"
        assert llm.stats()["unsupported"]


def test_a_state_is_kept_where_requests_part(llm: KVShare) -> None:
    """Without a turn that ends there: the second request finds out, the third has it."""
    head = list(range(100, 145))
    prompts = [[*head, *tail] for tail in ([7, 8], [9, 7], [9, 8], [8])]
    outputs = [llm.generate(prompt, params(2)) for prompt in prompts]
    assert [o.provenance.exact for o in outputs] == [0, 0, 32, 32]
    for prompt, output in zip(prompts, outputs, strict=True):
        alone = llm.generate(prompt, params(2), RequestOptions(reuse="off"))
        assert alone.token_ids == output.token_ids


def test_whom_states_are_shared_with(llm: KVShare) -> None:
    _ask(llm, "x", cache_salt="mine")
    assert _ask(llm, "x", cache_salt="yours").provenance.exact == 0
    assert _ask(llm, "x", cache_salt="mine").provenance.exact > 0
    states = _states(llm)
    _ask(llm, "Zebra", cache_salt="new", store=False)
    _ask(llm, "yak", cache_salt="new", reuse="off")
    assert _states(llm) == states and _ask(llm, "yak", cache_salt="new").provenance.exact == 0


def test_what_is_deleted_is_gone(llm: KVShare) -> None:
    _ask(llm, "x", cache_salt="mine")
    _ask(llm, "x", cache_salt="yours")
    both = _states(llm)
    assert len(both) == 6
    assert len({node.split("-")[0] for node in both}) == 2
    assert llm.cache.delete(llm.cache.list(llm.namespace("mine"))[0].donor_id)
    assert len(_states(llm)) == 3
    assert _ask(llm, "x", cache_salt="mine").provenance.exact == 0
    llm.flush()
    assert llm.cache.clear() == 2 and not _states(llm)


def test_states_survive_a_restart(folder: Path, tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        with KVShare(str(folder), embedder=None, store_dir=tmp_path) as llm:
            found.append(_ask(llm, "What is the value of sodium?"))
            assert llm.flush()
    first, second = found
    assert second.provenance.exact == len(first.prompt_token_ids) - 1
    assert second.token_ids == first.token_ids


@pytest.mark.parametrize("harm", ["gone", "of another model", "not found when it is read"])
def test_a_state_that_cannot_be_had_is_a_miss(
    llm: KVShare, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = _ask(llm, "x").token_ids
    store = inside(llm).donors.store
    for name in _states(llm):
        if harm != "of another model":
            store.delete(name)
        else:
            stored = store._host.get(name)
            kv = replace(stored.kv, v=stored.kv.v[..., :-1])
            store._host.put(replace(stored, kv=kv))
    if harm == "not found when it is read":
        monkeypatch.setattr(store, "resident", lambda name: "host")
    output = _ask(llm, "x")
    assert output.token_ids == want and output.provenance.exact == 0
    fallback = {"gone": None, "of another model": "edit_error"}.get(harm, "evicted")
    assert output.provenance.fallback == fallback


def test_many_at_once_get_their_own_answers(llm: KVShare) -> None:
    alone = [llm.generate(p, params(), RequestOptions(reuse="off")) for p in _PROMPTS]
    for _ in range(2):
        together = llm.generate([*_PROMPTS], params())
        assert [o.token_ids for o in together] == [o.token_ids for o in alone]
    assert sum(o.provenance.exact for o in together) > 0
    idle(llm)
    assert llm.flush()
    runner = inside(llm).runner
    assert not (runner._caches or runner._lengths or runner._logits or runner._kept)


def test_a_stream_that_is_left_is_no_harm(llm: KVShare) -> None:
    stream = llm.stream(_PROMPTS[3], params(200))
    assert next(stream) is not None
    stream.close()
    idle(llm)
    want = llm.generate(_PROMPTS[3], params(8), RequestOptions(reuse="off"))
    output = llm.generate(_PROMPTS[3], params(8))
    assert output.token_ids == want.token_ids and output.provenance.exact > 0


def test_a_forward_that_failed_half_way_is_no_answer(llm: KVShare) -> None:
    """Some layers had taken the token by then: decoded once more, it would be there twice."""
    want = llm.generate(_PROMPTS[3], params(8), RequestOptions(reuse="off"))
    calls = iter(range(100))

    def fail(_: Any, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[1] == 1 and next(calls) == 3:  # not of the prompt
            raise torch.OutOfMemoryError("once")

    layer = inside(llm).runner._model.model.layers[-1]
    with layer.register_forward_pre_hook(fail), pytest.raises(RuntimeError, match="go back"):
        llm.generate(_PROMPTS[3], params(8))
    idle(llm)
    for _ in range(2):
        assert llm.generate(_PROMPTS[3], params(8)).token_ids == want.token_ids
