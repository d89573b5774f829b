"""The DELTA tree as a picture."""

from __future__ import annotations

from collections.abc import Sequence

from kvshare_mm.apps.desk.views import scrolling
from kvshare_mm.reuse.admin import DonorInfo

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y = 148, 44, 16, 30

Donors = Sequence[tuple[DonorInfo, int | None]]


def draw(donors: Donors) -> str:
    """SVG of stored requests, the oldest first: under each, those that were edited from it.

    A box's filled share is what its request holds itself; the rest lies with its ancestors.
    """
    if not donors:
        return '<p class="desk-quiet">The tree grows with the first answer.</p>'
    places = _places([(info.donor_id, info.parent) for info, _ in donors])
    columns = 1 + max(x for x, _ in places.values())
    rows = 1 + max(y for _, y in places.values())
    width = columns * (_WIDTH + _GAP_X)
    height = rows * (_HEIGHT + _GAP_Y)
    lines, boxes = [], []
    for info, number in donors:
        left, top = _corner(places[info.donor_id])
        if info.parent in places:
            up_left, up_top = _corner(places[str(info.parent)])
            x1, y1 = up_left + _WIDTH / 2, up_top + _HEIGHT
            x2, y2 = left + _WIDTH / 2, top
            middle = (y1 + y2) / 2
            lines.append(
                f'<path d="M{x1:.1f} {y1:.1f}C{x1:.1f} {middle:.1f} {x2:.1f} {middle:.1f} '
                f'{x2:.1f} {y2:.1f}"/>'
            )
        boxes.append(_box(info, number, left, top))
    whole = sum(info.num_tokens for info, _ in donors)
    held = sum(info.num_owned for info, _ in donors)
    said = f"{len(donors)} stored requests hold {held} tokens; stored whole they would be {whole}"
    return f'<p class="desk-quiet">{said}.</p>' + scrolling(
        "The tree",
        f'<svg class="desk-tree" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="{said}">'
        f"{''.join(lines)}{''.join(boxes)}</svg>",
    )


def _places(nodes: Sequence[tuple[str, str | None]]) -> dict[str, tuple[float, int]]:
    """Column and row of each node: leaves side by side, parents over the middle of theirs."""
    ids = {node_id for node_id, _ in nodes}
    children: dict[str | None, list[str]] = {}
    for node_id, parent in nodes:
        children.setdefault(parent if parent in ids else None, []).append(node_id)
    places: dict[str, tuple[float, int]] = {}
    free = 0.0
    # Depth first without recursion: a chain of edits may be longer than Python's stack.
    stack: list[tuple[str, int, bool]] = [(n, 0, False) for n in reversed(children.get(None, []))]
    while stack:
        node_id, depth, visited = stack.pop()
        below = children.get(node_id, [])
        if below and not visited:
            stack.append((node_id, depth, True))
            stack.extend((child, depth + 1, False) for child in reversed(below))
        elif below:
            places[node_id] = (sum(places[c][0] for c in (below[0], below[-1])) / 2, depth)
        else:
            places[node_id] = (free, depth)
            free += 1
    return places


def _corner(place: tuple[float, int]) -> tuple[float, float]:
    x, y = place
    return x * (_WIDTH + _GAP_X) + _GAP_X / 2, y * (_HEIGHT + _GAP_Y) + 4


def _box(info: DonorInfo, number: int | None, left: float, top: float) -> str:
    share = info.num_owned / info.num_tokens
    name = f"#{number}" if number else info.donor_id[:6]
    return (
        f'<g transform="translate({left:.1f} {top:.1f})">'
        f'<rect class="desk-node" width="{_WIDTH}" height="{_HEIGHT}" rx="7"/>'
        f'<rect class="desk-owned" width="{_WIDTH * share:.1f}" height="5" y="{_HEIGHT - 5}"/>'
        f'<text x="10" y="18" class="desk-name">{name}</text>'
        f'<text x="10" y="33">owns {info.num_owned} of {info.num_tokens} tokens</text></g>'
    )
