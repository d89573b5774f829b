"""The `kvshare` command."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from kvshare_mm import __version__
from kvshare_mm.apps.audit.cli import audit
from kvshare_mm.apps.bench.cli import bench
from kvshare_mm.apps.desk.cli import desk
from kvshare_mm.apps.kernels import kernels
from kvshare_mm.apps.models import models
from kvshare_mm.apps.options import Values, config_options, described
from kvshare_mm.apps.router.cli import route
from kvshare_mm.apps.server.cache_cli import cache
from kvshare_mm.apps.server.cli import keys, serve
from kvshare_mm.apps.simulate import simulate
from kvshare_mm.apps.size import size
from kvshare_mm.apps.store import store
from kvshare_mm.apps.terminal import plain_errors, report_file, write_report
from kvshare_mm.models.names import refuse_unknown

app = typer.Typer(
    name="kvshare",
    help="Serve a language model and share KV cache between requests that are alike but not equal.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")
app.add_typer(kernels, name="kernels")
app.add_typer(models, name="models")
app.add_typer(keys, name="keys")
app.add_typer(cache, name="cache")
app.add_typer(store, name="store")
app.command()(serve)
app.command()(route)
app.command()(desk)
app.command("ui", hidden=True)(desk)  # as it was called
app.command()(audit)
app.command()(size)
app.command()(simulate)
console = Console()

_OF_CONFIG: dict[str | None, tuple[str, ...]] = {
    None: ("model", "store_dir", "repair", "max_divergence")
}
Images = Annotated[
    list[str] | None,
    typer.Option("--image", help="a picture for the question: path or URL; repeatable"),
]
Sounds = Annotated[
    list[str] | None,
    typer.Option("--audio", help="a sound file for the question; repeatable"),
]
Json = Annotated[
    Path | None,
    typer.Option("--json", help="also write the results to this file", callback=report_file),
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"kvshare {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", help="print the version", callback=_version, is_eager=True),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="show what happens inside")
    ] = False,
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False)],
    )


@contextmanager
def serving(model: str, **options: Any) -> Iterator[Any]:
    """A running `KVShare`, with a word on what takes time."""
    with plain_errors():
        refuse_unknown(model)
        console.print(f"Loading [bold]{escape(model)}[/] ...")
        from kvshare_mm.llm import KVShare

        llm = KVShare(model, **options)
        try:
            yield llm
        finally:
            llm.close()


@app.command()
@config_options({None: ("model",)})
def demo(
    config: Values,
    repeats: Annotated[int, typer.Option(min=1, help="measurements per method")] = 2,
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 24,
    json_file: Json = None,
    picture: Annotated[
        Path | None, typer.Option(help="also save the first story's coloured prompt as SVG")
    ] = None,
    show_prompts: Annotated[
        bool, typer.Option(help="show the prompts, coloured by where their KV came from")
    ] = False,
) -> None:
    """Stories: somebody asked something similar before. What does that save?

    Five of words, and two of pictures if tiny-vl is installed.
    """
    from kvshare_mm.apps import showcase
    from kvshare_mm.apps.stories import picture_stories
    from kvshare_mm.models.loader import is_installed

    model = config["model"]
    # It knows the drawings and their words, and nothing else.
    sees = model == "tiny-vl"

    told: list[dict[str, Any]] = []

    def tell(llm: Any, picture: Path | None, stories: Any) -> dict[str, Any]:
        report = showcase.run(llm, console, repeats, max_tokens, picture, stories, show_prompts)
        told.extend(report["stories"])
        return report

    with ExitStack() as loaded:
        quiet: dict[str, Any] = {"embedder": None, "audit_share": 0}
        llm = loaded.enter_context(serving(model, **quiet))
        tiny_vl = None
        if not sees and is_installed("tiny-vl"):
            tiny_vl = loaded.enter_context(serving("tiny-vl", **quiet))
        if not show_prompts:
            console.print(showcase.HEADING)
        report = tell(llm, picture, picture_stories() if sees else None)
        if tiny_vl is not None:
            report["pictures"] = tell(tiny_vl, None, picture_stories())
    if show_prompts:  # each row stood below its prompt; here they are together
        console.print()
        console.print(showcase.HEADING)
        for story in told:
            console.print(showcase.row(story))
    else:
        console.print("With --show-prompts: every prompt, coloured by where its KV came from.")
    write_report(report, json_file)


@app.command()
@config_options(_OF_CONFIG)
def generate(
    prompt: Annotated[str, typer.Argument(help="the prompt; - reads it from standard input")],
    config: Values,
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy")] = 0.0,
    raw: Annotated[
        bool, typer.Option(help="send the prompt as it is, without chat template")
    ] = False,
    image: Images = None,
    audio: Sounds = None,
) -> None:
    """Answer one prompt and say how much of it was reused."""
    from kvshare_mm.apps import chat as chat_app
    from kvshare_mm.sampling import SamplingParams

    text = typer.get_text_stream("stdin").read() if prompt == "-" else prompt
    if raw and (image or audio):
        raise typer.BadParameter("--raw sends text alone; leave it out, or the media")
    content = chat_app.with_media(text, image or [], audio or [])
    with serving(**config, embedder=None) as llm:
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature)
        output = chat_app.show(
            llm, console, text if raw else [{"role": "user", "content": content}], params
        )
        console.print(chat_app.reuse_line(output), style="dim", markup=False)


@app.command()
@config_options(_OF_CONFIG)
def chat(
    config: Values,
    system: Annotated[str | None, typer.Option(help="system prompt")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy")] = 0.0,
    image: Images = None,
    audio: Sounds = None,
) -> None:
    """Talk to the model; under every answer stands what was reused and from where.

    Pictures and sound given here belong to the first question; /image FILE and /audio FILE add
    some to the next.
    """
    from kvshare_mm.apps import chat as chat_app
    from kvshare_mm.sampling import SamplingParams

    with serving(**config) as llm:
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature)
        chat_app.talk(llm, console, params, system, image or [], audio or [])


@app.command()
@config_options({None: ("store_dir", "repair", "max_divergence", "max_model_len")})
def calibrate(
    model: Annotated[str, typer.Argument(help=described("model"))],
    requests: Annotated[
        Path,
        typer.Option(help="JSON Lines: {messages} or {prompt} or {text}, in the order they came"),
    ],
    config: Values,
    out: Annotated[
        Path | None,
        typer.Option(help="what was learned, for `--calibration`", callback=report_file),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="the first so many")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer that is compared")] = 64,
    json_file: Json = None,
) -> None:
    """Learn from your own requests how far reuse is from full recompute.

    Answers them one after the other, computes all that reused similar ones in full as well, and
    keeps what that teaches in --store-dir, together with the requests, or in --out.
    """
    from kvshare_mm.apps import calibrate as calibrate_app

    with plain_errors():
        asked = calibrate_app.read_requests(requests, limit)
    with serving(model, **config, audit_share=1, audit_budget=1e12, embedder=None) as llm:
        report = calibrate_app.run(llm, asked, max_tokens)
        calibrate_app.show(report, console)
        if out is not None:
            llm.cache.save_calibration(out)
            console.print(f"What was learned is in {out}", markup=False)
    write_report(report, json_file)


@app.command()
def inspect(
    store_dir: Annotated[Path, typer.Argument(help="a store folder")],
    tree: Annotated[
        bool, typer.Option("--tree", help="draw which request was edited from which")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, help="donors listed")] = 50,
) -> None:
    """List the donors of a store folder: tokens, sizes, ages, and the tree."""
    from kvshare_mm.apps import inspect as inspect_app

    with plain_errors():
        inspect_app.show(store_dir, console, tree, limit)


if __name__ == "__main__":
    app()
