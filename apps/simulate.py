"""``kvshare simulate``: what ways of routing gain, over many replicas that nobody has yet."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel, Field, ValidationError
from rich.table import Table

from kvshare_mm.apps.options import between
from kvshare_mm.apps.size import MOST, read_curve, wrong
from kvshare_mm.apps.terminal import console, plain_errors
from kvshare_mm.errors import ConfigError

if TYPE_CHECKING:
    from kvshare_mm.apps.router.simulation import Requests

_MOST_CELLS = 1 << 28  # of what the router knows: a number for each family and replica
_MOST_KEYS = 10**8  # families or users: arrays of this length are made


class _Line(BaseModel):
    """Of a trace."""

    timestamp: float = Field(strict=True, ge=-1e20, le=1e20, allow_inf_nan=False)
    input_length: int = Field(ge=0, le=MOST)
    hash_ids: list[int | str] = Field(min_length=1)


def simulate(
    replicas: Annotated[int, typer.Option(min=1, max=10_000, help="how many")] = 8,
    requests: Annotated[int, typer.Option(min=1, max=MOST, help="of a trace, at most")] = 100_000,
    load: Annotated[
        float, between(1e-3, 1e6, "arrivals: tokens over what replicas compute in time")
    ] = 0.7,
    tokens_per_second: Annotated[
        float, between(1e-3, MOST, "of prompts, that a replica computes")
    ] = 10_000,
    cache_gib: Annotated[float, between(0, MOST, "for donors, of each replica")] = 64,
    bytes_per_token: Annotated[
        int, typer.Option(min=1, max=MOST, help="of KV, as `kvshare size` says")
    ] = 131_072,
    prompt_tokens: Annotated[int, typer.Option(min=1, max=MOST, help="of each request")] = 2000,
    families: Annotated[
        int, typer.Option(min=1, max=_MOST_KEYS, help="kinds of alike requests")
    ] = 10_000,
    zipf: Annotated[float, between(0, 10, "the k-th family is asked 1 / k^ZIPF as often")] = 1.0,
    share: Annotated[float, between(0, 1, "of a prompt, found where its family's donor is")] = 0.8,
    similarity: Annotated[
        Path | None,
        typer.Option(help="instead: shares drawn from what `kvshare bench hitrate --json` wrote"),
    ] = None,
    same_start: Annotated[float, between(0, 1, "requests that begin as their family does")] = 0.5,
    users: Annotated[
        int, typer.Option(min=1, max=_MOST_KEYS, help="each asks requests of all families")
    ] = 10_000,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="instead of what is drawn: JSON Lines of timestamp (ms), input_length, hash_ids"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of what is drawn")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print the numbers as JSON")] = False,
) -> None:
    """Which way of routing suits your traffic: arrivals over replicas with queues and caches.

    Nothing is computed by a model. A replica computes one prompt after the other and keeps a donor
    of each family. `round robin` takes turns; `by user` and `by prefix` hash who asks and how a
    prompt begins; `two choices` hashes beginnings to two replicas and caps their load; `kvshare` is
    what `kvshare route` does.
    """
    with plain_errors(), _in_memory():
        import numpy as np

        from kvshare_mm.apps.router.simulation import POLICIES
        from kvshare_mm.apps.router.simulation import simulate as run

        rng = np.random.default_rng(seed)
        if trace is not None:
            made = traced(trace, requests)
        else:
            shares = np.array([share])
            if similarity is not None:
                curve = read_curve(similarity)
                largest = curve.pool_sizes[max(curve.pool_sizes)]
                shares = np.array(largest.methods["kvshare"].shares or [share])
            made = drawn(requests, prompt_tokens, families, zipf, shares, same_start, users, rng)
        if (int(made.family.max()) + 1) * replicas > _MOST_CELLS:
            raise ConfigError("families: with so many replicas there are too many to simulate")
        rate = load * replicas * tokens_per_second / float(made.tokens.mean())
        made = timed(made, rate)
        found: dict[str, Any] = {}
        for policy in POLICIES:
            begun = time.perf_counter()
            cache = cache_gib * 2**30 / bytes_per_token
            found[policy] = run(made, policy, replicas, tokens_per_second, cache, seed)
            found[policy]["simulated_per_s"] = len(made.at) / (time.perf_counter() - begun)
    if as_json:
        print(json.dumps({"requests_per_s": rate, "policies": found}, indent=2))
    else:
        over = f"{rate:,.4g} a second, over {replicas:,} replicas"
        title = f"First token of {len(made.at):,} requests, {over}"
        console.print(_table(title, found))


@contextmanager
def _in_memory() -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise ConfigError("requests, families, users: so many need more memory") from error


def drawn(
    count: int,
    tokens: int,
    families: int,
    zipf: float,
    shares: Any,
    same_start: float,
    users: int,
    rng: Any,
) -> Requests:
    """Requests that arrive at random (Poisson), one a second in the mean. See `simulate`."""
    import numpy as np

    from kvshare_mm.apps.router.simulation import Requests

    weights = 1.0 / np.arange(1, families + 1) ** zipf
    family = rng.choice(families, count, p=weights / weights.sum())
    starts = np.where(rng.random(count) < same_start, family, families + np.arange(count))
    return Requests(
        at=np.cumsum(rng.exponential(size=count)),
        tokens=np.full(count, tokens),
        family=family,
        shared=(tokens * rng.choice(shares, count)).astype(np.int64),
        start=starts,
        user=rng.integers(users, size=count),
    )


def traced(path: Path, most: int) -> Requests:
    """Requests of a trace. Those with the same first two blocks are a family, and one user's; what
    they share is the leading blocks that an earlier request had.

    Raises:
        ConfigError: the file is no such trace.
    """
    import numpy as np

    from kvshare_mm.apps.router.simulation import Requests

    numbers: dict[tuple[int | str, ...], int] = {}
    seen: set[int | str] = set()
    rows = []
    try:
        with path.open("rb") as lines:
            for text, _ in zip(lines, range(most), strict=False):
                line = _Line.model_validate_json(text)
                blocks, tokens = line.hash_ids, line.input_length
                known = next((n for n, b in enumerate(blocks) if b not in seen), len(blocks))
                seen.update(blocks)
                family = numbers.setdefault(tuple(blocks[:2]), len(numbers))
                shared = tokens * known // len(blocks)
                rows.append((line.timestamp / 1000, max(tokens, 1), family, shared))
    except OSError as error:
        raise ConfigError(f"trace: cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        why = wrong(error).partition(" at line ")[0]  # of this one line
        raise ConfigError(f"trace: {path}, line {len(rows) + 1}: {why}") from error
    if not rows:
        raise ConfigError(f"trace: {path} has no requests")
    columns = [np.array(column) for column in zip(*sorted(rows), strict=True)]
    kinds = columns[2]
    return Requests(columns[0].astype(float), columns[1], kinds, columns[3], kinds, kinds)


def timed(requests: Requests, rate: float) -> Requests:
    """The same at so many a second in the mean."""
    from dataclasses import replace

    at = requests.at - requests.at[0]
    span = float(at[-1]) if at[-1] > 1e-9 else 1.0  # all at once
    return replace(requests, at=at * (len(at) / rate / span))


def _table(title: str, found: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("routing")
    for name in ("median", "99 of 100", "computed", "busiest", "simulated"):
        table.add_column(name, justify="right")
    for policy, row in found.items():
        table.add_row(
            policy, _seconds(row["ttft_p50_s"]), _seconds(row["ttft_p99_s"]),
            f"{row['computed']:.1%}", f"{row['busiest']:.2f} x mean",
            f"{row['simulated_per_s']:,.0f}/s",
        )  # fmt: skip
    return table


def _seconds(value: float) -> str:
    return f"{value:,.3g} s" if value < 1000 else f"{value:,.0f} s"
