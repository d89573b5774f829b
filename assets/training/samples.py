"""Writes held-out requests as files: ``python -m kvshare_mm.assets.training.samples --out DIR``.

``samples.jsonl`` holds a request a line: ``messages`` (pictures or sounds by file name beside it),
``answer`` and ``facts``. Drawings are this project's own, voices are espeak-ng's; with
``--voices FILE`` the requests are about voice notes, else about photos.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import soundfile

from kvshare_mm.assets.shop.phrases import BOTH_TOPICS, PICTURE_TOPICS, TOPICS
from kvshare_mm.assets.shop.similar import held_out_requests
from kvshare_mm.assets.training.calls import calls
from kvshare_mm.assets.training.speech import RATE, load_bank

SEED = 40
ONE_PHOTO, TWO_PHOTOS = 26, 14
CALLS = 18


def write_samples(out: Path) -> None:
    """40 requests, 14 of them with two photos."""
    out.mkdir(parents=True, exist_ok=True)
    single = itertools.islice(held_out_requests(SEED, TOPICS), ONE_PHOTO)
    topics = PICTURE_TOPICS + BOTH_TOPICS
    double = itertools.islice(held_out_requests(SEED, topics, num_photos=2), TWO_PHOTOS)
    lines = []
    for number, request in enumerate([*single, *double]):
        names = [f"{number:02d}-{place}.png" for place in range(len(request.photos))]
        for name, picture in zip(names, request.pictures(), strict=True):
            picture.save(out / name, optimize=True)
        sample = {
            "messages": request.messages(names),
            "answer": request.answer(),
            "facts": request.facts(),
        }
        lines.append(json.dumps(sample))
    (out / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_calls(out: Path, voices: Path) -> None:
    """18 calls of held-out voices, one FLAC file each."""
    out.mkdir(parents=True, exist_ok=True)
    bank = load_bank(voices, 60, held_out=True, seed=SEED)
    lines = []
    for number, call in enumerate(itertools.islice(calls(bank, SEED), CALLS)):
        name = f"{number:02d}.flac"
        soundfile.write(out / name, call.clip.samples, RATE)
        sample = {
            "messages": call.messages(name),
            "answer": call.answer(),
            "facts": {
                "topic": call.topic,
                "words": list(call.clip.words),
                "name": call.name,
                "city": call.city,
            },
        }
        lines.append(json.dumps(sample))
    (out / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--voices", type=Path, help="bank of held-out voices; made when missing")
    args = parser.parse_args()
    if args.voices is None:
        write_samples(args.out)
    else:
        write_calls(args.out, args.voices)


if __name__ == "__main__":
    main()
