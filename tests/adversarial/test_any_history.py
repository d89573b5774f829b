"""Any history of requests, careless and careful, broken and cut off, over restarts.

``KVSHARE_STEPS=10000`` runs it long; what happened is printed at the end (``pytest -s``).
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvshare_mm import ModelOutputError, RequestOptions, SamplingParams
from kvshare_mm.reuse.divergence import divergence_bound, residual_risk

from .watched import Watched

_STEPS = 50
_NUM_STEPS = int(os.environ.get("KVSHARE_STEPS", "150"))
_SAMPLES = sorted((Path(__file__).parents[2] / "assets/tiny-vl/samples").glob("*.png"))[:4]
_QUESTIONS = (
    "What is in the picture, and which colour does it have?",
    "What is in the picture?",
    "Say in one word what you see.",
)

totals: Counter[str] = Counter()
policies = st.sampled_from(
    [
        {},
        {"repair": "none"},
        {"repair": "window:2"},
        {"repair": "tail:4"},
        {"repair": "auto:1"},
        {"max_divergence": 0.0},
        {"max_divergence": 1e-6},
        {"max_divergence": 0.001},
        {"reuse": "exact"},
        {"reuse": "off"},
    ]
)
salts = st.sampled_from(["", "", "", "tenant"])


class Histories(RuleBasedStateMachine):
    @initialize(
        seed=st.integers(0, 2**32 - 1),
        slots=st.sampled_from([1, 2]),
        host=st.sampled_from([1 << 20, 1 << 24]),
        disk=st.sampled_from([None, 1 << 20, 1 << 24]),
    )
    def start(self, seed: int, slots: int, host: int, disk: int | None) -> None:
        self.folder = None if disk is None else Path(tempfile.mkdtemp(prefix="kvshare-history-"))
        options = {"max_num_seqs": slots, "host_bytes": host, "min_gain_share": 0.1}
        self.server = Watched(self.folder, **options, **({"disk_bytes": disk} if disk else {}))
        self.rng = np.random.default_rng(seed)
        tokenizer = self.server.llm.tokenizer
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        self.tokens = [i for i in range(len(tokenizer)) if i not in special]
        self.parts = [self._new(int(n)) for n in self.rng.integers(8, 60, 10)]
        self.prompts = [self._new(60)]

    def _new(self, n: int) -> list[int]:
        return [int(t) for t in self.rng.choice(self.tokens, n)]

    def _prompt(self) -> list[int]:
        """An earlier one edited, extended, cut or repeated, or a new one of common parts."""
        rng = self.rng
        prompt = list(self.prompts[rng.integers(len(self.prompts))])
        kind = rng.integers(6)
        if kind == 0:
            prompt = [t for i in rng.integers(0, 10, rng.integers(2, 6)) for t in self.parts[i]]
        elif kind in (1, 2):
            for _ in range(rng.integers(1, 4)):
                at = int(rng.integers(len(prompt)))
                prompt[at : at + int(rng.integers(0, 6))] = self._new(int(rng.integers(0, 6)))
        elif kind == 3:
            prompt += self._new(int(rng.integers(1, 30)))
        elif kind == 4:
            prompt = prompt[: int(rng.integers(len(prompt) // 2, len(prompt) + 1))]
        prompt = prompt[:300] if len(prompt) > 10 else self._new(40)
        self.prompts = [*self.prompts[-9:], prompt]
        return prompt

    def _params(self) -> SamplingParams:
        rng = self.rng
        return SamplingParams(
            max_tokens=int(rng.integers(1, 8)),
            ignore_eos=True,
            temperature=float(rng.integers(2)),
            seed=int(rng.integers(1000)),
        )

    @rule(policy=policies, salt=salts, store=st.sampled_from([True, True, True, False]))
    def ask(self, policy: dict, salt: str, store: bool) -> None:
        options = RequestOptions(cache_salt=salt, store=store, **policy)
        output = self.server.ask(self._prompt(), self._params(), options)
        assert not isinstance(output, Exception)
        answer = [t for t in output.token_ids if t in self.tokens]
        self.prompts.append([*self.prompts[-1], *answer])
        self._account(policy)

    def _account(self, policy: dict) -> None:
        """Whether the divergence stays below the bound that the plan was accepted with."""
        served = self.server._seen[-1]
        plan = served.result.plan
        if not plan.num_reused or policy.get("repair") in ("none", "window:2", "tail:4"):
            return
        bound = divergence_bound(residual_risk(plan))
        kind = "on others' approximate KV" if plan.inherited is not None else "on fresh donors"
        totals[f"bounded {kind}"] += 1
        totals[f"above its bound {kind}"] += served.kl > max(bound, 1e-6)

    @rule(policy=policies, salt=salts)
    def ask_about_a_picture(self, policy: dict, salt: str) -> None:
        rng = self.rng
        name = f"Customer {rng.integers(30)}."
        picture = {"type": "image", "image": str(_SAMPLES[rng.integers(len(_SAMPLES))])}
        text = {"type": "text", "text": _QUESTIONS[rng.integers(3)]}
        before = {"type": "text", "text": name}
        content = [picture, text] if rng.random() < 0.5 else [before, picture, text]
        messages = [{"role": "user", "content": content}]
        self.server.ask(messages, self._params(), RequestOptions(cache_salt=salt, **policy))

    @rule(policy=policies)
    def leave(self, policy: dict) -> None:
        params = SamplingParams(max_tokens=30, ignore_eos=True)
        self.server.leave(self._prompt(), params, RequestOptions(**policy))

    @rule(how=st.sampled_from(["prefill", "decode", "logits", "kv"]), policy=policies)
    def ask_a_broken_model(self, how: str, policy: dict) -> None:
        self.server.break_next(how)
        params = SamplingParams(max_tokens=3, ignore_eos=True)
        error = self.server.ask(self._prompt(), params, RequestOptions(**policy))
        # Of what was decoded over KV that is no number, the logits are none either.
        wanted = ModelOutputError if how in ("logits", "kv") else RuntimeError
        assert isinstance(error, wanted), (how, error)

    @rule(policy=policies)
    def ask_a_model_whose_kv_is_no_number_for_one_token(self, policy: dict) -> None:
        """Its logits are numbers still: nobody notices but who would store it."""
        before = {node.node_id for node in self.server.donors.nodes()}
        self.server.break_next("kv")
        params = SamplingParams(max_tokens=1, ignore_eos=True)
        output = self.server.ask(self._prompt(), params, RequestOptions(**policy))
        assert not isinstance(output, Exception)
        self.server.llm.flush()
        assert {node.node_id for node in self.server.donors.nodes()} <= before

    @rule(how=st.sampled_from(["deleted", "evicted", "damaged"]))
    def lose(self, how: str) -> None:
        self.server.lose(self.rng, how)

    @precondition(lambda self: self.rng.random() < 0.3)
    @rule()
    def restart(self) -> None:
        self.server.restart()

    @invariant()
    def all_is_as_it_should_be(self) -> None:
        if hasattr(self, "server"):
            self.server.check(self.rng)
            totals["steps"] += 1

    def teardown(self) -> None:
        if hasattr(self, "server"):
            self.server.close()
            totals.update(self.server.counts)
            if self.folder is not None:
                shutil.rmtree(self.folder)


@pytest.fixture(autouse=True)
def one_thread_and_no_log() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # pytest keeps what is logged, and each traceback of a failure a whole server.
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


def test_any_history() -> None:
    totals.clear()
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=max(1, _NUM_STEPS // _STEPS),
            stateful_step_count=_STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],  # to shrink means to serve it all again, many times
        ),
    )
    print("\n" + "\n".join(f"{count:7} {name}" for name, count in sorted(totals.items())))
    assert totals["answered"] and totals["nodes checked"]
