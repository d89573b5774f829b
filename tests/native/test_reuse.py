"""Who shares with whom: as a request, the engine and the model allow."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from kvshare_mm import KVShare, RequestOptions

from .asking import _DONOR, _PROMPTS, _TARGET, OpenLLM, check_provenance, outcomes, params


def test_reuse_of_one_request(llm: KVShare) -> None:
    salt = "reuse-option"
    full = llm.generate(_TARGET, params(4), RequestOptions(reuse="off", cache_salt=salt))
    llm.flush()
    assert full.provenance.declined == "reuse_off"
    first = llm.generate(_DONOR, params(4), RequestOptions(cache_salt=salt))
    llm.flush()
    assert first.provenance.declined == "no_donor"  # what shares nothing is no donor either
    unstored = {"cache_salt": salt, "store": False}
    off = llm.generate(_TARGET, params(4), RequestOptions(reuse="off", **unstored))
    exact = llm.generate(_TARGET, params(4), RequestOptions(reuse="exact", **unstored))
    on = llm.generate(_TARGET, params(4), RequestOptions(reuse="similar", **unstored))
    assert (off.provenance.exact, off.provenance.reused) == (0, 0)
    assert off.provenance.declined == "reuse_off"
    assert exact.provenance.exact > 0
    assert exact.provenance.reused == 0
    assert exact.provenance.declined == "exact_only"
    assert on.provenance.reused > 0
    assert on.provenance.declined is None
    assert exact.token_ids == off.token_ids == full.token_ids


def test_repair_of_one_request(llm: KVShare) -> None:
    salt = "repair-option"
    llm.generate(_DONOR, params(2), RequestOptions(cache_salt=salt))
    llm.flush()

    def computed(repair: str | None) -> int:
        options = RequestOptions(cache_salt=salt, repair=repair, store=False)
        return llm.generate(_TARGET, params(2), options).provenance.recomputed

    none = computed("none")
    assert none < computed("window:4") < computed("window:16+tail:30")
    assert none <= computed(None)


def test_salts_do_not_share(llm: KVShare) -> None:
    llm.generate(_DONOR, params(2), RequestOptions(cache_salt="tenant a"))
    llm.flush()
    for salt, reuses in (("tenant a", True), ("tenant b", False), ("TENANT A", False)):
        options = RequestOptions(cache_salt=salt, store=False)
        p = llm.generate(_TARGET, params(2), options).provenance
        assert (p.reused > 0) == reuses
        assert (p.declined == "no_donor") != reuses


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


def test_a_request_that_is_not_stored_is_no_donor(open_llm: OpenLLM) -> None:
    llm = open_llm()
    llm.generate(_DONOR, params(2), RequestOptions(store=False))
    llm.flush()
    assert llm.stats()["donors"]["nodes"] == 0
    assert llm.generate(_TARGET, params(2)).provenance.declined == "no_donor"


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
        model = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=2)).eval()
    model.save_pretrained(tmp_path)
    prompts = _PROMPTS[:3]
    with KVShare(str(tmp_path), embedder=None, max_num_seqs=2) as llm:
        outputs = llm.generate(prompts, params(6))
        assert "declined_unsupported_model" in outcomes(llm)
        assert llm.stats()["unsupported"]
        assert llm.flush()
    for output in outputs:
        check_provenance(output)
        assert output.provenance.recomputed == len(output.prompt_token_ids)
        ids = torch.tensor([output.prompt_token_ids])
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert output.token_ids == tuple(whole[0, ids.shape[1] :].tolist())
