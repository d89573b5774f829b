"""`kvshare bench vision`: the same picture, another question. What is the first token's time?"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kvshare_mm.apps.bench.methods import METHODS, Method
from kvshare_mm.apps.bench.prompts import encode
from kvshare_mm.apps.bench.rig import Rig
from kvshare_mm.apps.bench.vision_model import QWEN25_VL_3B, Shape, build
from kvshare_mm.assemble import media_support
from kvshare_mm.config import KVShareConfig

_METHODS = ("full", "prefix", "kvshare")
_PARTS = ("read_s", "tower_s", "text_s", "ttft_s", "cpu_s")
_POLICY = (
    "You answer customers of a shop. Goods can be returned within 30 days of delivery if they are "
    "unused and in their box. Refunds are paid within 5 working days. Damaged goods must be "
    "reported within 14 days with a photo. The warranty is 24 months."
)
_QUESTIONS = ("Is this one still under warranty?", "Can I get a repair for it?")
_GREETINGS = ("Hello, my name is Anna.", "Good morning, this is Viktor Petersen.")


def photo(width: int, height: int, seed: int = 0) -> bytes:
    """A picture file of smooth noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    buffer = BytesIO()
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def layouts(picture: bytes) -> dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Donor and target by where the words differ from each other."""
    seen = {"type": "image", "image": picture}

    def asked(*parts: Any) -> list[dict[str, Any]]:
        content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
        return [{"role": "system", "content": _POLICY}, {"role": "user", "content": content}]

    return {
        "question behind the picture": (
            asked(seen, _QUESTIONS[0]),
            asked(seen, _QUESTIONS[1]),
        ),
        "name before, question behind": (
            asked(_GREETINGS[0], seen, _QUESTIONS[0]),
            asked(_GREETINGS[1], seen, _QUESTIONS[1]),
        ),
    }


def run(
    *,
    divide: int = 4,
    width: int = 640,
    height: int = 480,
    repeats: int = 5,
    repair: str = "auto",
    whole: Shape = QWEN25_VL_3B,
) -> dict[str, Any]:
    """Time every method on every layout.

    A first token's time has three parts: reading the picture (file to hash, or to the model's
    inputs), the vision tower, and the text model with lookup and edit. CPU time is given beside it:
    other work on the machine does not change it.

    Args:
        divide: widths and depths of the 3B model are divided by this.
        width, height: of the picture; the model sees it in its own size.
        repair: policy of the method kvshare.
        whole: the shape that is divided.
    """
    shape = whole.divided(divide)
    with tempfile.TemporaryDirectory(prefix="kvshare-vision-") as folder:
        build(Path(folder), shape, max_pixels=28 * 28 * 1280)
        config = KVShareConfig.of(model=folder, embedder=None, dtype="float32", repair=repair)
        rig = Rig(config)
        try:
            measured = {
                name: _measure(rig, donor, target, repeats)
                for name, (donor, target) in layouts(photo(width, height)).items()
            }
        finally:
            rig.close()
    return {
        "kind": "vision",
        "model": f"random Qwen2.5-VL, 3B divided by {divide}",
        "shape": asdict(shape),
        "tower_to_text": shape.vision_macs / shape.text_macs,
        "tower_to_text_of_3b": QWEN25_VL_3B.vision_macs / QWEN25_VL_3B.text_macs,
        "repair": config.repair,
        "picture": f"{width}x{height}",
        "repeats": repeats,
        "layouts": measured,
    }


def _measure(
    rig: Rig, donor: list[dict[str, Any]], target: list[dict[str, Any]], repeats: int
) -> dict[str, Any]:
    ns = rig.namespace("vision")
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in _METHODS}
    facts: dict[str, dict[str, Any]] = {}
    with rig.known(encode(rig, donor), ns, METHODS["prefix"]):
        for _ in range(repeats):
            for name in _METHODS:
                row, facts[name] = _serve(rig, target, ns, METHODS[name])
                rows[name].append(row)
    medians = {
        name: {part: statistics.median(row[part] for row in those) for part in _PARTS}
        for name, those in rows.items()
    }
    lengths = {part: facts["full"][part] for part in ("tokens", "image_tokens")}
    return {
        **lengths,
        "methods": {
            name: {
                **medians[name],
                "times_sooner": medians["full"]["ttft_s"] / medians[name]["ttft_s"],
                "times_less_cpu": medians["full"]["cpu_s"] / medians[name]["cpu_s"],
                **{part: fact for part, fact in facts[name].items() if part not in lengths},
            }
            for name in _METHODS
        },
    }


def _serve(
    rig: Rig, messages: list[dict[str, Any]], ns: str, method: Method
) -> tuple[dict[str, float], dict[str, Any]]:
    assert rig.encoder is not None
    if method.reuse == "off":
        rig.media = media_support(rig.loaded, rig.config)  # has not seen the file before
    runs = rig.encoder.counters["tower_runs"]
    begun, start = time.process_time(), time.perf_counter()
    stream = encode(rig, messages)
    read = time.perf_counter() - start
    served = rig.serve(stream, ns, method)
    result = served.result
    row = {
        "read_s": read,
        "tower_s": result.encode,
        "text_s": served.ttft - result.encode,
        "ttft_s": read + served.ttft,
        "cpu_s": time.process_time() - begun,
    }
    fact = {
        "tokens": len(stream),
        "image_tokens": sum(item.length for item in stream.items),
        "computed_tokens": result.plan.num_computed,
        "tower_runs": rig.encoder.counters["tower_runs"] - runs,
        "picture": result.media[0].source,
    }
    return row, fact
