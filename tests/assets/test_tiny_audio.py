"""The embedded audio model: loads, is small, says what was measured, and answers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from kvshare_mm.assets import folder
from kvshare_mm.assets.training.calls import AUDIO_TOPICS, TEXT_TOPICS, TOPICS

NAME = "tiny-audio"


def figures() -> Any:
    return json.loads((folder(NAME) / "figures.json").read_text(encoding="utf-8"))


def test_it_understands_its_words_and_the_controls_fail() -> None:
    shown = figures()
    card = (folder(NAME) / "README.md").read_text(encoding="utf-8")
    assert f"{shown['real_digits']['all']['right']:.3f} of" in card
    assert set(shown["held_out_voices"]) == {"all", *TOPICS}
    assert min(cell["questions"] for cell in shown["held_out_voices"].values()) >= 50
    assert shown["single_words_right"] >= 0.95 and shown["held_out_voices"]["all"]["right"] >= 0.95
    for topic in set(AUDIO_TOPICS) - {"count"}:  # two clips in three differ in length
        assert shown["wrong_clip"][topic]["right"] < 0.2
    for topic in TEXT_TOPICS:
        assert shown["without_facts"][topic]["right"] < 0.2


def test_it_loads_as_qwen2_audio() -> None:
    from transformers import AutoConfig, AutoProcessor, Qwen2AudioForConditionalGeneration

    where = folder(NAME)
    assert AutoConfig.from_pretrained(where).model_type == "qwen2_audio"
    processor: Any = AutoProcessor.from_pretrained(where)
    model: Any = Qwen2AudioForConditionalGeneration.from_pretrained(where, dtype=torch.float32)
    content = [
        {"type": "audio", "audio": np.zeros(16_000, dtype=np.float32)},
        {"type": "text", "text": "What do you hear?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert int((inputs["input_ids"] == model.config.audio_token_id).sum()) == 25  # one second
    with torch.inference_mode():
        assert model(**inputs).logits.isfinite().all()


def test_samples_name_the_sounds_beside_them() -> None:
    where = folder(NAME) / "samples"
    lines = (where / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    named = [
        part["audio"]
        for line in lines
        for part in json.loads(line)["messages"][1]["content"]
        if part["type"] == "audio"
    ]
    assert sorted(named) == sorted(path.name for path in where.glob("*.flac"))


@pytest.mark.e2e
def test_it_answers_the_samples_and_not_about_other_sounds() -> None:
    from kvshare_mm.assets.training.evaluate_audio import Answerer, measure_samples, samples

    answerer = Answerer(folder(NAME))
    measured = measure_samples(answerer, folder(NAME) / "samples")
    assert measured["all"]["right"] >= 0.9
    heard = [item for item in samples(folder(NAME) / "samples") if item[0] in AUDIO_TOPICS]
    sounds = [messages[1]["content"][0]["audio"] for _, messages, _ in heard]
    right = []
    for number, (_, messages, answer) in enumerate(heard):
        messages[1]["content"][0]["audio"] = sounds[number - 1]
        right.append(answerer.answers([messages])[0] == answer)
    assert sum(right) <= len(right) / 2
