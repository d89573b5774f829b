"""Measures tiny-audio: ``python -m kvshare_mm.assets.training.evaluate_audio --model DIR``.

Held-out voices of espeak-ng, and, where ``--digits`` names a folder of recordings (files like
``7_name_0.wav``, as in the Free Spoken Digit Dataset), people saying digits. The folder is loaded
as any user loads it; answers are generated greedily by transformers' own code and must be right in
every character.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from kvshare_mm.assets.training.calls import AUDIO_TOPICS, TEXT_TOPICS, Call, calls
from kvshare_mm.assets.training.figures import by_topic, table, write
from kvshare_mm.assets.training.speech import DIGITS, RATE, load_bank, trim


class Answerer:
    """A model folder, loaded in float32, that answers batches of messages."""

    def __init__(self, folder: Path, batch: int = 16) -> None:
        self.processor: Any = AutoProcessor.from_pretrained(folder)
        model: Any = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
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
                processor_kwargs={"text_kwargs": {"padding": True, "padding_side": "left"}},
            )
            with torch.inference_mode():
                out = self.model.generate(**inputs, max_new_tokens=24, do_sample=False)
            new = out[:, inputs["input_ids"].shape[1] :]
            answers += self.processor.batch_decode(new, skip_special_tokens=True)
        return answers


def measure(answerer: Answerer, asked: list[Call], shown: list[list[dict[str, Any]]]) -> Any:
    """Exact match by topic of the calls' own answers to the messages shown."""
    answers = answerer.answers(shown)
    return by_topic((c.topic, a == c.answer()) for c, a in zip(asked, answers, strict=True))


def words_right(answerer: Answerer, asked: list[Call]) -> float:
    """Share of single words heard right at their place, over all transcriptions."""
    answers = answerer.answers([call.messages() for call in asked])
    hits, total = 0, 0
    for call, answer in zip(asked, answers, strict=True):
        heard = answer.removeprefix("I hear: ").removesuffix(".").split()
        hits += sum(a == b for a, b in zip(heard, call.clip.words, strict=False))
        total += max(len(heard), len(call.clip.words))
    return hits / total


def real_digits(answerer: Answerer, folder: Path) -> dict[str, Any]:
    """Share of right digits over recordings of people, by speaker."""
    files = sorted(folder.glob("[0-9]_*.wav"))
    conversations, truths = [], []
    for file in files:
        samples, _ = librosa.load(file, sr=RATE, mono=True)
        pause = np.zeros(RATE // 5, dtype=np.float32)
        sound = np.concatenate([pause, trim(samples), pause])
        digit, speaker, _ = file.stem.split("_")
        system = [{"type": "text", "text": "You write down calls for Maple."}]
        asked = [
            {"type": "audio", "audio": sound},
            {"type": "text", "text": "Which words are said?"},
        ]
        conversations.append(
            [{"role": "system", "content": system}, {"role": "user", "content": asked}]
        )
        truths.append((speaker, f"I hear: {DIGITS[int(digit)]}."))
    answers = answerer.answers(conversations)
    return by_topic(
        (speaker, answer == right) for (speaker, right), answer in zip(truths, answers, strict=True)
    )


def samples(folder: Path) -> list[tuple[str, list[dict[str, Any]], str]]:
    """The shipped samples: topic, messages with the sounds read from disk, right answer."""
    questions = []
    for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        for message in sample["messages"]:
            for part in message["content"]:
                if part["type"] == "audio":
                    part["audio"], _ = librosa.load(folder / part["audio"], sr=RATE)
        questions.append((sample["facts"]["topic"], sample["messages"], sample["answer"]))
    return questions


def measure_samples(answerer: Answerer, folder: Path) -> dict[str, Any]:
    """Exact match by topic of the shipped samples."""
    questions = samples(folder)
    answers = answerer.answers([messages for _, messages, _ in questions])
    return by_topic(
        (topic, answer == right)
        for (topic, _, right), answer in zip(questions, answers, strict=True)
    )


def evaluate(
    folder: Path, bank_file: Path, digits: Path | None, each: int, seed: int
) -> dict[str, Any]:
    """All measurements, ``each`` questions a topic."""
    answerer = Answerer(folder)
    bank = load_bank(bank_file, 60, held_out=True, seed=seed)
    topics = AUDIO_TOPICS + TEXT_TOPICS
    asked = list(itertools.islice(calls(bank, seed), each * len(topics)))
    heard = [call for call in asked if call.topic in AUDIO_TOPICS]
    told = [call for call in asked if call.topic in TEXT_TOPICS]
    clips = [call.clip.samples for call in heard]
    others = [heard[i].messages(clips[i - 1]) for i in range(len(heard))]
    transcribed = list(itertools.islice(calls(bank, seed + 1, ("words",)), 2 * each))
    figures: dict[str, Any] = {
        "seed": seed,
        "held_out_voices": measure(answerer, asked, [call.messages() for call in asked]),
        "wrong_clip": measure(answerer, heard, others),
        "without_facts": measure(answerer, told, [call.messages(facts=False) for call in told]),
        "single_words_right": words_right(answerer, transcribed),
    }
    if (folder / "samples").is_dir():
        figures["samples"] = measure_samples(answerer, folder / "samples")
    if digits is not None:
        figures["real_digits"] = real_digits(answerer, digits)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument(
        "--bank", type=Path, help="held-out voices; made in MODEL.work when missing"
    )
    parser.add_argument("--digits", type=Path, help="folder of recordings of spoken digits")
    parser.add_argument("--each", type=int, default=100, help="questions a topic")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    bank = args.bank or args.model.with_name(args.model.name + ".work") / "held-out.npz"
    figures = evaluate(args.model, bank, args.digits, args.each, args.seed)
    write(args.model, figures)
    columns = {
        key.replace("_", " "): key for key in ("held_out_voices", "wrong_clip", "without_facts")
    }
    print(table(figures, columns))
    print(figures["single_words_right"], figures.get("real_digits"))


if __name__ == "__main__":
    main()
