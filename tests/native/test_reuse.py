"""Who shares with whom: as a request, the engine and the model allow."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import MambaConfig, MambaForCausalLM

from kvshare_mm import KVShare, RequestOptions

from .. import references
from ..semantics.engines import told
from .asking import _DONOR, _PROMPTS, _TARGET, OpenLLM, outcomes, params


def test_the_engines_salt_holds_unless_a_request_has_its_own(open_llm: OpenLLM) -> None:
    llm = open_llm(cache_salt="house")
    llm.generate(_DONOR, params(2))
    llm.flush()
    unstored = RequestOptions(store=False)
    assert llm.generate(_TARGET, params(2), unstored).provenance.reused > 0
    named = RequestOptions(cache_salt="house", store=False)
    assert llm.generate(_TARGET, params(2), named).provenance.reused > 0
    other = RequestOptions(cache_salt="", store=False)
    assert llm.generate(_TARGET, params(2), other).provenance.declined == "no_donor"


def test_reuse_off_for_all(open_llm: OpenLLM) -> None:
    llm = open_llm(reuse="off")
    for options in (None, RequestOptions(reuse="similar")):
        output = llm.generate(_DONOR, params(2), options)
        assert output.provenance.declined == "reuse_off"
    assert llm.flush()
    assert "donors" not in llm.stats()


def test_exact_for_all_is_not_widened_by_a_request(open_llm: OpenLLM) -> None:
    llm = open_llm(reuse="exact")
    llm.generate(_DONOR, params(2))
    llm.flush()
    p = llm.generate(_TARGET, params(2), RequestOptions(reuse="similar")).provenance
    assert p.exact > 0
    assert p.reused == 0


def test_a_model_that_cannot_share_is_served_in_full(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MambaConfig(vocab_size=400, hidden_size=32, state_size=8, num_hidden_layers=2)
        model = MambaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    prompts = _PROMPTS[:3]
    with KVShare(str(tmp_path), embedder=None, max_num_seqs=2) as llm:
        outputs = llm.generate(prompts, params(6))
        assert "declined_unsupported_model" in outcomes(llm)
        assert llm.stats()["unsupported"]
        assert llm.flush()
    for output in outputs:
        assert told(output) == (0, 0, len(output.prompt_token_ids))
        prompt = references.text(output.prompt_token_ids)
        assert list(output.token_ids) == references.greedy(model, prompt, 6)
