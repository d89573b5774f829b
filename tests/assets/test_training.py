"""What training computes is what transformers computes, and a stopped stage goes on."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kvshare_mm.assets.shop.dialogues import random_question
from kvshare_mm.assets.shop.phrases import TOPICS
from kvshare_mm.assets.shop.pictures import draw, random_photo
from kvshare_mm.assets.shop.similar import random_request
from kvshare_mm.assets.training.batches import Batcher
from kvshare_mm.assets.training.clock import Stage
from kvshare_mm.assets.training.codes import SIZES, code_loss, codebook, labels, oracle
from kvshare_mm.assets.training.optim import MuonAdamW, orthogonal
from kvshare_mm.assets.training.packing import Branch, Row, answer_loss, pack
from kvshare_mm.assets.training.tower import FastTower


@pytest.fixture(scope="module")
def processor() -> Any:
    from kvshare_mm.assets.training.vl_model import build_processor

    return build_processor()


@pytest.fixture(scope="module")
def model(processor: Any) -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration

    from kvshare_mm.assets.training.vl_model import build_config

    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(build_config(processor.tokenizer)).eval()


@pytest.mark.parametrize("num_photos", [1, 2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_branches_are_the_requests_that_the_processor_and_the_model_see(
    processor: Any, model: Any, num_photos: int, seed: int
) -> None:
    rng = random.Random(seed)
    request = random_request(rng, TOPICS[0], num_photos=num_photos)
    questions = [random_question(rng, topic, num_photos) for topic in TOPICS[:3]]
    batcher = Batcher(processor.tokenizer, random.Random(0))
    batcher.rng.random = lambda: 1.0  # type: ignore[method-assign]  # no second questions
    packed = pack([batcher.row(request, questions)], batcher.pad, batcher.mrope)
    images = processor.image_processor
    tower = FastTower(model.model.visual, images.image_mean, images.image_std)
    core = model.model.language_model
    with torch.no_grad():
        tokens, _ = tower(np.stack([np.asarray(picture) for picture in request.pictures()]))
        embeds = core.embed_tokens(packed.ids)
        where = (packed.ids == model.config.image_token_id)[..., None]
        hidden = core(
            inputs_embeds=embeds.masked_scatter(where, tokens),
            position_ids=packed.positions,
            attention_mask=packed.visible,
            use_cache=False,
        ).last_hidden_state
        ours = model.lm_head(hidden)[0]
    for number, question in enumerate(questions):
        asked = replace(request, question=question)
        inputs = processor.apply_chat_template(
            asked.messages(),
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        context = packed.branch[0] < 0
        mine = context | (packed.branch[0] == number)
        seen = packed.ids[0][mine]
        length = inputs["input_ids"].shape[1]
        assert seen[:length].tolist() == inputs["input_ids"][0].tolist()
        answer = processor.tokenizer.decode(seen[length:])
        assert answer == asked.answer() + "<|im_end|>"
        with torch.no_grad():
            theirs = model(**inputs).logits[0]
        torch.testing.assert_close(ours[mine][:length], theirs, atol=2e-5, rtol=1e-4)


def test_padding_and_other_branches_are_invisible() -> None:
    rows = [
        Row([1, 2], [Branch([3, 4], [False, True], "a"), Branch([5], [True], "b")]),
        Row([6], [Branch([7], [True], "c")]),
    ]
    packed = pack(rows, pad=0)
    seen = packed.visible[:, 0]
    assert seen[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert packed.positions[0].tolist()[0] == [0, 1, 2, 3, 2]
    assert not seen[1, :2, 2:].any() and packed.topics == ["a", "b", "c"]


def test_an_answer_is_right_when_all_its_tokens_are() -> None:
    rows = [Row([1], [Branch([2, 3], [True, True], "a"), Branch([2, 3], [True, True], "b")])]
    packed = pack(rows, pad=0)
    logits = torch.zeros(4, 5)
    logits[torch.arange(4), torch.tensor([2, 3, 2, 4])] = 9.0
    loss, exact = answer_loss(packed, logits)
    assert exact == {"a": 1.0, "b": 0.0} and loss > 2


def test_a_perfect_tower_has_no_code_to_learn() -> None:
    photos = [random_photo(random.Random(seed)) for seed in range(20)]
    book = codebook(192)
    torch.testing.assert_close(book @ book.T / 0.16, torch.eye(sum(SIZES)), atol=1e-4, rtol=0)
    tokens = oracle(book, photos, torch.Generator().manual_seed(0))
    loss, accuracy = code_loss(book, tokens, photos)
    assert accuracy == [1.0] * len(SIZES)
    loss_of_others, worse = code_loss(book, tokens.roll(1, 0), photos)
    assert loss_of_others > loss + 1 and min(worse) < 0.6
    assert len({labels(photo) for photo in photos}) == len(photos)


def test_muon_orthogonalises() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(40, 24)))
    assert values.min() > 0.5 and values.max() < 1.5


def _regression(file: Path, minutes: float) -> tuple[nn.Module, Stage, MuonAdamW]:
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimiser = MuonAdamW([*model.named_parameters()], 0.05)
    state = {"model": model, "optimiser": optimiser}
    return model, Stage(file, minutes, state, peak=0.05, warmup=5), optimiser


def test_a_stopped_stage_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.count()  # a step takes one second
    monkeypatch.setattr("time.process_time", lambda: float(next(seconds)))
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    y = x[:, :3] * 2
    model, stage, optimiser = _regression(tmp_path / "fit.pt", minutes=1.0)
    losses = []
    for _ in stage:
        loss = (model(x) - y).square().mean()
        losses.append(loss.item())
        optimiser.step(loss, stage.rate)
    assert stage.step == len(losses) == 60 and losses[-1] < losses[0] / 2
    assert stage.progress == 1.0 and stage.rate == pytest.approx(0.05 * 0.02)
    again, continued, other = _regression(tmp_path / "fit.pt", minutes=2.0)
    assert continued.step == 60 and continued.progress == 0.5
    torch.testing.assert_close(again.state_dict(), model.state_dict())
    assert all(part["state"] for part in other.state_dict())
    assert sum(1 for _ in continued) == 60


def test_drawing_is_uint8_for_the_tower(processor: Any, model: Any) -> None:
    images = processor.image_processor
    tower = FastTower(model.model.visual, images.image_mean, images.image_std)
    pictures = [draw(random_photo(random.Random(seed))) for seed in range(3)]
    inputs = images(pictures, return_tensors="pt")
    with torch.no_grad():
        theirs = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        ours, _ = tower(np.stack([np.asarray(picture) for picture in pictures]))
    torch.testing.assert_close(
        ours.reshape(-1, ours.shape[-1]), theirs.pooler_output, atol=2e-6, rtol=1e-4
    )
