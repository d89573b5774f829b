"""A server that is asked anything in any order, and checked after every request.

The reference is a second runner of the same model that computes every prompt in full.
"""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvshare_mm import KVShare, RequestOptions, RequestOutput, SamplingParams
from kvshare_mm.errors import KVUnavailableError
from kvshare_mm.native.inputs import MediaInputs
from kvshare_mm.native.prefill import Prefill, PrefillResult
from kvshare_mm.native.slots import Chunk, SlotRunner
from kvshare_mm.node import Node
from kvshare_mm.stream import SegmentStream

from ..helpers import until

ATOL = 1e-4
_FLUSH_S = 60.0


@dataclass(frozen=True)
class Served:
    """A prefill as it was seen: ``kl`` in nats of the first token from full recompute's."""

    result: PrefillResult
    namespace: str
    kl: float


class _Prefill:
    """A prompt on its way through the engine, whose end somebody looks at first."""

    def __init__(self, prefill: Prefill, ended: Callable[[PrefillResult], None]) -> None:
        self._prefill, self._ended = prefill, ended

    def __getattr__(self, name: str) -> Any:
        return getattr(self._prefill, name)

    def advance(self, most: int) -> PrefillResult | None:
        return self._told(self._prefill.advance(most))

    def compute(self, chunk: Chunk) -> PrefillResult | None:
        return self._told(self._prefill.compute(chunk))

    def computed(self, chunk: Chunk, logits: torch.Tensor, start: float) -> PrefillResult | None:
        return self._told(self._prefill.computed(chunk, logits, start))

    def _told(self, result: PrefillResult | None) -> PrefillResult | None:
        if result is not None:
            self._ended(result)
        return result


def watch_prefills(
    llm: KVShare, watch: Callable[[int, SegmentStream, str, PrefillResult], None]
) -> None:
    """Have `watch` told every prefill's slot, prompt, namespace and result, on the engine's
    thread, before anything is decoded."""
    prefiller = llm._parts.prefiller
    begin = prefiller.begin

    def begun(slot: int, stream: SegmentStream, ns: str, **options: Any) -> Any:
        prefill = begin(slot, stream, ns, **options)
        return _Prefill(prefill, lambda result: watch(slot, stream, ns, result))

    prefiller.begin = begun  # type: ignore[method-assign]


