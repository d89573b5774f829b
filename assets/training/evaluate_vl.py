"""Measures a trained tiny-vl: ``python -m kvshare_mm.assets.training.evaluate_vl --model DIR``.

The folder is loaded as any user loads it; answers are generated greedily by transformers' own code
and must equal the right one in every character. ``figures.json`` is written into the folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from kvshare_mm.assets.shop.dialogues import Request
from kvshare_mm.assets.shop.phrases import BOTH_TOPICS, PICTURE_TOPICS, POLICY_TOPICS, TOPICS
from kvshare_mm.assets.shop.pictures import random_photo
from kvshare_mm.assets.shop.similar import held_out_requests
from kvshare_mm.assets.training.figures import by_topic, table, write

PHOTO_TOPICS = PICTURE_TOPICS + BOTH_TOPICS
_Question = tuple[str, list[dict[str, Any]], str]  # topic, messages, right answer


class Answerer:
    """A model folder, loaded in float32, that answers batches of messages."""

    def __init__(self, folder: Path, batch: int = 16) -> None:
        self.processor: Any = AutoProcessor.from_pretrained(folder)
        model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self.model, self.batch = model.eval(), batch

    def answers(self, conversations: Sequence[list[dict[str, Any]]]) -> list[str]:
        """Greedy answers, as text."""
        answers: list[str] = []
        for start in tqdm(range(0, len(conversations), self.batch), mininterval=20):
            inputs = self.processor.apply_chat_template(
                list(conversations[start : start + self.batch]),
                tokenize=True,
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, "padding_side": "left"},
            )
            with torch.inference_mode():
                out = self.model.generate(**inputs, max_new_tokens=24, do_sample=False)
            new = out[:, inputs["input_ids"].shape[1] :]
            answers += self.processor.batch_decode(new, skip_special_tokens=True)
        return answers

    def measure(self, questions: list[_Question]) -> dict[str, Any]:
        """Exact match by topic."""
        # alike in length, or padding is most of the work
        questions = sorted(questions, key=lambda question: len(str(question[1])))
        answers = self.answers([messages for _, messages, _ in questions])
        return by_topic(
            (topic, answer == right)
            for (topic, _, right), answer in zip(questions, answers, strict=True)
        )


def plain(requests: list[Request]) -> list[_Question]:
    return [(r.question.topic, r.messages(), r.answer()) for r in requests]


def wrong_pictures(requests: list[Request], seed: int) -> list[_Question]:
    """The right answers, but photos of other products."""
    rng = random.Random(f"wrong pictures {seed}")
    return [
        (
            r.question.topic,
            replace(r, photos=tuple(random_photo(rng, held_out=True) for _ in r.photos)).messages(),
            r.answer(),
        )
        for r in requests
    ]


def without_policy(requests: list[Request]) -> list[_Question]:
    """The right answers, but nothing that says them."""
    return [
        (r.question.topic, replace(r, policy=False).messages(), r.answer())
        for r in requests
        if r.question.topic in POLICY_TOPICS
    ]


def samples(folder: Path) -> list[_Question]:
    """The shipped samples, their pictures read from disk."""
    questions = []
    for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        for message in sample["messages"]:
            for part in message["content"]:
                if part["type"] == "image":
                    part["image"] = Image.open(folder / part["image"]).convert("RGB")
        questions.append((sample["facts"]["topic"], sample["messages"], sample["answer"]))
    return questions


def evaluate(folder: Path, each: int, seed: int) -> dict[str, Any]:
    """All measurements, ``each`` questions a topic."""
    answerer = Answerer(folder)
    take = itertools.islice
    one = list(take(held_out_requests(seed), each * len(TOPICS)))
    many = each * len(PHOTO_TOPICS)
    two = list(take(held_out_requests(seed, PHOTO_TOPICS, num_photos=2), many))
    unseen = list(take(held_out_requests(seed, PHOTO_TOPICS, unseen=True), many // 2))
    control = one[: len(one) // 2]
    figures: dict[str, Any] = {
        "seed": seed,
        "one_photo": answerer.measure(plain(one)),
        "two_photos": answerer.measure(plain(two)),
        "unseen_pairs": answerer.measure(plain(unseen)),
        "wrong_picture": answerer.measure(wrong_pictures(control, seed)),
        "without_policy": answerer.measure(without_policy(control)),
    }
    if (folder / "samples").is_dir():
        figures["samples"] = answerer.measure(samples(folder / "samples"))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--each", type=int, default=100, help="questions a topic")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures = evaluate(args.model, args.each, args.seed)
    write(args.model, figures)
    columns = {key.replace("_", " "): key for key in figures if key not in ("seed", "samples")}
    print(table(figures, columns))


if __name__ == "__main__":
    main()
