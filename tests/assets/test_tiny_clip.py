"""The embedded open_clip model: open_clip loads it, and it finds products by words and pictures."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvshare_mm.assets import folder
from kvshare_mm.assets.shop.pictures import KINDS, Photo, random_photo
from kvshare_mm.assets.training.captions import caption, random_caption, short_caption
from kvshare_mm.assets.training.evaluate_clip import Encoder, distinct

NAME = "tiny-clip"


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(folder(NAME))


def test_its_card_says_what_was_measured() -> None:
    card = (folder(NAME) / "README.md").read_text(encoding="utf-8")
    figures: dict[str, Any] = json.loads((folder(NAME) / "figures.json").read_text())
    for key in ("zero_shot_kind_and_colour_of_48", "zero_shot_unseen_pairs"):
        assert f"| {figures[key]:.3f} |" in card
    assert figures["zero_shot_kind_and_colour_of_48"] >= 0.95
    assert figures["captions_of_100_pictures"]["text_of_picture_at_1"] >= 0.7
    assert figures["control_zero_shot_of_another_picture"] < 0.1


def test_it_finds_the_product_by_words(encoder: Encoder) -> None:
    rng = random.Random(3)
    photos = [replace(random_photo(rng, held_out=True), kind=kind) for kind in KINDS]
    pictures = encoder.pictures(photos)
    texts = encoder.texts([short_caption(photo.kind, photo.colour) for photo in photos])
    torch.testing.assert_close(pictures.norm(dim=1), torch.ones(len(KINDS)))
    assert ((pictures @ texts.T).argmax(1) == torch.arange(len(KINDS))).sum() >= len(KINDS) - 1


def test_equal_pictures_have_equal_vectors(encoder: Encoder) -> None:
    photo = random_photo(random.Random(1), held_out=True)
    alone, among = encoder.pictures([photo]), encoder.pictures([photo, replace(photo, seed=1)])
    torch.testing.assert_close(alone[0], among[0], atol=1e-5, rtol=1e-4)
    assert (among[0] - among[1]).abs().max() > 1e-3


def test_the_tokenizer_knows_all_words_of_captions(encoder: Encoder) -> None:
    rng = random.Random(2)
    ids = encoder.tokenizer([random_caption(random_photo(rng), rng) for _ in range(200)])
    unknown = encoder.tokenizer.tokenizer.unk_token_id
    assert ids.shape == (200, 24) and not (ids == unknown).any()


def test_captions_say_what_is_on_the_photo() -> None:
    photo = Photo("kettle", "red", 3, True, "07", seed=1)
    assert caption(photo) == "a photo of a red kettle with three buttons, cracked"
    assert len({caption(photo) for photo in distinct(random.Random(0), 50)}) == 50
    rng = random.Random(0)
    for _ in range(50):
        text = random_caption(photo, rng)
        assert "kettle" in text and "red" in text and "intact" not in text


def test_training_writes_a_folder_that_open_clip_loads(tmp_path: Path) -> None:
    from kvshare_mm.assets.training.train_clip import build_model, build_tokenizer, pixels, save

    torch.manual_seed(0)
    model = build_model().eval()
    save(model, build_tokenizer(), tmp_path)
    loaded = Encoder(tmp_path)
    photos = [random_photo(random.Random(5))]
    with torch.inference_mode():
        ours = model.encode_image(pixels(photos), normalize=True)
    # weights were rounded to float16; the preprocessing of both must agree
    torch.testing.assert_close(loaded.pictures(photos), ours, atol=5e-3, rtol=0)
