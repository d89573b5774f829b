"""Trains tiny-vl from nothing: ``python -m kvshare_mm.assets.training.train_vl --out DIR``.

Three stages. ``see``: the vision tower learns to tell pictures in a fixed code. ``read``: the
decoder learns to answer from the same code, on random repetitions first. ``join``: both together
on pixels. ``see`` and ``read`` do not need each other and may run at the same time (``--stage``).
A stopped run goes on where it was when started again with the same ``--work``.
"""

from __future__ import annotations

import argparse
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from kvshare_mm.assets.shop.pictures import Marks, Photo, draw, random_photo
from kvshare_mm.assets.training.batches import Batcher
from kvshare_mm.assets.training.clock import Averages, Stage
from kvshare_mm.assets.training.codes import (
    ATTRIBUTES,
    LOCAL_SIZES,
    code_loss,
    codebook,
    local_labels,
    local_loss,
    oracle,
)
from kvshare_mm.assets.training.optim import MuonAdamW
from kvshare_mm.assets.training.packing import Packed, answer_loss
from kvshare_mm.assets.training.tower import FastTower
from kvshare_mm.assets.training.vl_model import build_config, build_processor

logger = logging.getLogger(__name__)

SHARES = {"see": 0.12, "read": 0.13, "join": 0.75}  # of the minutes
PEAKS = {"see": 2e-3, "read": 2e-3, "join": 1.2e-3}


