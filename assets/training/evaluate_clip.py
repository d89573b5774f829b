"""Measures a trained tiny-clip: ``python -m kvshare_mm.assets.training.evaluate_clip --model DIR``.

The folder is loaded by open_clip, as ``local-dir:``. ``figures.json`` is written into the folder.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from kvshare_mm.assets.shop.pictures import (
    COLOURS,
    KINDS,
    Photo,
    draw,
    random_photo,
)
from kvshare_mm.assets.training.captions import caption, short_caption
from kvshare_mm.assets.training.figures import write


class Encoder:
    """An open_clip folder: pictures and texts to unit vectors."""

    def __init__(self, folder: Path) -> None:
        name = f"local-dir:{folder}"
        model, _, self.preprocess = open_clip.create_model_and_transforms(name)
        self.model: Any = model.eval()
        self.tokenizer: Any = open_clip.get_tokenizer(name)

    @torch.inference_mode()
    def pictures(self, photos: list[Photo]) -> Tensor:
        """float32 [N, E]."""
        batch = torch.stack([self.preprocess(draw(photo)) for photo in photos])
        vectors: Tensor = self.model.encode_image(batch, normalize=True)
        return vectors

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> Tensor:
        """float32 [N, E]."""
        vectors: Tensor = self.model.encode_text(self.tokenizer(texts), normalize=True)
        return vectors


def zero_shot(encoder: Encoder, photos: list[Photo]) -> float:
    """Share of photos whose (kind, colour) is the nearest of all 48 short captions."""
    classes = [(kind, colour) for kind in KINDS for colour in COLOURS]
    texts = encoder.texts([short_caption(*pair) for pair in classes])
    nearest = (encoder.pictures(photos) @ texts.T).argmax(1).tolist()
    hits = [classes[i] == (p.kind, p.colour) for i, p in zip(nearest, photos, strict=True)]
    return float(sum(hits) / len(hits))


def recall(encoder: Encoder, photos: list[Photo]) -> dict[str, float]:
    """Recall at 1 and 5 both ways between photos and their full captions, all different."""
    scores = encoder.pictures(photos) @ encoder.texts([caption(photo) for photo in photos]).T
    own = torch.arange(len(photos))[:, None]
    figures = {}
    for way, matrix in (("text_of_picture", scores), ("picture_of_text", scores.T)):
        best = matrix.topk(5, dim=1).indices
        for k in (1, 5):
            hits = (best[:, :k] == own).any(1).float().mean().item()
            figures[f"{way}_at_{k}"] = round(hits, 4)
    return figures


def same_product(encoder: Encoder, rng: random.Random, count: int) -> float:
    """Share of photos whose nearest of ``count`` other photos shows the same product.

    Each product (kind, colour, buttons, state) is photographed twice, with other background, place,
    light and label.
    """
    first = distinct(rng, count)
    again = [
        Photo(p.kind, p.colour, p.buttons, p.cracked, f"{rng.randrange(100):02d}", p.seed + 1)
        for p in first
    ]
    scores = encoder.pictures(first) @ encoder.pictures(again).T
    return round((scores.argmax(1) == torch.arange(count)).float().mean().item(), 4)


def distinct(rng: random.Random, count: int, *, unseen: bool = False) -> list[Photo]:
    """Held-out photos whose full captions all differ."""
    photos: dict[str, Photo] = {}
    while len(photos) < count:
        photo = random_photo(rng, held_out=True, unseen=unseen)
        photos.setdefault(caption(photo), photo)
    return list(photos.values())


def evaluate(folder: Path, seed: int) -> dict[str, Any]:
    encoder, rng = Encoder(folder), random.Random(f"clip {seed}")
    held_out = [random_photo(rng, held_out=True) for _ in range(600)]
    unseen = [random_photo(rng, held_out=True, unseen=True) for _ in range(200)]
    figures = {
        "seed": seed,
        "zero_shot_kind_and_colour_of_48": zero_shot(encoder, held_out),
        "zero_shot_unseen_pairs": zero_shot(encoder, unseen),
        "captions_of_100_pictures": recall(encoder, distinct(rng, 100)),
        "same_product_among_100": same_product(encoder, rng, 100),
    }
    pairs = [(photo.kind, photo.colour) for photo in held_out]
    classes = [pairs[i] == pairs[i - 1] for i in range(len(pairs))]
    figures["control_zero_shot_of_another_picture"] = round(sum(classes) / len(classes), 4)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures = evaluate(args.model.resolve(), args.seed)
    write(args.model, figures)
    print(figures)


if __name__ == "__main__":
    main()
