"""Where the last rows of a forward look, beside the slow reference and transformers' own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from kvshare_mm.attention import TailAttention
from kvshare_mm.kernels.reference import partial_attention_reference
from kvshare_mm.kernels.scoring import PLAIN, Scoring
from kvshare_mm.native.slots import SlotRunner

SCORINGS = {
    "plain": PLAIN,
    "window": Scoring(window=5),
    "chunks": Scoring(chunk=8),
    "softcap and sinks": Scoring(softcap=2.0, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
}


@pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS)
@pytest.mark.parametrize("rows", [1, 3, 12, 40])
def test_each_row_sees_what_is_before_it(rows: int, scoring: Scoring) -> None:
    torch.manual_seed(rows)
    query, key = torch.randn(4, 12, 8), torch.randn(2, 20, 8)
    tail = TailAttention(rows)
    tail.add(query, key, 0.3, scoring)
    index = torch.arange(8, 20)
    each = partial_attention_reference(query, key, torch.eye(20).expand(2, -1, -1), index, 0.3,
                                       scoring)  # fmt: skip
    want = each[:, -rows:].mean((0, 1))
    assert tail.mass is not None
    assert np.allclose(tail.mass, want.numpy(), atol=1e-6)


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("rest", [7, 16])
def test_the_mean_over_layers_is_that_of_transformers(tiny: Any, rows: int, rest: int) -> None:
    """Over the KV of another prompt; the rows are the end of those that are computed."""
    rng = np.random.default_rng(rows)
    ids, other = rng.integers(0, 128, 40), tiny.full(rng.integers(0, 128, 40))
    eager = AutoModelForCausalLM.from_config(
        tiny.reference.config, attn_implementation="eager", dtype=torch.float32
    )
    eager.load_state_dict(tiny.reference.state_dict())
    cache = DynamicCache(config=eager.config)
    for i in range(len(other.k)):
        cache.update(other.k[i : i + 1, :, : 40 - rest], other.v[i : i + 1, :, : 40 - rest], i)
    with torch.inference_mode():
        looks = eager.eval()(
            input_ids=torch.from_numpy(ids[40 - rest :])[None],
            past_key_values=cache,
            output_attentions=True,
        ).attentions
    want = torch.stack(looks)[:, 0, :, -rows:].mean((0, 1, 2))
    runner, tail = SlotRunner(tiny.loaded, 1, 48, 4096), TailAttention(rows)
    for tensor, source in zip(runner.slot_kv(0), (other.k, other.v), strict=True):
        tensor[:, :, :40] = source
    runner.prefill(0, ids, np.arange(40 - rest, 40), tail)
    assert tail.mass is not None
    assert np.allclose(tail.mass, want.numpy(), atol=1e-5)
