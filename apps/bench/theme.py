"""Colours and sizes of all figures, for light and dark pages."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvshare_mm.errors import ConfigError

# A README shows a figure about 830 pixels wide; at 7.6 inches its 11-point text stays readable.
WIDTH = 7.6


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of one kind of page.

    Attributes:
        name: ends the file name.
        background, text, grid: of the page.
        methods: a colour each, told apart by colour-blind people too; those of others repeat.
    """

    name: str
    background: str
    text: str
    grid: str
    methods: dict[str, str]

    def colour(self, method: str) -> str:
        """The colour of a method, also of one that is a policy made up on the command line."""
        known = self.methods.get(method)
        if known:
            return known
        spare = list(self.methods.values())
        return spare[sum(method.encode()) % len(spare)]


_METHODS = (
    # Grey for those that reuse nothing or only what is identical.
    ("full", "#57606a", "#b1bac4"),
    ("bfloat16", "#6e7781", "#9da7b3"),
    ("prefix", "#8c959f", "#8b949e"),
    ("placeholders", "#bc4c00", "#f0883e"),
    ("cacheblend", "#0969da", "#58a6ff"),
    ("epic", "#8250df", "#bc8cff"),
    ("window32", "#bf3989", "#f778ba"),
    ("boundary", "#1a7f37", "#56d364"),
    ("prophetkv", "#0a3069", "#a5d6ff"),
    ("llamacpp", "#7d4e00", "#e3b341"),
    ("deviation", "#1b7c83", "#39c5cf"),
    ("kvshare", "#cf222e", "#ff7b72"),
    ("gptcache", "#9a6700", "#d29922"),
)
LIGHT = Theme("light", "#ffffff", "#1f2328", "#d0d7de", {name: x for name, x, _ in _METHODS})
DARK = Theme("dark", "#0d1117", "#e6edf3", "#30363d", {name: x for name, _, x in _METHODS})
THEMES = (LIGHT, DARK)

LABELS = {
    "full": "full recompute",
    "bfloat16": "full, in bfloat16",
    "prefix": "prefix caching",
    "placeholders": "placeholders only",
    "cacheblend": "CacheBlend-style",
    "epic": "EPIC-style",
    "window32": "window of 32",
    "boundary": "to the boundary",
    "prophetkv": "ProphetKV-style",
    "llamacpp": "llama.cpp-style",
    "deviation": "deviation",
    "kvshare": "KVShare",
    "q8": "KVShare, donors in 8 bits",
    "gptcache": "GPTCache",
}
_MARKERS = {"prefix": "s", "placeholders": "X", "cacheblend": "o", "epic": "^", "deviation": "D",
            "window32": "*", "boundary": "<", "prophetkv": "P", "llamacpp": "p",
            "kvshare": "o"}  # fmt: skip

# Draws on a matplotlib figure.
Draw = Callable[[Any, Theme], None]


def label(method: str) -> str:
    """What a method is called in a figure."""
    return LABELS.get(method, method)


def model_label(model: str) -> str:
    """A model's name without its folders, which are of one machine only."""
    return model.rstrip("/").rpartition("/")[2].removesuffix(".gguf")


def style(method: str, theme: Theme) -> dict[str, Any]:
    """Line options of a method; this project's own stands out."""
    ours = method == "kvshare"
    return {
        "color": theme.colour(method),
        "marker": _MARKERS.get(method, "v"),
        "linewidth": 2.6 if ours else 1.5,
        "markersize": 7 if ours else 5,
        "zorder": 3 if ours else 2,
        "label": label(method),
    }


def svg(draw: Draw, theme: Theme, height: float, name: str) -> str:
    """A figure as SVG without a prologue, ready for a file or a page.

    Args:
        draw: draws on an empty figure.
        height: in inches.
        name: unique on a page: what figures refer to inside themselves is named after it.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("figures need matplotlib: pip install 'kvshare-mm[bench]'") from error
    options = {
        "axes.axisbelow": True,
        "axes.edgecolor": theme.grid,
        "axes.facecolor": theme.background,
        "axes.grid": True,
        "axes.labelcolor": theme.text,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 11,
        "figure.facecolor": theme.background,
        "font.size": 11,
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        "legend.facecolor": theme.background,
        "legend.framealpha": 0.9,
        "legend.edgecolor": theme.grid,
        "legend.fontsize": 10,
        "svg.fonttype": "path",
        "svg.hashsalt": f"{name}-{theme.name}",
        "text.color": theme.text,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
    }
    with mpl.rc_context(options):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure, theme)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
