"""Writes held-out requests as files: ``python -m kvshare_mm.assets.training.samples --out DIR``.

``samples.jsonl`` holds a request a line: ``messages`` (pictures by file name beside it), ``answer``
and ``facts``. The drawings are this project's own.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

from kvshare_mm.assets.training.dialogues import BOTH_TOPICS, PICTURE_TOPICS, TOPICS
from kvshare_mm.assets.training.similar import held_out_requests

SEED = 40
ONE_PHOTO, TWO_PHOTOS = 26, 14


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    write_samples(parser.parse_args().out)


if __name__ == "__main__":
    main()