class Watched:
    """One server after the other over one store folder.

    Args:
        folder: of the store; None: RAM only.
        options: of the server.

    Attributes:
        streams: all prompts that were prefilled, by their keys.
        counts: what happened.
    """

    def __init__(self, folder: Path | None, **options: Any) -> None:
        self.streams: dict[bytes, SegmentStream] = {}
        self.counts: Counter[str] = Counter()
        self._folder = folder
        self._options = options
        self._wrong: list[str] = []
        self._seen: list[Served] = []
        self._checked: set[str] = set()
        self._break: str | None = None
        self._failures = 0
        self._threads = threading.active_count()
        self._open()

    # -- what may happen --------------------------------------------------------------------

    def ask(
        self, prompt: Any, params: SamplingParams, options: RequestOptions
    ) -> RequestOutput | Exception:
        """Ask, and check all that must hold of the answer; an error that was asked for is
        returned."""
        asked = self.llm.chat if isinstance(prompt[0], dict) else self.llm.generate
        self._seen.clear()
        broken, output = self._break, None
        try:
            output = asked(prompt, params, options)
        except Exception as error:
            if broken is None:
                raise
            self.counts[f"failed: {broken}"] += 1
            return error
        finally:
            self._break = None
            self._raise_wrong()
        if broken is not None:
            self.counts[f"not noticed: {broken}"] += 1
            return output
        use = output.provenance
        self.counts["answered"] += 1
        self.counts["reused"] += use.reused > 0
        self.counts["exact"] += use.exact > 0
        served = self._seen[-1]
        assert use.exact == served.result.plan.num_exact
        assert use.exact + use.reused + use.recomputed == len(output.prompt_token_ids)
        if options.reuse in ("exact", "off"):
            assert use.reused == 0
        if options.reuse == "off":
            assert use.exact == 0
        # A bound of 0 lets be reused what its donor computed behind the very same tokens.
        if not use.reused or options.max_divergence == 0:
            assert served.kl < ATOL, served
        return output

    def leave(self, prompt: Any, params: SamplingParams, options: RequestOptions) -> None:
        """Ask, and go away in the middle of the answer."""
        chunks = self.llm.stream(prompt, params, options)
        next(chunks, None)
        chunks.close()  # type: ignore[attr-defined]
        self.counts["left"] += 1
        self._raise_wrong()

    def break_next(self, how: str) -> None:
        """The next forward fails: "prefill", "decode"; or is no number: "logits", "kv"."""
        self._break = how
        self._failures = 2 if how == "decode" else 1  # with its batch, and alone

    def restart(self) -> None:
        self.llm.close()
        gc.collect()
        self.counts["restarts"] += 1
        self._open()

    def lose(self, rng: np.random.Generator, how: str) -> None:
        """A donor is gone: "deleted", "evicted" behind everybody's back, or its file "damaged"."""
        nodes = self.donors.nodes()
        if not nodes:
            return
        node_id = nodes[rng.integers(len(nodes))].node_id
        if how == "deleted":
            self.donors.delete(node_id)
        elif how == "evicted":
            self.donors.store._host.delete(node_id)
        elif self._folder is not None:
            files = sorted((self._folder / "kv").glob("*.kvnode"))
            if files:
                file = files[rng.integers(len(files))]
                content = bytearray(file.read_bytes())
                content[rng.integers(len(content))] ^= 1 << rng.integers(8)
                file.write_bytes(content)
        self.counts[how] += 1

    # -- what must hold ---------------------------------------------------------------------

    def check(self, rng: np.random.Generator, most: int = 2) -> None:
        """When nothing runs: slots, threads and files are as they should be, and what is called
        exact is (of at most so many nodes that were not checked before)."""
        engine = self.llm._parts.engine
        with engine._changed:  # who left is gone with the next token
            assert engine._changed.wait_for(lambda: not engine._known, _FLUSH_S)
        assert self.llm.wait_audited(_FLUSH_S)
        assert self.llm.flush(_FLUSH_S) or self.donors.store.counters
        slots = engine._runner.num_slots
        with engine._changed:  # a slot is free some time after its request is known no more
            assert engine._changed.wait_for(lambda: len(engine._free) == slots, _FLUSH_S)
        assert sorted(engine._free) == list(range(slots))
        assert not engine._active and not engine._waiting and not engine._known
        assert not engine._saver.last
        assert engine.healthy
        fresh = [n for n in self.donors.nodes() if n.node_id not in self._checked]
        for i in rng.permutation(len(fresh))[:most]:
            self._check_node(fresh[i])
        if self._folder is not None:
            assert not list(self._folder.rglob("*.tmp"))
            on_disk = self.donors.store._disk
            assert on_disk is not None
            assert len(list((self._folder / "kv").glob("*.kvnode"))) == len(on_disk)
            assert on_disk.num_bytes <= on_disk.max_bytes

    def close(self) -> None:
        self.llm.close()
        gc.collect()  # the watching makes cycles, which hold slots
        # An index is tidied by a thread that nobody waits for.
        until(lambda: threading.active_count() <= self._threads)

    @property
    def donors(self) -> Any:
        donors = self.llm._parts.donors
        assert donors is not None
        return donors

    # -- inside -----------------------------------------------------------------------------

    def _open(self) -> None:
        # Audits are not spread over time: when they are over, nothing goes on beside the checks.
        self.llm = KVShare(
            "tiny-vl",
            embedder=None,
            store_dir=self._folder,
            max_model_len=512,
            audit_budget=1e9,
            **self._options,
        )
        parts = self.llm._parts
        self._reference = SlotRunner(parts.loaded, 1, 512, 4096)
        runner = parts.runner
        for name in ("prefill", "decode"):
            setattr(runner, name, self._breaking(name, getattr(runner, name)))
        watch_prefills(self.llm, self._watch)

    def _breaking(self, name: str, real: Callable[..., torch.Tensor]) -> Callable[..., Any]:
        def forward(slots: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            logits = real(slots, *args, **kwargs)
            if self._break == name and self._failures:
                self._failures -= 1
                raise RuntimeError("out of memory, or so")
            if name == "prefill" and self._break in ("logits", "kv"):
                for kv in self.llm._parts.runner.slot_kv(slots):
                    kv[:, :, 5:] = float("nan")
                if self._break == "logits":
                    return torch.full_like(logits, float("nan"))
            return logits

        return forward

    def _watch(self, slot: int, stream: SegmentStream, ns: str, result: PrefillResult) -> None:
        """On the engine's thread, before anything is decoded."""
        if self._break in ("logits", "kv"):
            return
        try:
            full = self._full(stream, ns)
            k, v = self.llm._parts.runner.slot_kv(slot)
            want_k, want_v = self._reference.slot_kv(0)
            plan, n = result.plan, len(stream)
            exact = int(np.argmax(plan.reused)) if plan.reused.any() else n
            for have, want in ((k, want_k), (v, want_v)):
                off = (have[:, :, :n] - want[:, :, :n]).abs().amax((0, 1, 3))
                if not torch.isfinite(off).all() or (off[:exact] > ATOL).any():
                    self._wrong.append(f"exact positions are off by {off.max()}: {plan}")
            for donor in plan.donors:
                node = self.donors.tree.get(donor)
                if node is not None and node.namespace != ns:
                    self._wrong.append(f"{ns} read {node.namespace}")
            p, q = full.log_softmax(-1), result.logits.log_softmax(-1)
            self._seen.append(Served(result, ns, float((p.exp() * (p - q)).sum())))
            self.streams[stream.align_keys.tobytes()] = stream
        except Exception as error:
            self._wrong.append(repr(error))

    @torch.inference_mode()
    def _full(self, stream: SegmentStream, ns: str, answer: tuple[int, ...] = ()) -> torch.Tensor:
        """Compute a prompt, and an answer behind it, in full; ``[vocab_size]`` of the last."""
        n = len(stream) + len(answer)
        media = None
        if stream.items:
            encoder = self.llm._parts.encoder
            assert encoder is not None
            features = tuple(
                (segment.start, encoder.features(item, ns, reuse=False, keep=False)[0])
                for segment, item in zip(stream.media, stream.items, strict=True)
            )
            media = MediaInputs(stream.positions_to(n), features)
        ids = np.concatenate((stream.token_ids, np.array(answer, np.int64)))
        return self._reference.prefill(0, ids, np.arange(n), None, media).float()

    def _check_node(self, node: Node) -> None:
        keys = node.wide_keys
        known = [s for s in self.streams.values() if np.array_equal(keys[: len(s)], s.align_keys)]
        if not known:
            return  # of an earlier example, or of a request that nobody waited for
        stream = max(known, key=len)
        self._full(stream, node.namespace, tuple(keys[len(stream) :].astype(int).tolist()))
        for piece in self.donors.tree.resolve(node.node_id, 0, node.exact_len):
            try:
                stored = self.donors.store.get(piece.owner, node.namespace)
            except KVUnavailableError:
                continue
            row = stored.node.owned_row(piece.owner_start, piece.length)
            assert row is not None
            for have, want in zip(
                (stored.kv.v, *((stored.kv.k,) if piece.shift == 0 else ())),
                self._reference.slot_kv(0)[::-1],
                strict=False,
            ):
                rows = have[:, :, row : row + piece.length]
                assert torch.allclose(rows, want[:, :, piece.start : piece.end], atol=ATOL), (
                    f"{node} is not exact at {piece}"
                )
        for piece in self.donors.tree.resolve(node.node_id, 0, len(node)):
            owner = self.donors.tree[piece.owner]
            assert owner.namespace == node.namespace
        self.counts["nodes checked"] += 1
        self._checked.add(node.node_id)

    def _raise_wrong(self) -> None:
        wrong, self._wrong = self._wrong, []
        assert not wrong, wrong
