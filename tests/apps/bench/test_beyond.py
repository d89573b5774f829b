"""Measures beyond the first token, beside slow references."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvshare_mm.apps.bench.beyond import action_of, beyond_first_token
from kvshare_mm.apps.bench.methods import FULL, METHODS
from kvshare_mm.apps.bench.prompts import encode
from kvshare_mm.apps.bench.rig import Rig
from kvshare_mm.reuse.audits import kl_divergence


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        ('Sure.\n<tool_call>\n{"arguments": {"b": 1, "a": 2}, "name": "f"}\n</tool_call>', "call",
         '["f", {"a": 2, "b": 1}]'),
        ('<tool_call>\n{"name": "f"}', "call", '["f", null]'),
        ("<tool_call>\n{broken}\n</tool_call>", "text", "<tool_call> {broken} </tool_call>"),
        ("I look.\n```bash\nls  -l\n```\nThen more.", "command", "ls -l"),
        ("Hello\n  there", "text", "Hello there"),
    ],
)  # fmt: skip
def test_an_action_is_read_from_an_answer(answer: str, kind: str, said: str) -> None:
    assert (action_of(answer).kind, action_of(answer).said) == (kind, said)


def test_beyond_the_first_token(rig: Rig) -> None:
    donor, target = (encode(rig, f"Patient {n}. " + "What is the value? " * 20) for n in (7, 94))
    ns = rig.namespace("beyond")
    with rig.known(donor, ns):
        full = rig.serve(target, ns, FULL, 0)
        loose = rig.serve(target, ns, METHODS["placeholders"], 1)
    again = rig.serve(target, ns, FULL, 2)
    own = [rig.words(answer) for answer in rig.decode([full, loose], 12)]
    first, second, itself = beyond_first_token(rig, [full, loose, again], 12)
    assert [first["answer"], second["answer"]] == own
    assert first["kl_along"] == first["kl_worst"] == 0 and first["action_same"]
    assert second["kl_worst"] >= second["kl_along"] > itself["kl_along"]
    assert itself["kl_worst"] < 1e-6 and itself["greedy_agreement"] == 1
    alone = beyond_first_token(rig, [full, loose], 1)[1]
    assert alone["kl_along"] == kl_divergence(full.result.logits, loose.result.logits)


def test_rounding_alone_is_measured_beside_the_others(rig: Rig) -> None:
    """Its KV is in another runner's slots: answers go on where their own prompt is."""
    ns = rig.namespace("rounded")
    target = encode(rig, "Patient 12. " + "What is the value? " * 20)
    full, again = (rig.serve(target, ns, FULL, slot) for slot in (0, 2))
    rounded = rig.serve(target, ns, METHODS["bfloat16"], 1)
    found = beyond_first_token(rig, [full, rounded, again], 12)
    assert [one["kl_along"] for one in (found[0], found[2])] == pytest.approx([0, 0], abs=1e-9)
    assert found[1]["kl_along"] > 0
    model = AutoModelForCausalLM.from_pretrained(rig.config.model, dtype=torch.bfloat16)
    with torch.inference_mode():
        reference = model(torch.from_numpy(target.token_ids)[None]).logits[0, -1].float()
    torch.testing.assert_close(rounded.result.logits, reference, atol=0.05, rtol=0.05)
