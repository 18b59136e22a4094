"""Boxes and arrows as SVG, laid out in layers from left to right. Pure, without a dependency.

Arrows point to the right where they can; one that closes a circle runs back. Boxes of a layer are ordered so that few
arrows cross, and an arrow over several layers gets room of its own in each. Colours follow the viewer's preference for
light or dark; the picture has a background, so that it is legible on any page.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Final

from weft.cli.output import columns_of, cut

FONT: Final = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
LETTER: Final = 7.9
"""Width of a letter of a title, a little more than of any usual font."""
WIDEST: Final = 34
"""Letters of a title that are shown."""
HEIGHT, MARGIN, PAD = 46.0, 28.0, 16.0
BETWEEN_LAYERS, BETWEEN_BOXES, LANE = 104.0, 26.0, 18.0
"""Room between two layers, between two boxes of one, and for an arrow that passes through."""
PORT: Final = 13.0
"""Distance between two arrows at one side of a box."""
SWEEPS: Final = 8
STYLE: Final = """
  svg { color-scheme: light dark }
  .page { fill: #ffffff } .task, .lock { fill: #f4f6f9; stroke: #59636e; stroke-width: 1.2 }
  .lock { fill: #fff8e6 } .title { fill: #1f2328; font-size: 13px; font-weight: 600 }
  .sub, .label { fill: #59636e; font-size: 11px } .label { paint-order: stroke; stroke: #ffffff; stroke-width: 4 }
  .arrow { fill: none; stroke: #59636e; stroke-width: 1.4 } .head { fill: #59636e }
  .hot.task, .hot.lock { stroke: #cf222e; stroke-width: 2 } .hot.arrow { stroke: #cf222e; stroke-width: 2 }
  .hot.head, .hot.label { fill: #cf222e }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117 } .task { fill: #161b22; stroke: #9198a1 } .lock { fill: #272115; stroke: #9198a1 }
    .title { fill: #f0f6fc } .sub, .label { fill: #9198a1 } .label { stroke: #0d1117 }
    .arrow { stroke: #9198a1 } .head { fill: #9198a1 }
    .hot.task, .hot.lock, .hot.arrow { stroke: #ff7b72 } .hot.head, .hot.label { fill: #ff7b72 }
  }
"""


@dataclass(frozen=True, slots=True)
class Box:
    """A thing with a title."""

    id: str
    title: str
    sub: str = ""
    kind: str = "task"
    """`task`, with round corners, or `lock`."""
    hot: bool = False
    """Drawn in red."""


@dataclass(frozen=True, slots=True)
class Arrow:
    """From one box to another."""

    start: str
    end: str
    label: str = ""
    hot: bool = False


@dataclass(slots=True)
class _Place:
    """A box in its layer, or the room of an arrow that passes."""

    box: Box | None
    layer: int
    width: float = 0.0
    height: float = LANE
    x: float = 0.0
    y: float = 0.0
    """Its middle."""
    before: list[_Place] = field(default_factory=list)
    after: list[_Place] = field(default_factory=list)


def svg(boxes: Sequence[Box], arrows: Sequence[Arrow], *, title: str) -> str:
    """The picture. Arrows from or to boxes that are not there are left out."""
    boxes = boxes or (Box("", "nobody waits", "for anybody"),)
    known = {box.id for box in boxes}
    arrows = [one for one in arrows if one.start in known and one.end in known]
    back = _closing(boxes, arrows)
    places, ways, layers = _layers(boxes, arrows, back)
    _order(layers)
    width, height = _arrange(layers)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" font-family="{escape(FONT)}">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{width:.0f}" height="{height:.0f}"/>',
    ]
    starts, ends = _ports(ways)
    drawn = sorted(zip(arrows, ways, starts, ends, strict=True), key=lambda one: one[0].hot)
    for arrow, way, start, end in drawn:
        lines += _arrow(arrow, way, (start, end), backward=arrow in back)
    for place in places:
        lines += _box(place)
    return "\n".join([*lines, "</svg>", ""])


# Layout ------------------------------------------------------------------------------------------------


def _closing(boxes: Sequence[Box], arrows: Sequence[Arrow]) -> set[Arrow]:
    """Arrows that close a circle: without them every arrow can point to the right."""
    after: dict[str, list[Arrow]] = {}
    ends = {arrow.end for arrow in arrows}
    for arrow in arrows:
        after.setdefault(arrow.start, []).append(arrow)
    back: set[Arrow] = set()
    done: set[str] = set()
    for box in sorted(boxes, key=lambda box: box.id in ends):
        path: dict[str, int] = {}
        work: list[tuple[str, list[Arrow]]] = []

        def enter(id: str) -> None:
            path[id] = len(path)  # noqa: B023 - used at once
            work.append((id, list(after.get(id, ()))))  # noqa: B023

        if box.id not in done:
            enter(box.id)
        while work:
            id, left = work[-1]
            if not left:
                work.pop()
                del path[id]
                done.add(id)
                continue
            arrow = left.pop(0)
            if arrow.end in path:
                back.add(arrow)
            elif arrow.end not in done:
                enter(arrow.end)
    return back


def _layers(
    boxes: Sequence[Box], arrows: Sequence[Arrow], back: set[Arrow]
) -> tuple[list[_Place], list[list[_Place]], list[list[_Place]]]:
    """Places of the boxes, the way of each arrow from left to right, and all places by layer."""
    right = [(a.end, a.start) if a in back else (a.start, a.end) for a in arrows]
    layer = {box.id: 0 for box in boxes}
    for _ in boxes:  # the longest way to each box; without circles it settles
        changed = False
        for start, end in right:
            if start != end and layer[end] <= layer[start]:
                layer[end], changed = layer[start] + 1, True
        if not changed:
            break
    place = {box.id: _Place(box, layer[box.id], width=_width(box), height=HEIGHT) for box in boxes}
    layers: list[list[_Place]] = [[] for _ in range(max(layer.values(), default=0) + 1)]
    for one in place.values():
        layers[one.layer].append(one)
    ways = []
    for start, end in right:
        way = [place[start]]
        for n in range(layer[start] + 1, layer[end]):
            passing = _Place(None, n)
            layers[n].append(passing)
            way.append(passing)
        way.append(place[end])
        for left, following in itertools.pairwise(way):
            left.after.append(following)
            following.before.append(left)
        ways.append(way)
    return list(place.values()), ways, layers


def _order(layers: list[list[_Place]]) -> None:
    """Put each place near the middle of its neighbours, there and back some times."""
    for sweep in range(SWEEPS):
        forward = sweep % 2 == 0
        for layer in layers if forward else reversed(layers):
            at = {id(one): n for others in layers for n, one in enumerate(others)}

            def middle(one: _Place) -> float:
                near = one.before if forward else one.after  # noqa: B023 - used at once
                return sum(at[id(other)] for other in near) / len(near) if near else at[id(one)]  # noqa: B023

            layer.sort(key=middle)


def _arrange(layers: list[list[_Place]]) -> tuple[float, float]:
    """Give every place its coordinates; the size of the picture."""
    x = MARGIN
    for layer in layers:
        widest = max((one.width for one in layer), default=0.0)
        y = MARGIN
        for one in layer:
            one.x, one.y = x + widest / 2, y + one.height / 2
            one.width = one.width or widest
            y += one.height + BETWEEN_BOXES
        x += widest + BETWEEN_LAYERS
    for sweep in range(SWEEPS):
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            _settle(layer, before=sweep % 2 == 0)
    top = min((one.y - one.height / 2 for layer in layers for one in layer), default=MARGIN)
    for layer in layers:
        for one in layer:
            one.y += MARGIN - top
    bottom = max((one.y + one.height / 2 for layer in layers for one in layer), default=MARGIN)
    return max(x - BETWEEN_LAYERS + MARGIN, 2 * MARGIN), bottom + MARGIN


def _settle(layer: list[_Place], *, before: bool) -> None:
    """Move places towards the middle of their neighbours, keeping order and distance."""
    wanted = []
    for one in layer:
        near = (one.before if before else one.after) or [one]
        wanted.append(sum(other.y for other in near) / len(near))
    # Where several want the same room they share it around the middle of what they want.
    groups: list[tuple[list[_Place], float]] = []
    for one, y in zip(layer, wanted, strict=True):
        groups.append(([one], y))
        while len(groups) > 1 and _end(groups[-2]) > _begin(groups[-1]):
            (first, a), (second, b) = groups[-2:]
            together = (a * len(first) + b * len(second)) / (len(first) + len(second))
            groups[-2:] = [(first + second, together)]
    for members, middle in groups:
        y = middle - _extent(members) / 2
        for one in members:
            one.y = y + one.height / 2
            y += one.height + BETWEEN_BOXES


def _extent(members: Iterable[_Place]) -> float:
    return sum(one.height + BETWEEN_BOXES for one in members) - BETWEEN_BOXES


def _begin(group: tuple[list[_Place], float]) -> float:
    return group[1] - _extent(group[0]) / 2


def _end(group: tuple[list[_Place], float]) -> float:
    return group[1] + _extent(group[0]) / 2 + BETWEEN_BOXES


def _width(box: Box) -> float:
    letters = max(min(columns_of(box.title), WIDEST), min(columns_of(box.sub), WIDEST) * 0.85)
    return max(72.0, letters * LETTER + 2 * PAD)


def _ports(ways: list[list[_Place]]) -> tuple[list[float], list[float]]:
    """Where on the side of its first and of its last box each arrow meets it, so that none hides another."""
    found: tuple[list[float], list[float]] = ([0.0] * len(ways), [0.0] * len(ways))
    for heights, at, near in ((found[0], 0, 1), (found[1], -1, -2)):
        sides: dict[int, list[int]] = {}
        for n, way in enumerate(ways):
            sides.setdefault(id(way[at]), []).append(n)
        for side in sides.values():
            side.sort(key=lambda n: ways[n][near].y)
            step = min(PORT, (HEIGHT - 12) / len(side))
            for place, n in enumerate(side):
                heights[n] = ways[n][at].y + (place - (len(side) - 1) / 2) * step
    return found


# Drawing -----------------------------------------------------------------------------------------------


def _classes(*names: str, hot: bool) -> str:
    return " ".join((*names, *(("hot",) if hot else ())))


def _box(place: _Place) -> list[str]:
    box = place.box
    if box is None:
        return []
    x, y = place.x - place.width / 2, place.y - place.height / 2
    round_ = 10 if box.kind == "task" else 2
    shown = _classes(box.kind, hot=box.hot)
    title = escape(cut(box.title, WIDEST))
    return [
        f"<g><title>{escape(f'{box.title} {box.id}')}</title>",
        f'<rect class="{shown}" x="{x:.1f}" y="{y:.1f}" width="{place.width:.1f}" height="{place.height:.1f}" '
        f'rx="{round_}"/>',
        f'<text class="title" x="{place.x:.1f}" y="{place.y - 3:.1f}" text-anchor="middle">{title}</text>',
        f'<text class="sub" x="{place.x:.1f}" y="{place.y + 13:.1f}" text-anchor="middle">{escape(box.sub)}</text></g>',
    ]


def _arrow(arrow: Arrow, way: list[_Place], ports: tuple[float, float], *, backward: bool) -> list[str]:
    """A smooth line along its way, with a head at its end and its label near its beginning."""
    points = [(way[0].x + way[0].width / 2, ports[0])]
    for place in way[1:-1]:
        points += [(place.x - place.width / 2, place.y), (place.x + place.width / 2, place.y)]
    points.append((way[-1].x - way[-1].width / 2, ports[1]))
    path = [f"M{points[0][0]:.1f},{points[0][1]:.1f}"]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        bend = (x1 - x0) / 2
        path.append(f"C{x0 + bend:.1f},{y0:.1f} {x1 - bend:.1f},{y1:.1f} {x1:.1f},{y1:.1f}")
    line = f'<path class="{_classes("arrow", hot=arrow.hot)}" d="{" ".join(path)}"/>'
    (x, y), towards = (points[0], -1) if backward else (points[-1], 1)
    head = f"M{x:.1f},{y:.1f} l{-9 * towards},-4.5 l0,9 z"
    x0, y0, x1, y1 = (*points[-2], *points[-1]) if backward else (*points[0], *points[1])
    label = (
        f'<text class="{_classes("label", hot=arrow.hot)}" x="{(x0 + x1) / 2:.1f}" y="{(y0 + y1) / 2 - 5:.1f}" '
        f'text-anchor="middle">{escape(arrow.label)}</text>'
    )
    return [line, f'<path class="{_classes("head", hot=arrow.hot)}" d="{head}"/>', *([label] if arrow.label else [])]
