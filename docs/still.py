"""Draws a figure of this package as SVG: what readers without JavaScript see, and everybody before it has loaded.

No browser is needed, and no other library. What `dit_probe.figures` uses is drawn: pictures, heat maps, lines, bands,
error bars on linear, logarithmic or category axes, annotations, colour bars and one legend. An animation is its first
frame.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from PIL import Image
from plotly.colors import get_colorscale, hex_to_rgb

SIZE = 13
"""Of text, where a figure says nothing."""


@dataclass
class Axis:
    """One axis of a figure on the page."""

    start: float
    end: float
    low: float
    high: float
    names: list[str] | None
    layout: Any

    def __call__(self, value: Any) -> float:
        """The place of a value in pixels."""
        at = self.names.index(str(value)) if self.names is not None else float(value)
        at = float(np.log10(at)) if self.layout.type == "log" else at
        return self.start + (at - self.low) / (self.high - self.low) * (self.end - self.start)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Places and texts."""
        if self.layout.tickvals is not None:
            texts = self.layout.ticktext or self.layout.tickvals
            return [(self(value), str(text)) for value, text in zip(self.layout.tickvals, texts, strict=True)]
        if self.names is not None:
            every = max(1, round(26 * len(self.names) / abs(self.end - self.start)))
            return [(self(name), name.replace("\n", " ")) for name in self.names[::every]]
        low, high = sorted((self.low, self.high))
        if self.layout.type == "log":
            powers = nice(np.ceil(low), np.floor(high), 4)
            return [(self(10**power), f"1e{power:g}") for power in powers if power == round(power)]
        percent = "%" in (self.layout.tickformat or "")
        return [(self(at), f"{at:.0%}" if percent else f"{at:.10g}") for at in nice(low, high, self.layout.nticks or 5)]


def nice(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    rough = (high - low) / max(count, 1)
    unit = 10 ** np.floor(np.log10(rough))
    step = unit * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * 0.999)
    first = np.ceil(low / step - 1e-9)
    return [float(np.round(k * step, 10)) + 0.0 for k in np.arange(first, np.floor(high / step + 1e-9) + 1)]


