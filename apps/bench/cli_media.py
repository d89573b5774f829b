"""`kvshare bench vision`: time with pictures."""

from __future__ import annotations

from typing import Annotated

import typer

from kvshare_mm.apps.bench.terminal import (
    Out,
    console,
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
    repair: Annotated[
        str, typer.Option(help="repair policy of the method kvshare")
    ] = "window:8+tail:16",
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
