"""`kvshare bench vision` and `pictures`: time and right answers with pictures."""

from __future__ import annotations

from typing import Annotated

import typer

from kvshare_mm.apps.bench.terminal import (
    Model,
    Out,
    console,
    opened_rig,
    plain_errors,
    table,
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
        console.print(
            f"{report['model']}; the tower costs {report['tower_to_text']:.2f} times what the "
            f"text part does for an image token (3B: {report['tower_to_text_of_3b']:.2f})"
        )
        for name, layout in report["layouts"].items():
            made = table(
                f"{name}: {layout['tokens']} tokens, {layout['image_tokens']} of them the picture",
                "method", "read ms", "tower ms", "text ms", "first token ms", "times sooner",
                "CPU ms", "times less", "computed", "tower runs",
            )  # fmt: skip
            for method, row in layout["methods"].items():
                figures = [
                    f"{1000 * row[part]:.0f}" for part in ("read_s", "tower_s", "text_s", "ttft_s")
                ]
                figures += [f"{row['times_sooner']:.1f}", f"{1000 * row['cpu_s']:.0f}"]
                figures += [f"{row['times_less_cpu']:.1f}", str(row["computed_tokens"])]
                made.add_row(method, *figures, str(row["tower_runs"]))
            console.print(made)
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
        ways = list(report["methods"]["full"]["accuracy_by_way"])
        made = table(
            f"{report['pairs']} similar requests, right answers",
            "method", "all", *(way.replace("_", " ") for way in ways), "as full", "computed",
            "encoder runs",
        )  # fmt: skip
        for name, row in report["methods"].items():
            shares = [row["accuracy"], *row["accuracy_by_way"].values(), row["same_as_full"]]
            figures = ["-" if share is None else f"{100 * share:.1f}%" for share in shares]
            figures += [f"{100 * row[part]:.0f}%" for part in ("computed_share", "encoder_share")]
            made.add_row(name, *figures)
        console.print(made)
        made = table("Another picture", "method", "pairs", "right", "leaks")
        for name, row in report["leaks"].items():
            made.add_row(name, str(row["pairs"]), str(row["right"]), str(row["leaks"]))
        console.print(made)
        write_report(report, json_file)