class Still:
    """The SVG of one figure, put together part by part."""

    def __init__(self, figure: go.Figure) -> None:
        self.figure: Any = figure
        self.layout: Any = figure.layout
        margin = self.layout.margin
        self.width, self.height = self.layout.width or 700, self.layout.height or 450
        self.left, self.top = margin.l or 0, margin.t or 0
        self.across = self.width - self.left - (margin.r or 0)
        self.down = self.height - self.top - (margin.b or 0)
        if self.layout.sliders:  # nothing to slide here
            self.height = self.top + self.down + 16
        self.ink = self.layout.font.color or "#767676"
        self.parts: list[str] = []
        self.axes: dict[str, Axis] = {}

    def svg(self) -> str:
        """The whole picture."""
        for name in dict.fromkeys(n for t in self.figure.data for n in (t.xaxis or "x", t.yaxis or "y")):
            self.axes[name] = self._axis(name)
        for trace in self.figure.data:
            place = self.axes[trace.xaxis or "x"], self.axes[trace.yaxis or "y"]
            getattr(self, f"_draw_{trace.type}")(trace, *place)
        for name, axis in self.axes.items():
            if axis.layout.visible is not False:
                self._ticks(name, axis)
        for note in self.layout.annotations:
            x, y = self.left + note.x * self.across, self.top + (1 - note.y) * self.down
            self.text(
                note.text, x + (note.xshift or 0), y - (note.yshift or 0), note.xanchor, note.yanchor, note.font.size
            )
        self._bars()
        self._legend()
        font = (self.layout.font.family or "sans-serif").replace('"', "'")
        head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width:g}" height="{self.height:g}" '
        head += (
            f'viewBox="0 0 {self.width:g} {self.height:g}" font-family="{font}" font-size="{SIZE}" fill="{self.ink}">'
        )
        return "\n".join([head, *self.parts, "</svg>"])

    def text(
        self,
        text: str,
        x: float,
        y: float,
        across: str | None,
        down: str | None,
        size: float | None = None,
        turn: int = 0,
    ) -> None:
        """Plotly's pseudo-HTML, a line each."""
        size = size or SIZE
        lines = [re.sub(r"<[^>]+>", "", line) for line in re.split(r"<br\s*/?>|\n", text)]
        up = {"bottom": len(lines) - 1, "middle": (len(lines) - 1) / 2}.get(down or "middle", 0)
        base = {"bottom": -0.3, "top": 0.9}.get(down or "middle", 0.35) * size
        anchor = {"left": "start", "right": "end"}.get(across or "center", "middle")
        rotate = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
        spans = "".join(
            f'<tspan x="{x:.1f}" y="{y + base + (k - up) * 1.3 * size:.1f}">{html.escape(html.unescape(line))}</tspan>'
            for k, line in enumerate(lines)
        )
        self.parts.append(f'<text font-size="{size:g}" text-anchor="{anchor}"{rotate}>{spans}</text>')

    def line(
        self, x: Sequence[float], y: Sequence[float], colour: str, width: float = 2, dash: str | None = None
    ) -> None:
        """A line through points."""
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        dashes = {"dash": "6 4", "dot": "2 3", "dashdot": "6 3 2 3"}.get(dash or "")
        style = f' stroke-dasharray="{dashes}"' if dashes else ""
        self.parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width:g}"{style}/>'
        )

    def picture(
        self, source: str, x: Sequence[float], y: Sequence[float], opacity: float = 1, smooth: bool = False
    ) -> None:
        """An embedded picture between two corners."""
        (left, right), (top, bottom) = sorted(x), sorted(y)
        box = f'x="{left:.2f}" y="{top:.2f}" width="{right - left:.2f}" height="{bottom - top:.2f}"'
        style = "" if smooth else ' style="image-rendering:pixelated"'
        self.parts.append(f'<image {box} preserveAspectRatio="none" opacity="{opacity:g}"{style} href="{source}"/>')

    def _axis(self, name: str) -> Axis:
        layout = self.layout[f"{name[0]}axis{name[1:]}"]
        start, end = layout.domain or (0, 1)
        horizontal = name[0] == "x"
        place = (self.left + start * self.across, self.left + end * self.across)
        if not horizontal:
            place = (self.top + (1 - start) * self.down, self.top + (1 - end) * self.down)
        traces = [t for t in self.figure.data if (t[f"{name[0]}axis"] or name[0]) == name and t.type != "image"]
        values = [value for t in traces if t[name[0]] is not None for value in t[name[0]]]
        named = layout.type == "category" or any(isinstance(value, str) for value in values)
        names = list(dict.fromkeys(map(str, values))) if named else None
        if layout.range is not None:
            low, high = layout.range
        elif names is not None:
            low, high = -0.5, len(names) - 0.5
        else:
            errors = [t[f"error_{name[0]}"] for t in traces if t.type == "scatter"]
            spread = [array for error in errors for array in (error.array, error.arrayminus) if array is not None]
            more = max((max(array) for array in spread), default=0)
            numbers = [float(np.log10(v) if layout.type == "log" else v) for v in values]
            pad = 0.05 * (max(numbers) - min(numbers)) or 1
            low, high = min(numbers) - more - pad, max(numbers) + more + pad
        if layout.autorange == "reversed":
            low, high = high, low
        return Axis(*place, low, high, names, layout)

    def _draw_image(self, trace: Any, x: Axis, y: Axis) -> None:
        with Image.open(io.BytesIO(base64.b64decode(trace.source.split(",", 1)[1]))) as image:
            wide, high = image.size
        ends = [(start - step / 2, start - step / 2 + step * n) for start, step, n in
                ((trace.x0, trace.dx, wide), (trace.y0, trace.dy, high))]  # fmt: skip
        self.picture(trace.source, [x(v) for v in ends[0]], [y(v) for v in ends[1]], smooth=bool(trace.zsmooth))

    def _draw_heatmap(self, trace: Any, x: Axis, y: Axis) -> None:
        axis = self.layout[trace.coloraxis] if trace.coloraxis else None
        z = np.asarray(trace.z, dtype=float)
        low, high = (axis.cmin, axis.cmax) if axis else (trace.zmin, trace.zmax)
        low, high = (np.nanmin(z) if low is None else low), (np.nanmax(z) if high is None else high)
        share = np.clip((z - low) / ((high - low) or 1), 0, 1)
        table = colours(axis.colorscale if axis else trace.colorscale)
        pixels = np.zeros((*z.shape, 4), "uint8")
        pixels[..., :3] = table[np.rint(np.nan_to_num(share) * 255).astype(int)]
        pixels[..., 3] = np.where(np.isnan(z), 0, 255)
        edges = [(-0.5, n - 0.5) for n in z.shape[::-1]]
        flat = [Axis(a.start, a.end, a.low, a.high, None, a.layout) for a in (x, y)]
        corners = [[axis(v) for v in edge] for axis, edge in zip(flat, edges, strict=True)]
        self.picture(png(pixels), *corners, opacity=1 if trace.opacity is None else trace.opacity)
        if axis is None and trace.showscale is not False:
            self._bar(trace.colorbar, table, low, high)

    def _draw_scatter(self, trace: Any, x: Axis, y: Axis) -> None:
        at = [x(v) for v in trace.x], [y(v) for v in trace.y]
        if trace.fill == "toself":
            points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(*at, strict=True))
            self.parts.append(f'<polygon points="{points}" fill="{trace.fillcolor}"/>')
            return
        mode, colour = trace.mode or "lines", trace.line.color or trace.marker.color or self.ink
        if "lines" in mode:
            self.line(*at, colour, trace.line.width or 2, trace.line.dash)
        self._errors(trace, x, y, colour)
        if "markers" in mode:
            radius = (trace.marker.size or 6) / 2
            colour = trace.marker.color or colour
            dots = (
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{radius:g}" fill="{colour}"/>' for a, b in zip(*at, strict=True)
            )
            self.parts += dots

    def _errors(self, trace: Any, x: Axis, y: Axis, colour: str) -> None:
        for dim in ("x", "y"):
            error = trace[f"error_{dim}"]
            if error.array is None:
                continue
            minus = error.array if error.arrayminus is None else error.arrayminus
            for a, b, more, less in zip(trace.x, trace.y, error.array, minus, strict=True):
                wide, high = ([a - less, a + more], [b, b]) if dim == "x" else ([a, a], [b - less, b + more])
                self.line([x(v) for v in wide], [y(v) for v in high], error.color or colour, error.thickness or 2)

    def _ticks(self, name: str, axis: Axis) -> None:
        horizontal, layout = name[0] == "x", axis.layout
        other = self.axes[layout.anchor or ("y" if horizontal else "x")]
        zero = max(other.start, other.end) if horizontal else min(other.start, other.end)
        for at, label in axis.ticks:
            if layout.gridcolor and layout.showgrid is not False:
                ends = ([at, at], [other.start, other.end]) if horizontal else ([other.start, other.end], [at, at])
                self.parts.insert(0, "")
                self.line(*ends, layout.gridcolor, 1)
                self.parts[0] = self.parts.pop()
            place = (at, zero + 8, "center", "top") if horizontal else (zero - 8, at, "right", "middle")
            self.text(label, *place, layout.tickfont.size)
        if layout.title.text:
            middle = (axis.start + axis.end) / 2
            size = layout.title.font.size
            if horizontal:
                self.text(layout.title.text, middle, zero + 28, "center", "top", size)
            else:
                wide = max((len(label) for _, label in axis.ticks), default=0) * 0.55 * SIZE
                self.text(layout.title.text, zero - 20 - wide, middle, "center", "middle", size, turn=-90)

    def _bars(self) -> None:
        for name in self.layout:
            axis = self.layout[name] if name.startswith("coloraxis") else None
            if axis is not None and axis.cmin is not None and axis.showscale is not False:
                self._bar(axis.colorbar, colours(axis.colorscale), axis.cmin, axis.cmax)

    def _bar(self, bar: Any, table: np.ndarray, low: float, high: float) -> None:
        long, thick = bar.len or 1, bar.thickness or 12
        flat = bar.orientation == "h"
        long = long if bar.lenmode == "pixels" else long * (self.across if flat else self.down)
        left = self.left + (1 if bar.x is None else bar.x) * self.across + (bar.xpad or 0)
        top = self.top + (1 - (1 if bar.y is None else bar.y)) * self.down + (bar.ypad or 0)
        values = list(bar.tickvals or nice(low, high, bar.nticks or 5))
        texts = list(bar.ticktext or (f"{value:g}" for value in values))
        share = [(value - low) / ((high - low) or 1) for value in values]
        size = bar.tickfont.size or 11
        if flat:
            left -= long / 2
            self.picture(png(table[None]), (left, left + long), (top, top + thick), smooth=True)
            for at, text in zip(share, texts, strict=True):
                self.text(text, left + at * long, top + thick + 4, "center", "top", size)
            self.text(bar.title.text or "", left + long / 2, top + thick + 18, "center", "top", bar.title.font.size)
            return
        top -= long if bar.yanchor == "bottom" else 0
        self.picture(png(table[::-1, None]), (left, left + thick), (top, top + long), smooth=True)
        for at, text in zip(share, texts, strict=True):
            self.text(text, left + thick + 4, top + (1 - at) * long, "left", "middle", size)
        wide = max(map(len, texts)) * 0.6 * size
        place = left + thick + wide + 18, top + long / 2
        self.text(bar.title.text or "", *place, "center", "middle", bar.title.font.size, turn=90)

    def _legend(self) -> None:
        shown = [t for t in self.figure.data if t.type == "scatter" and t.name and t.showlegend is not False]
        if len(shown) < 2:
            return
        above = self.layout.legend.orientation == "h"
        x, y = (self.left, self.top - 18) if above else (self.left + self.across + 12, self.top + 10)
        for trace in shown:
            colour = trace.line.color or trace.marker.color or self.ink
            if "lines" in (trace.mode or "lines"):
                self.line([x, x + 22], [y, y], colour, 2, trace.line.dash)
            if "markers" in (trace.mode or ""):
                self.parts.append(f'<circle cx="{x + 11:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
            self.text(trace.name, x + 28, y, "left", "middle")
            x, y = (x + 50 + 0.6 * SIZE * len(trace.name), y) if above else (x, y + 20)


def colours(scale: Any) -> np.ndarray:
    """256 colours of a scale, (256, 3) uint8."""
    points = [(at, hex_to_rgb(colour)) for at, colour in scale or get_colorscale("Viridis")]
    at, found = np.array([p for p, _ in points]), np.array([c for _, c in points])
    return np.stack([np.rint(np.interp(np.linspace(0, 1, 256), at, found[:, k])) for k in range(3)], 1).astype("uint8")


def png(pixels: np.ndarray) -> str:
    """Pixels for embedding."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def svg(figure: go.Figure) -> str:
    """A figure as SVG.

    Raises:
        AttributeError: a kind of trace that `dit_probe.figures` does not use.
    """
    return Still(figure).svg()
