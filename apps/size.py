"""``kvshare size``: what a model's KV takes, how large a store should be, what that saves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, Field, ValidationError
from rich.console import Console
from rich.table import Table

from kvshare_mm.apps.options import between, described
from kvshare_mm.apps.terminal import plain_errors
from kvshare_mm.errors import ConfigError

_GIB, _DAY_S = 2**30, 86_400
MOST = 10**9  # of tokens, GiB, TFLOP/s and the like: more than anybody has, and no sum overflows

console = Console()


_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Method(BaseModel):
    token_share: _Share
    shares: list[_Share] = []


class _Pool(BaseModel):
    methods: dict[str, _Method]


class Curve(BaseModel):
    """What is read of a report of `kvshare bench hitrate`: token shares by donors kept."""

    pool_sizes: dict[Annotated[int, Field(ge=1)], _Pool]

    def share(self, method: str, donors: float) -> float:
        """Straight between the measured pools over the logarithm of their sizes, and flat beyond
        them."""
        import numpy as np

        sizes = sorted(self.pool_sizes)
        shares = [self.pool_sizes[size].methods[method].token_share for size in sizes]
        return float(
            np.interp(math.log(max(donors, 1)), [math.log(max(s, 1)) for s in sizes], shares)
        )


def size(
    model: Annotated[str, typer.Option(help=f"{described('model')}; config.json alone will do")],
    requests_per_day: Annotated[float, between(1, 10**12, "requests a day")],
    prompt_tokens: Annotated[int, typer.Option(min=1, max=MOST, help="of a usual request")] = 2000,
    answer_tokens: Annotated[int, typer.Option(min=0, max=MOST, help="of a usual request")] = 200,
    host_gib: Annotated[float, between(0, MOST, "`--host-gib` of the server")] = 2,
    disk_gib: Annotated[float, between(0, MOST, "`--disk-gib` of the server")] = 20,
    dtype: Annotated[
        str, typer.Option(help="of the KV; auto: as the model's config has it; or q8_0")
    ] = "auto",
    gpu_tflops: Annotated[float, between(1e-3, MOST, "that prefill reaches")] = 100,
    gpu_gbps: Annotated[float, between(1e-3, MOST, "GB/s from where KV lies to the device")] = 25,
    similarity: Annotated[
        Path | None, typer.Option(help="your traffic: what `kvshare bench hitrate --json` wrote")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the numbers as JSON")] = False,
) -> None:
    """How large a store should be, from a model's config and your traffic; nothing is loaded.

    **Moving or computing?** KV is worth moving where the way to the device is faster than
    `bytes per token / (2 x parameters / FLOP/s)`: embeddings and attention are left out, so long
    prompts gain more. `--similarity` adds how much of a prompt is found, measured on your prompts:

    `kvshare bench hitrate --stream prompts.jsonl --plan-only --json curve.json`
    """
    with plain_errors():
        found = measure_size(
            model, requests_per_day, prompt_tokens, answer_tokens, dtype, gpu_tflops, gpu_gbps,
            {"host": host_gib, "disk": disk_gib}, similarity,
        )  # fmt: skip
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        console.print(_table(found))


def measure_size(
    model: str,
    requests_per_day: float,
    prompt_tokens: int,
    answer_tokens: int,
    dtype: str,
    tflops: float,
    gbps: float,
    tiers: dict[str, float],
    similarity: Path | None = None,
) -> dict[str, Any]:
    """The numbers of `kvshare size`. Raises ConfigError, ModelLoadError."""
    from kvshare_mm.models.check import check_model
    from kvshare_mm.models.loader import DTYPES

    packed = dtype == "q8_0"
    if dtype != "auto" and not packed and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is none of auto, q8_0, {', '.join(DTYPES)}")
    known = check_model(model)
    if known.shape is None:
        raise ConfigError(f"KV of {model} cannot be shared: {known.reason}")
    kv_dtype = DTYPES.get(dtype, known.dtype)
    per_token = known.shape.bytes_per_token(kv_dtype, packed)
    per_request = per_token * (prompt_tokens + answer_tokens)
    computing_s = 2 * known.parameters / (tflops * 1e12)
    curve = None if similarity is None else read_curve(similarity)
    stores: dict[str, Any] = {}
    for name, gib in tiers.items():
        requests = gib * _GIB / per_request
        entry: dict[str, Any] = {
            "gib": gib,
            "requests": int(requests),
            "hours": 24 * requests / requests_per_day,
        }
        if curve is not None:
            shares = {m: curve.share(m, requests) for m in ("prefix", "kvshare")}
            entry |= {f"found_{method}": share for method, share in shares.items()}
            saved = shares["kvshare"] * prompt_tokens * requests_per_day
            moved_s = per_token / (gbps * 1e9)
            entry["saved_device_s_per_day"] = saved * (computing_s - moved_s)
        stores[name] = entry
    return {
        "model": model,
        "dtype": dtype if packed else str(kv_dtype).removeprefix("torch."),
        "parameters": known.parameters,
        "layers": known.shape.num_layers,
        "kv_heads": known.shape.num_kv_heads,
        "dims": known.shape.key_dim + known.shape.value_dim,
        "bytes_per_token": per_token,
        "tokens_per_gib": _GIB // per_token,
        "bytes_per_request": per_request,
        "gib_per_day": per_request * requests_per_day / _GIB,
        "computing_us_per_token": 1e6 * computing_s,
        "moving_us_per_token": per_token / (gbps * 1e3),
        "moving_wins_above_gbps": per_token / computing_s / 1e9,
        "gbps": gbps,
        "tflops": tflops,
        "measured_pools": None if curve is None else sorted(curve.pool_sizes),
        "stores": stores,
    }


def read_curve(path: Path) -> Curve:
    """What `kvshare bench hitrate --json` wrote. Raises ConfigError: it is not that."""
    try:
        curve = Curve.model_validate_json(path.read_bytes())
        if not curve.pool_sizes:
            raise ValueError("no pool was measured")
        for method in ("prefix", "kvshare"):
            curve.share(method, 1)
    except (OSError, ValueError, KeyError) as error:
        why = wrong(error) if isinstance(error, ValidationError) else str(error)
        raise ConfigError(
            f"similarity: {path} is not what `kvshare bench hitrate --json` writes: {why}"
        ) from error
    return curve


def wrong(error: ValidationError) -> str:
    """What is wrong first, and where."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]


