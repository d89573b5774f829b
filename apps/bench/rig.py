"""What benchmarks run on: the product's model, slots and donors, asked one step at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from kvshare_mm import __version__
from kvshare_mm.apps.bench.drift import value_deviation
from kvshare_mm.apps.bench.methods import FULL, Method
from kvshare_mm.apps.bench.narrowing import narrow
from kvshare_mm.apps.bench.policies import AtHand, EarlierChunks, Narrowing, endings
from kvshare_mm.apps.bench.work import LayerCounter
from kvshare_mm.assemble import assemble
from kvshare_mm.attention import TailAttention
from kvshare_mm.config import KVShareConfig
from kvshare_mm.errors import InvalidRequestError, ModelLoadError
from kvshare_mm.native.media import PromptMedia
from kvshare_mm.native.prefill import Prefill, PrefillResult
from kvshare_mm.native.slots import SlotRunner
from kvshare_mm.reuse.plan import ReusePlan
from kvshare_mm.reuse.repair import RepairPolicy, Union
from kvshare_mm.reuse.scheduler import namespace
from kvshare_mm.store.base import NodeKV
from kvshare_mm.stream import SegmentStream


@dataclass(frozen=True, slots=True)
class Served:
    """One prefill as a benchmark sees it.

    Attributes:
        runner: whose slots hold its KV.
        slot: which of them.
        result: what the engine was told.
        ttft: seconds until the first token was known.
        work: positions run through the model, in whole passes; a repair policy's probe counts,
            but for what the prefill computes in any case.
    """

    runner: SlotRunner
    slot: int
    result: PrefillResult
    ttft: float
    work: float

    @property
    def cost(self) -> dict[str, Any]:
        """What it took, JSON-ready."""
        plan = self.result.plan
        return {
            "computed_tokens": plan.num_computed,
            "work_tokens": self.work,
            "declined": plan.declined,
        }


class _Rounded:
    """The same model in another dtype, which recomputes in full; one request at a time."""

    def __init__(self, config: KVShareConfig, dtype: str) -> None:
        quiet = {"dtype": dtype, "max_num_seqs": 1, "reuse": "off", "store_dir": None}
        self._parts = assemble(config.model_copy(update=quiet))

    def serve(self, stream: SegmentStream) -> Served:
        start = time.perf_counter()
        result = self._parts.prefiller.prefill(0, stream, "", reuse="off")
        result = replace(result, logits=result.logits.float())
        assert isinstance(self._parts.runner, SlotRunner)
        took = time.perf_counter() - start
        return Served(self._parts.runner, 0, result, took, float(len(stream)))

    def close(self) -> None:
        self._parts.close()


class Rig:
    """The parts of a server, without its search by meaning. Its engine waits for nobody.

    Args:
        config: options of the model and of reuse.
        num_slots: requests that are held at once, to be compared or decoded together.

    Raises:
        ModelLoadError: the model cannot be loaded, or its KV cannot be reused.
    """

    def __init__(self, config: KVShareConfig, num_slots: int = 1) -> None:
        quiet = {
            "max_num_seqs": num_slots,
            "embedder": None,
            "media_embedder": None,
            "audit_share": 0,  # methods are compared as they are, not as they learn
        }
        self.config = config.model_copy(update=quiet)
        self.num_slots = num_slots
        self._parts = parts = assemble(self.config)
        self.loaded = parts.loaded
        if not isinstance(parts.runner, SlotRunner) or parts.donors is None:
            parts.close()
            raise ModelLoadError(f"nothing to measure: {self.loaded.unsupported}")
        self.runner, self.donors = parts.runner, parts.donors
        for kv in (kv for slot in range(num_slots) for kv in self.runner.slot_kv(slot)):
            kv.zero_()  # who is measured first does not wait for the memory's pages
        self.encoder, self.media = parts.encoder, parts.media
        self.max_len = self.runner.slot_kv(0)[0].shape[2]
        self._counter = LayerCounter(self.loaded.model, self.runner.slot_kv(0)[0].shape[0])
        self._in_dtypes: dict[str, _Rounded] = {}

    @property
    def settings(self) -> list[Any]:
        """What decides the rig's results, JSON-ready: for journals."""
        return [
            __version__,
            self.loaded.fingerprint,
            self.config.model_dump(mode="json"),
            repr(self.config.policy),
        ]

    def namespace(self, salt: str) -> str:
        return namespace(self.loaded.fingerprint, salt)

    def check(self, *streams: SegmentStream, answer: int = 0) -> None:
        """Raises InvalidRequestError: a prompt and `answer` tokens are longer than a slot."""
        room = self.max_len - answer
        if max(map(len, streams)) > room:
            raise InvalidRequestError(f"longer than {room} tokens", "target")

    def serve(
        self, stream: SegmentStream, ns: str, method: Method, slot: int = 0, store: bool = True
    ) -> Served:
        """Prefill into a slot; ttft ends when the first token is known.

        Args:
            store: keep what an encoder makes of the prompt's media.
        """
        if method.dtype is not None:
            return self._rounded(method.dtype).serve(stream)
        if method.packed:
            with self._packed(ns):
                return self.serve(stream, ns, replace(method, packed=False), slot, store)
        self._counter.take()
        start = time.perf_counter()
        policy = method.policy(self._at_hand(slot, stream, ns))
        prefill = self._parts.prefiller.begin(
            slot, stream, ns, reuse=method.reuse, policy=policy, store=store
        )
        if policy is not None:
            for part in policy.policies if isinstance(policy, Union) else (policy,):
                if isinstance(part, Narrowing):
                    narrow(prefill, part, self.loaded)
                elif isinstance(part, EarlierChunks):
                    self._replan(prefill, part, policy, ns)
        result = prefill.advance(len(stream))
        assert result is not None
        int(result.logits.argmax())
        took = time.perf_counter() - start
        return Served(self.runner, slot, result, took, self._counter.take())

    @contextmanager
    def _packed(self, ns: str) -> Iterator[None]:
        """Donors' KV in eight bits, as long as this lasts."""
        keep, mine = self.donors.store, [n for n in self.donors.nodes() if n.namespace == ns]
        whole = [keep.get(node.node_id, ns) for node in mine]
        try:
            for each in whole:
                keep.put(replace(each, kv=NodeKV.packed(each.kv.k, each.kv.v)))
            yield
        finally:
            for each in whole:
                keep.put(each)

    def _rounded(self, dtype: str) -> _Rounded:
        if dtype not in self._in_dtypes:
            self._in_dtypes[dtype] = _Rounded(self.config, dtype)
        return self._in_dtypes[dtype]

    def _replan(
        self, prefill: Prefill, chunks: EarlierChunks, policy: RepairPolicy, ns: str
    ) -> None:
        """Plan anew with the donor that the planner has found, where that can be."""
        stream, node = prefill.stream, self.donors.tree.get(prefill.plan.edited_from or "")
        if node is not None and node.exact_len == len(node) and not stream.items:
            plan = chunks.plan(stream.align_keys, node.node_id, node.wide_keys)
            prefill.plan = plan.with_repair(policy.positions(plan))
            self.donors.load(plan, ns, *self.runner.slot_kv(prefill.slot), None)

    def _at_hand(self, slot: int, stream: SegmentStream, ns: str) -> AtHand:
        return AtHand(
            partial(self._drift, slot, stream, ns),
            partial(self._attention, slot, stream, ns),
            partial(endings, self.loaded.tokenizer, stream.token_ids),
        )

    def _drift(
        self, slot: int, stream: SegmentStream, ns: str, plan: ReusePlan, layer: int
    ) -> np.ndarray:
        """How far V of a plan's positions drifts, measured where it will be served."""
        kv = self.runner.slot_kv(slot)
        self.donors.load(plan, ns, *kv, stream.positions)
        start = min(int(np.flatnonzero(plan.approximate)[0]), int(plan.placeholders[0]))
        media = PromptMedia(self.encoder, stream, ns, reuse=True, store=False)
        inputs = media.inputs(np.arange(start, len(stream)))
        found = value_deviation(self.loaded, kv, stream.token_ids, start, layer, inputs)
        return np.where(plan.approximate, found, np.float32(0))

    def _attention(
        self, slot: int, stream: SegmentStream, ns: str, plan: ReusePlan, width: int
    ) -> np.ndarray:
        """Where a prompt's last `width` positions look, over what a plan reuses.

        They see the placeholders too. Those are work of the prefill, not of this probe: who keeps
        what is computed here need not compute them again.
        """
        self.donors.load(plan, ns, *self.runner.slot_kv(slot), stream.positions)
        media = PromptMedia(self.encoder, stream, ns, reuse=True, store=False)
        start = max(0, len(stream) - width)
        before = plan.placeholders[plan.placeholders < start]
        if len(before):
            self.runner.prefill(slot, stream.token_ids, before, None, media.inputs(before))
            self._counter.forget(len(before))
        query, tail = np.arange(start, len(stream)), TailAttention(width)
        self.runner.prefill(slot, stream.token_ids, query, tail, media.inputs(query))
        assert tail.mass is not None
        return tail.mass

    def save(self, stream: SegmentStream, ns: str, served: Served) -> str | None:
        """Make what is in the slot a donor."""
        return self._parts.prefiller.save(served.slot, stream, ns, served.result)

    @contextmanager
    def known(self, donor: SegmentStream, ns: str, method: Method = FULL) -> Iterator[Served]:
        """A donor served in the first slot, and stored until this ends."""
        served = self.serve(donor, ns, method)
        stored = self.save(donor, ns, served)
        try:
            yield served
        finally:
            if stored:
                self.donors.delete(stored)

    def decode(
        self,
        served: Sequence[Served],
        max_tokens: int,
        stop: Callable[[list[int]], bool] | None = None,
    ) -> list[list[int]]:
        """Greedy answers that continue prefilled slots, all in one batch.

        Args:
            served: prefills in slots of their own.
            max_tokens: longest answer.
            stop: told an answer so far; true ends it. The end token ends it anyway.

        Returns:
            Token ids of each answer, end token included.
        """
        answers = [[int(s.result.logits.argmax())] for s in served]
        while active := [
            i
            for i, (s, answer) in enumerate(zip(served, answers, strict=True))
            if len(answer) < max_tokens
            and answer[-1] not in self.loaded.eos_token_ids
            and s.result.plan.num_tokens + len(answer) <= self.max_len
            and not (stop and stop(answer))
        ]:
            rows = self.step([served[i] for i in active], [answers[i] for i in active])
            for i, row in zip(active, rows, strict=True):
                answers[i].append(int(row.argmax()))
        return answers

    def step(
        self, served: Sequence[Served], answers: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:
        """Logits of the next token of each, ``[vocab_size]``, behind the tokens of its answer."""
        rows: dict[int, torch.Tensor] = {}
        for runner in dict.fromkeys(one.runner for one in served):
            mine = [i for i, one in enumerate(served) if one.runner is runner]
            logits = runner.decode(
                [served[i].slot for i in mine],
                [answers[i][-1] for i in mine],
                [served[i].result.plan.num_tokens + len(answers[i]) - 1 for i in mine],
                [served[i].result.rope_delta for i in mine],
            )
            rows |= zip(mine, logits, strict=True)
        return [rows[i] for i in range(len(served))]

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.loaded.tokenizer(text, add_special_tokens=False)["input_ids"])

    def words(self, tokens: Sequence[int]) -> str:
        """An answer as text."""
        return str(self.loaded.tokenizer.decode(tokens, skip_special_tokens=True))

    def close(self) -> None:
        for rounded in self._in_dtypes.values():
            rounded.close()
        self._counter.close()
        self._parts.close()
