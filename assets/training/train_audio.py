"""Trains tiny-audio from nothing: ``python -m kvshare_mm.assets.training.train_audio --out DIR``.

A Qwen2-Audio of about a million parameters that understands sixteen spoken words. Speech is made
by espeak-ng. While it learns to answer, its tower also learns which word every 40 ms belong to.
"""

from __future__ import annotations

import argparse
import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kvshare_mm.assets.training.audio_model import build_model, build_processor, encode
from kvshare_mm.assets.training.calls import PHRASINGS, TOPICS, Call, random_call
from kvshare_mm.assets.training.clock import Averages, Stage
from kvshare_mm.assets.training.optim import MuonAdamW
from kvshare_mm.assets.training.packing import Branch, Packed, Row, answer_loss, pack
from kvshare_mm.assets.training.speech import WORDS, Clip, load_bank, make_clip

PEAK = 2e-3
SILENCE = len(WORDS)
TOKEN_SECONDS = 0.04


class Trainer:
    """The model, its processor, and batches of calls."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.processor = build_processor()
        self.tokenizer = self.processor.tokenizer
        self.model: Any = build_model(self.tokenizer).train()
        self.head = nn.Linear(self.model.config.audio_config.d_model, SILENCE + 1)
        token = self.tokenizer.convert_tokens_to_ids
        self.start, self.end = token("<|im_start|>"), token("<|im_end|>")
        self.audio = token("<|audio_bos|>"), token("<|AUDIO|>"), token("<|audio_eos|>")
        self.pad = token("<|endoftext|>")

    def text(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def row(self, call: Call, num_tokens: int, rng: random.Random) -> Row:
        """One voice note with a question of every topic."""
        bos, audio, eos = self.audio
        context = [self.start, *self.text("system\n"), *self.text(call.system_text()), self.end]
        context += [*self.text("\n"), self.start, *self.text("user\n")]
        context += [bos, *[audio] * num_tokens, eos]
        branches = []
        for topic in TOPICS:
            asked = replace(call, topic=topic, phrasing=rng.randrange(PHRASINGS))
            question = [*self.text(asked.question_text()), self.end, *self.text("\n"), self.start]
            question += self.text("assistant\n")
            answer = [*self.text(asked.answer()), self.end]
            trained = [False] * len(question) + [True] * len(answer)
            branches.append(Branch(question + answer, trained, topic))
        return Row(context, branches)

    def features(self, clips: list[Clip]) -> tuple[Tensor, Tensor]:
        """Log-mel [B, mel, window] and how many frames hold sound [B]."""
        extractor = self.processor.feature_extractor
        out = extractor(
            [clip.samples for clip in clips],
            sampling_rate=extractor.sampling_rate,
            padding="max_length",
            return_attention_mask=True,
            return_tensors="pt",
        )
        return out.input_features, out.attention_mask.sum(-1)

    def logits(self, packed: Packed, tokens: Tensor) -> Tensor:
        """[N, vocabulary] in front of the N trained positions; ``tokens`` [M, H] are the sound."""
        decoder = self.model.model.language_model
        embeds = decoder.embed_tokens(packed.ids)
        embeds = embeds.masked_scatter((packed.ids == self.audio[1])[..., None], tokens)
        hidden = decoder(
            inputs_embeds=embeds,
            position_ids=packed.positions[0],
            attention_mask=packed.visible,
            use_cache=False,
        ).last_hidden_state
        result: Tensor = self.model.lm_head(hidden[:, :-1][packed.trained[:, 1:]])
        return result

    def step(self, clips: list[Clip], rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        """Loss of a batch of voice notes, and shares of right answers."""
        encoded, counts = encode(self.model.model.audio_tower, *self.features(clips))
        rows = [
            self.row(random_call(rng, clip, TOPICS[0]), int(count), rng)
            for clip, count in zip(clips, counts, strict=True)
        ]
        packed = pack(rows, self.pad)
        heard = torch.arange(encoded.shape[1])[None, :] < counts[:, None]
        sound = encoded[heard]
        loss, exact = answer_loss(
            packed, self.logits(packed, self.model.model.multi_modal_projector(sound))
        )
        truth = torch.tensor(
            [
                word_of(clip, token)
                for clip, count in zip(clips, counts.tolist(), strict=True)
                for token in range(count)
            ]
        )
        scores = self.head(sound)
        spoken = truth != SILENCE
        exact["frames"] = (scores.argmax(-1) == truth)[spoken].float().mean().item()
        return loss + functional.cross_entropy(scores, truth), exact

    def save(self, out: Path) -> None:
        """Write the folder that ``from_pretrained`` and ``AutoProcessor`` read, in bfloat16."""
        self.processor.save_pretrained(out)
        self.model.to(torch.bfloat16).save_pretrained(out)


def word_of(clip: Clip, token: int) -> int:
    """Which word is said in the middle of an audio token."""
    middle = (token + 0.5) * TOKEN_SECONDS
    for word, (start, end) in zip(clip.words, clip.times, strict=True):
        if start <= middle < end:
            return WORDS.index(word)
    return SILENCE


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--work", type=Path, help="folder of checkpoints; OUT.work when left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=12, help="budget, core minutes")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--voices", type=int, default=400)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    work = args.work or args.out.with_name(args.out.name + ".work")
    bank = load_bank(work / "voices.npz", args.voices, held_out=False, seed=args.seed)
    trainer = Trainer(args.seed)
    named = [*trainer.model.named_parameters()]
    named += [(f"head.{name}", param) for name, param in trainer.head.named_parameters()]
    optimiser = MuonAdamW(named, PEAK)
    state = {"model": trainer.model, "head": trainer.head, "optimiser": optimiser}
    stage = Stage(work / "audio.pt", args.minutes, state, peak=PEAK)
    rng, averages = random.Random(f"audio {args.seed} {stage.step}"), Averages()
    for _ in stage:
        loss, exact = trainer.step([make_clip(bank, rng) for _ in range(args.batch)], rng)
        norm = optimiser.step(loss, stage.rate)
        averages.add(stage, loss=loss.item(), norm=norm, **exact)
    trainer.save(args.out)


if __name__ == "__main__":
    main()
