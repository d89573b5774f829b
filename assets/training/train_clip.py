"""Trains tiny-clip from nothing: ``python -m kvshare_mm.assets.training.train_clip --out DIR``.

An open_clip model of a few megabytes on drawn product photos with captions. The folder that comes
out is loaded by open_clip alone, as ``local-dir:DIR``. ``evaluate_clip`` measures it.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from kvshare_mm.assets.shop.pictures import SIZE, Photo, draw, random_photo
from kvshare_mm.assets.training.captions import random_caption
from kvshare_mm.assets.training.clock import Averages, Stage
from kvshare_mm.assets.training.codes import ATTRIBUTES, SIZES, labels
from kvshare_mm.assets.training.optim import MuonAdamW

MEAN, STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)
CONTEXT = 24
MODEL: dict[str, Any] = {
    "embed_dim": 96,
    "vision_cfg": {
        "image_size": SIZE,
        "patch_size": 14,
        "width": 128,
        "layers": 4,
        "head_width": 32,
        "mlp_ratio": 3.0,
    },
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": 128,
        "width": 96,
        "heads": 3,
        "layers": 2,
        "hf_tokenizer_name": "tiny-clip",  # read from the folder itself
    },
}
PEAK = 2e-3


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; the end of the text has the highest id, where open_clip's encoder
    looks."""
    rng = random.Random("words")
    texts = [random_caption(random_photo(rng), rng) for _ in range(5000)]
    splitter = pre_tokenizers.BertPreTokenizer()
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", "<start>", *words])}
    end = MODEL["text_cfg"]["vocab_size"] - 1
    if len(vocabulary) > end:
        raise ValueError(f"{len(vocabulary)} words do not fit into {end} tokens")
    vocabulary["<end>"] = end
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<start>",
        eos_token="<end>",
    )


def build_model() -> Any:
    text = {k: v for k, v in MODEL["text_cfg"].items() if k != "hf_tokenizer_name"}
    return CLIP(MODEL["embed_dim"], MODEL["vision_cfg"], text)


def pixels(photos: list[Photo]) -> Tensor:
    """float32 [B, 3, 112, 112], normalised as open_clip does."""
    pictures = np.stack([np.asarray(draw(photo)) for photo in photos])
    x = torch.from_numpy(pictures).float().div_(255)
    return ((x - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2).contiguous()


def contrast(images: Tensor, texts: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """CLIP's loss for unit vectors [B, E]; pairs with the same text are not told apart."""
    logits = (scale * images @ texts.T).masked_fill(same, float("-inf"))
    target = torch.arange(len(images))
    return (
        functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
    ) / 2


def train(work: Path, minutes: float, seed: int, batch: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    tokenizer, model = build_tokenizer(), build_model()
    # Names what is on the picture from its vector: thrown away, it makes the start much faster.
    head = nn.Linear(MODEL["embed_dim"], sum(SIZES[:4]))
    named = [*model.named_parameters(), *((f"head.{n}", p) for n, p in head.named_parameters())]
    optimiser = MuonAdamW(named, PEAK)
    stage = Stage(
        work / "clip.pt", minutes, {"model": model, "head": head, "o": optimiser}, peak=PEAK
    )
    rng, averages = random.Random(f"clip {seed} {stage.step}"), Averages()
    for _ in stage:
        photos = [random_photo(rng) for _ in range(batch)]
        captions = [random_caption(photo, rng) for photo in photos]
        ids = tokenizer(
            captions, padding="max_length", max_length=CONTEXT, return_tensors="pt"
        ).input_ids
        images = model.encode_image(pixels(photos), normalize=True)
        texts = model.encode_text(ids, normalize=True)
        same = torch.tensor([[_fits(a, b) for b in captions] for a in photos])
        same.fill_diagonal_(False)
        loss = contrast(images, texts, model.logit_scale.exp().clamp(max=100), same)
        truth = torch.tensor([labels(photo)[:4] for photo in photos])
        named_loss, accuracy = torch.zeros(()), {}
        for column, part in enumerate(head(10 * images).split(SIZES[:4], -1)):
            named_loss = named_loss + functional.cross_entropy(part, truth[:, column])
            right = (part.argmax(-1) == truth[:, column]).float().mean().item()
            accuracy[ATTRIBUTES[column]] = right
        norm = optimiser.step(loss + 0.5 * named_loss, stage.rate)
        hit = ((images @ texts.T).masked_fill(same, -2).argmax(1) == torch.arange(batch)).float()
        averages.add(stage, loss=loss.item(), norm=norm, hit=hit.mean().item(), **accuracy)
    return model, tokenizer


def _fits(photo: Photo, text: str) -> bool:
    """Whether a caption is true of a photo, though it was written for another."""
    if photo.kind not in text or photo.colour not in text:
        return False
    told = [word for word in ("one", "two", "three", "four") if f" {word} " in text]
    if told and told[0] != ("one", "two", "three", "four")[photo.buttons - 1]:
        return False
    whole = "intact" in text or "undamaged" in text
    broken = "cracked" in text or (" damaged" in text)
    return not (whole and photo.cracked) and not (broken and not photo.cracked)


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Write the folder that open_clip reads as ``local-dir:``; weights in float16."""
    out.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": MODEL, "preprocess_cfg": preprocess}
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, out / "open_clip_model.safetensors")
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--work", type=Path, help="folder of checkpoints; OUT.work when left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=12, help="budget, core minutes")
    parser.add_argument("--batch", type=int, default=96)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    work = args.work or args.out.with_name(args.out.name + ".work")
    save(*train(work, args.minutes, args.seed, args.batch), args.out)


if __name__ == "__main__":
    main()
