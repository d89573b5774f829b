"""`kvshare bench kernels`"""

from __future__ import annotations

from typing import Annotated

import typer

from kvshare_mm.apps.bench.terminal import Out, console, plain_errors, table, write_report


def kernels(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda; auto is the GPU if any")] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="timings a method")] = 20,
    json_file: Out = None,
) -> None:
    """Attention and KV edit for one layer, ours beside what else could do it, and checked.

    On a GPU: every tile, SDPA with a mask, FlexAttention, flash-attention if it is installed.
    """
    import torch

    from kvshare_mm.apps.bench.kernels import CPU_SHAPES, GPU_SHAPES, run
    from kvshare_mm.errors import ConfigError

    with plain_errors():
        found = torch.cuda.is_available()
        if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not found):
            raise ConfigError(f"device {device!r} is not there: auto, cpu, or cuda with a GPU")
        on_gpu = found and device != "cpu"
        report = run(
            torch.device("cuda" if on_gpu else "cpu"),
            dtype=torch.bfloat16 if on_gpu else torch.float32,
            repeats=repeats,
            shapes=GPU_SHAPES if on_gpu else CPU_SHAPES,
        )
        made = table(
            f"Attention of one layer, {report['dtype']}",
            "method", "tokens", "computed", "runs of", "ms", "times sooner", "TFLOP/s", "GB/s",
            "max error",
        )  # fmt: skip
        for row in report["attention"]:
            figures = [f"{row[k]:,}" for k in ("num_tokens", "num_computed", "run")]
            figures += [f"{row['ms']:.3f}", f"{row['speedup']:.1f}"]
            if "tflops" in row:
                figures += [f"{row['tflops']:.2f}", f"{row['gb_per_s']:.0f}"]
                figures += [f"{row['max_abs_error']:.1e}"]
            made.add_row(row["method"], *figures)
        console.print(made)
        made = table("KV edit of one layer", "method", "model", "tokens", "ms", "GB/s")
        for row in report["edit"]:
            made.add_row(
                row["method"],
                row["model"],
                f"{row['num_tokens']:,}",
                f"{row['ms']:.3f}",
                f"{row['gb_per_s']:.1f}",
            )
        console.print(made)
        write_report(report, json_file)
