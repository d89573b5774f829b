"""Calls and the audio model's shorter pass; no espeak-ng is needed here."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from kvshare_mm.assets.training.audio_model import encode
from kvshare_mm.assets.training.calls import TOPICS, calls, random_call
from kvshare_mm.assets.training.packing import pack
from kvshare_mm.assets.training.speech import (
    HELD_OUT_VOICES,
    MAX_SECONDS,
    RATE,
    TRAINED_VOICES,
    WORDS,
    Bank,
    load_bank,
    make_clip,
    trim,
)
from kvshare_mm.assets.training.train_audio import SILENCE, Trainer, word_of


@pytest.fixture(scope="module")
def bank() -> Bank:
    """Tones in place of words: word n is 300 + 100 n Hz."""
    time = np.arange(int(0.4 * RATE)) / RATE
    tones = [np.sin(2 * np.pi * (300 + 100 * n) * time) for n in range(len(WORDS))]
    return Bank([[tone.astype(np.float32) * 0.9 for tone in tones]])


def test_held_out_voices_are_never_trained_on() -> None:
    assert not set(HELD_OUT_VOICES.split()) & set(TRAINED_VOICES.split())


def test_a_bank_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="espeak-ng"):
        load_bank(tmp_path / "none.npz", 1, held_out=True, seed=0)
    lengths = np.arange(2 * len(WORDS)).reshape(2, -1) + 5
    samples = np.arange(lengths.sum()).astype(np.int16)
    np.savez(tmp_path / "bank.npz", lengths=lengths, samples=samples)
    bank = load_bank(tmp_path / "bank.npz", 2, held_out=True, seed=0)
    assert [len(sound) for speaker in bank.sounds for sound in speaker] == lengths.ravel().tolist()
    assert bank.sounds[0][1][0] == pytest.approx(5 / 32768)


def test_clips_say_their_words_when_they_claim(bank: Bank) -> None:
    for seed in range(20):
        clip = make_clip(bank, random.Random(seed))
        assert clip.samples.dtype == np.float32 and np.abs(clip.samples).max() <= 1.0
        assert len(clip.samples) <= MAX_SECONDS * RATE
        for word, (start, end) in zip(clip.words, clip.times, strict=True):
            part = clip.samples[int(start * RATE) : int(end * RATE)]
            spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part)), n=RATE))
            loudest = 250 + int(spectrum[250:2000].argmax())
            assert loudest == pytest.approx(300 + 100 * WORDS.index(word), abs=20)


def test_tokens_are_labelled_with_the_word_they_are_in(bank: Bank) -> None:
    clip = make_clip(bank, random.Random(1), ("two", "nine"))
    (start, end), (again, _) = clip.times
    found = [word_of(clip, token) for token in range(60)]
    assert found[int((start + end) / 2 / 0.04)] == WORDS.index("two")
    assert found[int((end + again) / 2 / 0.04)] == SILENCE
    assert WORDS.index("nine") in found and found[-1] == SILENCE


def test_trimming_keeps_the_sound() -> None:
    samples = np.concatenate([np.zeros(5000), 0.5 * np.ones(3000), np.zeros(4000)])
    part = trim(samples.astype(np.float32))
    assert len(part) == 3000 + 160 + 319 and part.max() == pytest.approx(0.9)


def test_answers_follow_the_clip_and_the_facts(bank: Bank) -> None:
    rng = random.Random(0)
    clip = make_clip(bank, rng, ("four", "help"))
    answers = {topic: random_call(rng, clip, topic).answer() for topic in TOPICS}
    assert answers["words"] == "I hear: four help."
    assert answers["first"] == "The first word is four."
    assert answers["last"] == "The last word is help."
    assert answers["count"] == "I hear two words."
    call = random_call(rng, clip, "caller")
    assert call.name in call.answer() and call.name in call.system_text()
    assert call.name not in call.system_text(facts=False)
    assert call.city in call.system_text()


def test_the_short_pass_is_the_model(bank: Bank) -> None:
    trainer = Trainer(0)
    model = trainer.model.eval()
    for call, _ in zip(calls(bank, 0), range(2), strict=False):
        inputs = trainer.processor.apply_chat_template(
            call.messages(),
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            theirs = model(**inputs).logits[0]
            tokens, counts = encode(model.model.audio_tower, *trainer.features([call.clip]))
            packed = pack([trainer.row(call, int(counts), random.Random(0))], trainer.pad)
            decoder = model.model.language_model
            where = (packed.ids == trainer.audio[1])[..., None]
            sound = model.model.multi_modal_projector(tokens[0, : int(counts)])
            hidden = decoder(
                inputs_embeds=decoder.embed_tokens(packed.ids).masked_scatter(where, sound),
                position_ids=packed.positions[0],
                attention_mask=packed.visible,
            ).last_hidden_state
            ours = model.lm_head(hidden)[0]
        length = int((packed.branch[0] < 0).sum())
        assert packed.ids[0, :length].tolist() == inputs["input_ids"][0, :length].tolist()
        torch.testing.assert_close(ours[:length], theirs[:length], atol=2e-5, rtol=1e-4)
