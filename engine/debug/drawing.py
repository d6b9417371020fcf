"""The graph behind a tensor, as DOT text (Graphviz) and as SVG drawn here."""

from __future__ import annotations

from html import escape
from typing import Any

from engine.autograd import Node, edge_of
from engine.tensor import Tensor

WIDTH, HEIGHT, GAP_X, GAP_Y = 168, 40, 24, 44  # of a box and between boxes, in SVG units


class Drawing:
    """A graph to look at: `.dot` is Graphviz source, `.svg` a picture; a notebook shows the picture by itself."""

    def __init__(self, nodes: list[tuple[str, bool]], edges: list[tuple[int, int, str]], layers: list[int]):
        self._nodes, self._edges, self._layers = nodes, edges, layers

    @property
    def dot(self) -> str:
        lines = ["digraph {", "  rankdir=BT; node [fontname=sans];"]
        for i, (label, leaf) in enumerate(self._nodes):
            shape = "box, style=rounded" if leaf else "box"
            lines.append(f'  n{i} [label="{label}", shape={shape}];')
        lines += [f'  n{a} -> n{b} [label="{text}"];' for a, b, text in self._edges]
        return "\n".join([*lines, "}"])

    @property
    def svg(self) -> str:
        place: dict[int, tuple[int, int]] = {}
        filled: dict[int, int] = {}
        for i, layer in enumerate(self._layers):
            column = filled.get(layer, 0)
            filled[layer] = column + 1
            place[i] = (GAP_X + column * (WIDTH + GAP_X), GAP_Y // 2 + layer * (HEIGHT + GAP_Y))
        width = GAP_X + max(filled.values()) * (WIDTH + GAP_X)
        height = GAP_Y + (max(self._layers) + 1) * (HEIGHT + GAP_Y)
        parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
                 'font-family="sans-serif" font-size="12" text-anchor="middle">',
                 '<rect width="100%" height="100%" fill="white"/>']
        for a, b, text in self._edges:  # from an input (lower layer on the page) up to what uses it
            (x1, y1), (x2, y2) = place[a], place[b]
            x1, x2, y2 = x1 + WIDTH // 2, x2 + WIDTH // 2, y2 + HEIGHT
            parts.append(f'<path d="M{x1} {y1} C{x1} {y1 - 24} {x2} {y2 + 24} {x2} {y2}" fill="none" stroke="#888"/>')
            parts.append(f'<text x="{(x1 + x2) // 2}" y="{(y1 + y2) // 2 + 4}" fill="#555" font-size="10">'
                         f'{escape(text)}</text>')
        for i, (label, leaf) in enumerate(self._nodes):
            x, y = place[i]
            fill, radius = ("#e8f0fe", 18) if leaf else ("#f6f6f6", 4)
            parts.append(f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="{radius}" fill="{fill}" '
                         'stroke="#444"/>')
            parts.append(f'<text x="{x + WIDTH // 2}" y="{y + HEIGHT // 2 + 4}">{escape(label)}</text>')
        return "\n".join([*parts, "</svg>"])

    def _repr_svg_(self) -> str:
        return self.svg


def draw(tensor: Tensor, limit: int = 500) -> Drawing:
    """The graph behind `tensor`: a box for each op and each leaf, shapes on the arrows, inputs below what uses them.

    Raises RuntimeError when there is no graph, and ValueError when it has more than `limit` boxes.
    """
    root = edge_of(tensor)
    if root is None:
        raise RuntimeError("draw: this tensor has no graph behind it; is requires_grad set on what it was made from?")
    index: dict[int, int] = {id(root): 0}
    found: list[Any] = [root]
    edges: list[tuple[int, int, str]] = []
    for place, edge in enumerate(found):  # grows while it is walked
        if not isinstance(edge, Node):
            continue
        for source, shape in zip(edge.edges, edge.shapes):
            if source is None:
                continue
            if id(source) not in index:
                index[id(source)] = len(found)
                found.append(source)
                if len(found) > limit:
                    raise ValueError(f"draw: the graph has more than {limit} boxes; pass a larger limit")
            edges.append((index[id(source)], place, "×".join(map(str, shape)) or "scalar"))
    layers = [0] * len(found)
    for i in sorted(range(len(found)), key=lambda i: -getattr(found[i], "order", -1)):  # users before what they use
        for a, b, _ in edges:
            if b == i:
                layers[a] = max(layers[a], layers[i] + 1)
    return Drawing([_label(edge) for edge in found], edges, layers)


def _label(edge: Any) -> tuple[str, bool]:
    if isinstance(edge, Node):
        return edge.op.name, False
    return f"leaf {'×'.join(map(str, edge.shape)) or 'scalar'} {edge.dtype}", True