class Trainer:
    """The model, its helpers, and one method a stage."""

    def __init__(self, work: Path, minutes: float, seed: int, tokens: int) -> None:
        torch.manual_seed(seed)
        self.work, self.minutes, self.seed, self.tokens = work, minutes, seed, tokens
        self.processor = build_processor()
        self.model: Any = Qwen2_5_VLForConditionalGeneration(
            build_config(self.processor.tokenizer)
        ).train()
        images = self.processor.image_processor
        self.tower = FastTower(self.model.model.visual, images.image_mean, images.image_std)
        hidden = self.model.config.text_config.hidden_size
        self.book = codebook(hidden)
        vision = self.model.config.vision_config.hidden_size
        self.local_head = nn.Linear(4 * vision, sum(LOCAL_SIZES))
        self.averages = Averages()

    def stage(self, name: str, modules: dict[str, Any]) -> tuple[Stage, MuonAdamW]:
        named = [
            (f"{key}.{n}", p) for key, part in modules.items() for n, p in part.named_parameters()
        ]
        optimiser = MuonAdamW(named, PEAKS[name])
        stage = Stage(
            self.work / f"{name}.pt",
            self.minutes * SHARES[name],
            {**modules, "optimiser": optimiser},
            peak=PEAKS[name],
            floor=0.02 if name == "join" else 0.4,  # training goes on behind the first two
        )
        # a run that goes on must not see the beginning of its data again
        random.seed(f"{name} {self.seed} {stage.step}")
        torch.manual_seed(self.seed * 1_000_003 + stage.step)
        return stage, optimiser

    def batcher(self, stage: Stage) -> Batcher:
        rng = random.Random(f"{stage.file.stem} {self.seed} {stage.step}")
        return Batcher(self.processor.tokenizer, rng)

    def vision_loss(self, photos: list[Photo]) -> tuple[Tensor, Tensor, list[float]]:
        """Draws the photos: image tokens [B, 16, H], loss against code and cells, accuracies."""
        marks = [Marks() for _ in photos]
        pictures = np.stack(
            [np.asarray(draw(photo, mark)) for photo, mark in zip(photos, marks, strict=True)]
        )
        tokens, cells = self.tower(pictures)
        loss, accuracy = code_loss(self.book, tokens, photos)
        truth = [local_labels(photo, mark) for photo, mark in zip(photos, marks, strict=True)]
        return tokens, loss + local_loss(self.local_head(cells), torch.tensor(truth)), accuracy

    def see(self) -> None:
        modules = {"visual": self.tower.visual, "local": self.local_head}
        stage, optimiser = self.stage("see", modules)
        rng = random.Random(f"see {self.seed} {stage.step}")
        for _ in stage:
            _, loss, accuracy = self.vision_loss([random_photo(rng) for _ in range(64)])
            norm = optimiser.step(loss, stage.rate)
            self.averages.add(
                stage, loss=loss.item(), norm=norm, **dict(zip(ATTRIBUTES, accuracy, strict=True))
            )

    def read(self) -> None:
        decoder = self.model.model.language_model
        stage, optimiser = self.stage("read", {"decoder": decoder})
        batcher, generator = self.batcher(stage), torch.Generator().manual_seed(stage.step)
        for progress in stage:
            every = 2 if progress < 0.35 else 8
            if stage.step % every == 0:
                packed, tokens = batcher.repeats(96), None
            else:
                fillers = (0, 0, 1) if progress < 0.4 else (0, 1, 2, 3, 5, 8)
                packed, photos = batcher.batch(self.tokens, branches=8, fillers=fillers)
                tokens = oracle(self.book, photos, generator) if photos else None
            loss, exact = answer_loss(packed, self.logits(packed, tokens))
            norm = optimiser.step(loss, stage.rate)
            self.averages.add(stage, loss=loss.item(), norm=norm, **exact)

    def join(self) -> None:
        for name, modules in (
            ("see", {"visual": self.tower.visual, "local": self.local_head}),
            ("read", {"decoder": self.model.model.language_model}),
        ):
            if not (self.work / "join.pt").is_file():
                saved = torch.load(self.work / f"{name}.pt", weights_only=False)["state"]
                for key, module in modules.items():
                    module.load_state_dict(saved[key])
        stage, optimiser = self.stage("join", {"model": self.model.model, "local": self.local_head})
        batcher = self.batcher(stage)
        for _ in stage:
            packed, photos = batcher.batch(self.tokens, branches=12, fillers=range(9))
            tokens, seen = None, torch.zeros(())
            if photos:
                tokens, seen, _ = self.vision_loss(photos)
            loss, exact = answer_loss(packed, self.logits(packed, tokens))
            norm = optimiser.step(loss + 0.3 * seen, stage.rate)
            self.averages.add(stage, loss=loss.item(), seen=seen.item(), norm=norm, **exact)

    def logits(self, packed: Packed, tokens: Tensor | None) -> Tensor:
        """[N, vocabulary] in front of the N trained positions; ``tokens`` stand for the images."""
        core = self.model.model
        embeds = core.language_model.embed_tokens(packed.ids)
        if tokens is not None:
            where = (packed.ids == self.model.config.image_token_id)[..., None]
            embeds = embeds.masked_scatter(where, tokens)
        hidden = core.language_model(
            inputs_embeds=embeds,
            position_ids=packed.positions,
            attention_mask=packed.visible,
            use_cache=False,
        ).last_hidden_state
        result: Tensor = self.model.lm_head(hidden[:, :-1][packed.trained[:, 1:]])
        return result

    def save(self, out: Path) -> None:
        """Write the folder that ``from_pretrained`` and ``AutoProcessor`` read.

        Weights are stored in float16, half the size and nearly as exact; the configuration says
        float32, which they are loaded as and were trained in.
        """
        from copy import deepcopy

        self.processor.save_pretrained(out)
        stored = deepcopy(self.model).to(torch.float16)
        stored.save_pretrained(out)
        stored.config.dtype = torch.float32
        stored.config.save_pretrained(out)
        (out / "model.safetensors").chmod(0o644)  # as every other file, not only its owner's


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--work", type=Path, help="folder of checkpoints; OUT.work when left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=160, help="budget, one core")
    parser.add_argument("--tokens", type=int, default=6000, help="tokens in a batch")
    parser.add_argument("--stage", choices=("see", "read", "join", "all"), default="all")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    work = args.work or args.out.with_name(args.out.name + ".work")
    trainer = Trainer(work, args.minutes, args.seed, args.tokens)
    if args.stage in ("see", "all"):
        trainer.see()
    if args.stage in ("read", "all"):
        trainer.read()
    if args.stage in ("join", "all"):
        trainer.join()
        trainer.save(args.out)


if __name__ == "__main__":
    main()