def _table(found: dict[str, Any]) -> Table:
    table = Table(show_header=False, title=found["model"], title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    size_of = {"float32": "4", "q8_0": "34/32"}.get(found["dtype"], "2")
    table.add_row(
        "KV of a token",
        f"{found['bytes_per_token']:,} bytes = {found['layers']} layers x {found['kv_heads']} heads"
        f" x {found['dims']} x {size_of} ({found['dtype']})",
    )
    table.add_row("tokens in a GiB", f"{found['tokens_per_gib']:,}")
    table.add_row("KV of a request", f"{found['bytes_per_request'] / 2**20:,.1f} MiB, stored whole")
    table.add_row("KV of a day", f"{found['gib_per_day']:,.1f} GiB, stored whole")
    wins = found["moving_wins_above_gbps"]
    table.add_row(
        "moving wins above",
        f"{wins:,.3g} GB/s = {found['bytes_per_token']:,} bytes / (2 x"
        f" {found['parameters']:.3g} parameters / {found['tflops']:g}e12 FLOP/s)",
    )
    table.add_row(
        "at your GB/s",
        f"{found['gbps'] / wins:,.2g} times sooner than computing"
        f" ({found['moving_us_per_token']:.3g} us a token, not"
        f" {found['computing_us_per_token']:.3g})",
    )
    for name, store in found["stores"].items():
        line = f"{store['requests']:,} requests, {store['hours']:,.1f} hours of traffic"
        if "found_kvshare" in store:
            line += (
                f"; {store['found_kvshare']:.0%} of prompt tokens found"
                f" (prefix caching {store['found_prefix']:.0%}),"
                f" {store['saved_device_s_per_day']:,.0f} device seconds a day saved"
            )
        table.add_row(f"{store['gib']:g} GiB {name}", line)
    return table
