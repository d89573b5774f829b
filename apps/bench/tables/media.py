"""Tables of what is measured with pictures."""

from __future__ import annotations

from kvshare_mm.apps.bench.figures.theme import label, model_label
from kvshare_mm.apps.bench.tables.base import Kind, Report, Rows, ms


def _vision(report: Report) -> Rows:
    rows = [["picture", "method", "read", "tower", "text", "first token", "times sooner",
             "computed", "tower runs"]]  # fmt: skip
    for name, layout in report["layouts"].items():
        for method, found in layout["methods"].items():
            rows.append(
                [
                    name.replace("_", " "),
                    label(method),
                    *(ms(found[part]) for part in ("read_s", "tower_s", "text_s", "ttft_s")),
                    f"{found['times_sooner']:.1f}",
                    f"{found['computed_tokens']} of {layout['tokens']}",
                    str(found["tower_runs"]),
                ]
            )
    return rows


def _vision_title(report: Report) -> str:
    return (
        f"{report['model']}; the tower costs {report['tower_to_text']:.2f} times what the text "
        f"part does for an image token (3B: {report['tower_to_text_of_3b']:.2f})"
    )


def _pictures(report: Report) -> Rows:
    ways = list(report["methods"]["full"]["accuracy_by_way"])
    rows = [["method", "right", *(way.replace("_", " ") for way in ways), "as full", "computed",
             "encoder runs", "leaks, other picture"]]  # fmt: skip
    for name, found in report["methods"].items():
        shares = [found["accuracy"], *found["accuracy_by_way"].values(), found["same_as_full"]]
        leaks = report["leaks"][name]
        rows.append(
            [
                label(name),
                *("-" if share is None else f"{share:.1%}" for share in shares),
                *(f"{found[part]:.0%}" for part in ("computed_share", "encoder_share")),
                f"{leaks['leaks']} of {leaks['pairs']}",
            ]
        )
    return rows


MEDIA: dict[str, Kind] = {
    "vision": Kind(_vision_title, _vision),
    "pictures": Kind(
        lambda r: f"{r['pairs']} similar requests about pictures, {model_label(r['model'])}",
        _pictures,
    ),
}
