"""`kvshare bench vision` and `pictures`: time and right answers with pictures."""

from __future__ import annotations

from typing import Annotated

import typer

from kvshare_mm.apps.bench.terminal import (
    Model,
    Out,
    opened_rig,
    plain_errors,
    show,
    write_report,
)


def vision(
    divide: Annotated[
        int, typer.Option(min=1, help="divide the 3B model's widths and depths by this")
    ] = 4,
    width: Annotated[int, typer.Option(min=56, help="of the picture")] = 640,
    height: Annotated[int, typer.Option(min=56, help="of the picture")] = 480,
    repeats: Annotated[int, typer.Option(min=1, help="measurements a method")] = 5,
    repair: Annotated[str, typer.Option(help="repair policy of the method kvshare")] = "auto",
    json_file: Out = None,
) -> None:
    """First-token time for a known picture and another question; tower and text apart.

    The model has random weights in the proportions of Qwen2.5-VL-3B.
    """
    from kvshare_mm.apps.bench import vision as bench_vision

    with plain_errors():
        report = bench_vision.run(
            divide=divide, width=width, height=height, repeats=repeats, repair=repair
        )
        show(report)
        write_report(report, json_file)


def pictures(
    model: Model = "tiny-vl",
    pairs: Annotated[int, typer.Option(min=1, help="pairs of similar requests")] = 640,
    leak_pairs: Annotated[
        int, typer.Option(min=0, help="pairs that differ in the picture alone")
    ] = 300,
    photos: Annotated[int, typer.Option(min=1, max=2, help="pictures of a request")] = 1,
    repair: Annotated[str, typer.Option(help="repair policy of the method kvshare")] = "auto",
    seed: Annotated[int, typer.Option(help="of the requests, all held out of training")] = 1,
    json_file: Out = None,
) -> None:
    """Right answers about pictures under reuse, and whether any is about the stored picture."""
    from kvshare_mm.apps.bench import pictures as bench_pictures
    from kvshare_mm.apps.bench.methods import METHODS

    methods = [METHODS[name] for name in ("prefix", "kvshare")]
    with (
        plain_errors(),
        opened_rig(model, num_slots=3, max_model_len=2048, repair=repair) as rig,
    ):
        report = bench_pictures.run(
            rig,
            methods,
            num_pairs=pairs,
            num_leak_pairs=leak_pairs,
            num_photos=photos,
            seed=seed,
        )
        show(report)
        write_report(report, json_file)
