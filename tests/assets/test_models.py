"""The embedded models: they load, are small, say what was measured, and answer."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvshare_mm.assets import folder
from kvshare_mm.assets.shop.phrases import PICTURE_TOPICS, POLICY_TOPICS, TOPICS
from kvshare_mm.assets.shop.pictures import COLOURS, KINDS, MAX_BUTTONS, Photo, draw

needs_training = pytest.mark.skipif(
    importlib.util.find_spec("kvshare_mm.assets.training") is None, reason="in the source tree only"
)

MEGABYTES = {"tiny-vl": 8, "tiny-audio": 4, "tiny-clip": 4}
# What is right without looking, or looking at another photo.
CHANCE = {
    "kind": 1 / len(KINDS),
    "colour": 1 / len(COLOURS),
    "buttons": 1 / MAX_BUTTONS,
    "crack": 1 / 2,
    "code": 1 / 100,
}


def figures(name: str) -> Any:
    return json.loads((folder(name) / "figures.json").read_text(encoding="utf-8"))


def samples() -> list[Any]:
    lines = (folder("tiny-vl") / "samples" / "samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in lines.splitlines()]


@pytest.mark.parametrize("name", MEGABYTES)
def test_models_are_small_and_have_a_card(name: str) -> None:
    size = sum(path.stat().st_size for path in folder(name).rglob("*") if path.is_file())
    assert size < MEGABYTES[name] * 1_000_000
    card = (folder(name) / "README.md").read_text(encoding="utf-8")
    assert "not a product" in card and "kvshare_mm.assets.training.train_" in card


def test_a_model_that_is_not_there_is_refused() -> None:
    with pytest.raises(FileNotFoundError, match="tiny-nothing"):
        folder("tiny-nothing")


@pytest.mark.parametrize("name", ["tiny-vl", "tiny-audio"])
def test_cards_repeat_what_was_measured(name: str) -> None:
    card = (folder(name) / "README.md").read_text(encoding="utf-8")
    shown = figures(name)
    first = "one_photo" if name == "tiny-vl" else "held_out_voices"
    for topic, cell in shown[first].items():
        assert f"| {topic} | {cell['right']:.3f} |" in card


def test_tiny_vl_was_measured_in_everything_it_claims() -> None:
    shown = figures("tiny-vl")
    assert set(shown["one_photo"]) == {"all", *TOPICS}
    assert set(shown["without_policy"]) == {"all", *POLICY_TOPICS}
    assert min(cell["questions"] for cell in shown["one_photo"].values()) >= 50
    assert min(cell["right"] for cell in shown["two_photos"].values()) >= 0.8
    assert shown["one_photo"]["all"]["right"] >= 0.95
    for topic in PICTURE_TOPICS:
        assert shown["wrong_picture"][topic]["right"] < CHANCE[topic] + 0.15
    assert shown["without_policy"]["all"]["right"] < 0.1


def test_tiny_vl_loads_as_qwen2_5_vl() -> None:
    from transformers import AutoConfig, AutoProcessor, Qwen2_5_VLForConditionalGeneration

    where = folder("tiny-vl")
    assert AutoConfig.from_pretrained(where).model_type == "qwen2_5_vl"
    processor: Any = AutoProcessor.from_pretrained(where)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(where, dtype=torch.float32)
    assert 2_000_000 < sum(p.numel() for p in model.parameters()) < 4_000_000
    sample = samples()[0]
    picture = where / "samples" / sample["messages"][1]["content"][0]["image"]
    sample["messages"][1]["content"][0]["image"] = str(picture)
    inputs = processor.apply_chat_template(
        sample["messages"],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 16
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 8]]


@needs_training
def test_samples_are_what_the_generator_draws(tmp_path: Path) -> None:
    from PIL import Image

    from kvshare_mm.assets.training.samples import write_samples

    write_samples(tmp_path)
    shipped = folder("tiny-vl") / "samples"
    assert samples() == [
        json.loads(line)
        for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(samples()) == 40
    for path in shipped.glob("*.png"):
        assert Image.open(path).size == (112, 112)
    names = {path.name for path in shipped.glob("*.png")}
    used = [
        part["image"]
        for sample in samples()
        for part in sample["messages"][1]["content"]
        if part["type"] == "image"
    ]
    assert sorted(used) == sorted(names)


@needs_training
@pytest.mark.e2e
def test_tiny_vl_answers_the_samples_and_not_without_what_they_need() -> None:
    from kvshare_mm.assets.training.evaluate_vl import Answerer
    from kvshare_mm.assets.training.evaluate_vl import samples as read

    answerer = Answerer(folder("tiny-vl"))
    questions = read(folder("tiny-vl") / "samples")
    measured = answerer.measure(questions)
    # what was measured on the same files, less two answers for other machines' rounding
    assert measured["all"]["right"] >= figures("tiny-vl")["samples"]["all"]["right"] - 0.05
    assert measured["all"]["right"] >= 0.95
    other = Photo("radio", "green", 1, False, "00", seed=1)
    wrong = []
    for topic, messages, answer in questions:
        if topic in PICTURE_TOPICS:
            for part in messages[1]["content"]:
                if part["type"] == "image":
                    part["image"] = draw(other)
            wrong.append((topic, messages, answer))
    assert answerer.measure(wrong)["all"]["right"] < 0.5
    bare = []
    for topic, messages, answer in questions:
        if topic in POLICY_TOPICS:
            messages[0]["content"][0]["text"] = "You answer the customers of Maple."
            bare.append((topic, messages, answer))
    assert answerer.measure(bare)["all"]["right"] < 0.2
