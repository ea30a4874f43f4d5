"""A sheet of equal panels laid out in pixels: what the figures of maps are drawn on.

`plotly.subplots` spaces panels by fractions of the figure, which can't hold patches square and labels clear of them for
two as for sixty panels; this does, and makes one dictionary instead of thousands of validated updates.
"""

from __future__ import annotations

import base64
import html
import io
import math
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from PIL import Image

from dit_probe.errors import MapError

INK = "#767676"
"""Text: 4.5 to 1 on white and 4.2 to 1 on #111; no grey exceeds 4.3 on both."""

SCALE = "Viridis"
_FAINT = "rgba(127,127,127,0.35)"
_PNG_LIMIT = 40_000


def label(text: str, width: int = 0) -> str:
    """Text as plotly's pseudo-HTML: escaped, and wrapped where a width in characters is given.

    Example:
        >>> label("a < b"), label("a big red boat", 8)
        ('a &lt; b', 'a big<br>red boat')
    """
    lines = textwrap.wrap(text, width, max_lines=2, placeholder="…") if width else text.split("\n")
    return "<br>".join(html.escape(line, quote=False) for line in lines)


def pixels(image: Any) -> np.ndarray:
    """An image as uint8 (y, x, 3).

    Args:
        image: PIL image; array or DataArray (y, x[, 1, 3 or 4]) of uint8, or of floats in 0..1. Further dims of a
            DataArray must have length one.

    Raises:
        MapError: another shape, or another range.

    Example:
        >>> pixels(np.full((2, 4), 0.5)).shape
        (2, 4, 3)
    """
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    if isinstance(image, xr.DataArray):
        image = image.squeeze([dim for dim in image.dims[:-3] if image.sizes[dim] == 1])
    array = np.asarray(image)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise MapError(
            f"an image must be (y, x, 3), found {np.shape(image)}. Select one image, and move channels last "
            "(array.transpose(1, 2, 0))"
        )
    if array.dtype != np.uint8:
        if array.dtype.kind != "f" or not (array.min() >= -1e-3 and array.max() <= 1 + 1e-3):
            found = f"{array.dtype} in {array.min():.3g}..{array.max():.3g}"
            raise MapError(f"an image must be uint8, or floats in 0..1; found {found}. Divide by its largest value")
        array = np.rint(array.clip(0, 1) * 255).astype(np.uint8)
    return np.broadcast_to(array[..., :3], (*array.shape[:2], 3))


def data_uri(picture: np.ndarray, side: int = 512) -> str:
    """A picture for embedding: at most `side` pixels long, lossless while that is small.

    Example:
        >>> data_uri(np.zeros((4, 4, 3), "uint8"))[:22]
        'data:image/png;base64,'
    """
    image = Image.fromarray(np.ascontiguousarray(picture))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    kind, buffer = "png", io.BytesIO()
    image.save(buffer, "png")
    if buffer.tell() > _PNG_LIMIT:
        kind, buffer = "jpeg", io.BytesIO()
        image.save(buffer, "jpeg", quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


class Sheet:
    """Panels in rows and columns, numbered row by row; heat maps, pictures and titles are put into them.

    Args:
        rows: panels down.
        columns: panels across.
        grid: (y, x) patches of the maps.
        side: longer side of a panel in screen pixels.
        shape: (y, x) of the picture, which sets the panels' proportions; None: the grid's.
        gap: (across, down) pixels between panels; None leaves room for a title above each.
        left: leave room for row titles.
        top: lines of the column titles.
        bars: a colour bar below each column, instead of one at the right.
        slider: leave room for a frame slider.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        grid: tuple[int, ...],
        *,
        side: int,
        shape: tuple[int, int] | None = None,
        gap: tuple[int, int] | None = None,
        left: bool = False,
        top: int = 2,
        bars: bool = False,
        slider: bool = False,
    ) -> None:
        high, wide = shape or grid
        self.columns, self.grid, self.shape = columns, grid, (high, wide)
        self.high, self.wide = (max(round(side * size / max(high, wide)), 1) for size in (high, wide))
        self.gap = gap or (14, 42)
        self.margin = {"l": 130 if left else 24, "r": 24 if bars else 96, "t": 40 + 16 * top, "b": 16}
        self.margin["b"] += (54 if bars else 0) + (140 if slider else 0)
        self.across = columns * self.wide + (columns - 1) * self.gap[0]
        self.down = rows * self.high + (rows - 1) * self.gap[1]
        self.traces: list[dict[str, Any]] = []
        self.frames: list[dict[str, Any]] = []
        self.used: set[int] = set()
        self.layout = self.page(
            self.across + self.margin["l"] + self.margin["r"],
            self.down + self.margin["t"] + self.margin["b"],
            self.margin,
        )
        self.annotations: list[dict[str, Any]] = []

    @staticmethod
    def page(width: int, height: int, margin: Mapping[str, int]) -> dict[str, Any]:
        """Layout that every figure shares: sizes, a transparent ground, text readable on light and dark."""
        clear = "rgba(0,0,0,0)"
        return {
            "template": "none",
            "width": width,
            "height": height,
            "margin": dict(margin),
            "paper_bgcolor": clear,
            "plot_bgcolor": clear,
            "font": {"color": INK, "size": 13, "family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif"},
            "hoverlabel": {"bgcolor": "#222222", "bordercolor": "#222222", "font": {"color": "#ffffff", "size": 13}},
            # plotly 7 puts a button on every figure that uploads it; pictures and maps stay where they are.
            "modebar": {"bgcolor": clear, "color": INK, "activecolor": "#21918c", "remove": ["sendChartToCloud"]},
        }

    def _corner(self, panel: int) -> tuple[int, int]:
        """Pixels from the left and from the top of the plotting area to a panel."""
        row, column = divmod(panel, self.columns)
        return column * (self.wide + self.gap[0]), row * (self.high + self.gap[1])

    def _axes(self, panel: int) -> dict[str, str]:
        """Names of a panel's axes, which are made on first use and zoom together."""
        number = "" if panel == 0 else str(panel + 1)
        if panel not in self.used:
            self.used.add(panel)
            x, y = self._corner(panel)
            (rows, columns), hidden = self.grid, {"visible": False, "constrain": "domain"}
            self.layout[f"xaxis{number}"] = hidden | {
                "domain": [x / self.across, (x + self.wide) / self.across],
                "range": [-0.5, columns - 0.5],
                "anchor": f"y{number}",
            }
            self.layout[f"yaxis{number}"] = hidden | {
                "domain": [1 - (y + self.high) / self.down, 1 - y / self.down],
                "range": [rows - 0.5, -0.5],
                "anchor": f"x{number}",
            }
            first = min(self.used)
            if panel == first:
                # A patch is as many picture pixels high as the picture has over the grid: square where the grid is.
                ratio = (self.shape[0] / rows) / (self.shape[1] / columns)
                self.layout[f"yaxis{number}"] |= {"scaleanchor": f"x{number}", "scaleratio": ratio}
            else:  # plotly says on the console that it ignores a ratio of axes that match others
                at = "" if first == 0 else str(first + 1)
                self.layout[f"xaxis{number}"]["matches"] = f"x{at}"
                self.layout[f"yaxis{number}"]["matches"] = f"y{at}"
        return {"xaxis": f"x{number}", "yaxis": f"y{number}"}

    def picture(self, source: str, panel: int) -> None:
        """Put a picture into a panel, over its whole grid."""
        rows, columns = self.grid
        # The image trace counts the pixels of the embedded (perhaps smaller) picture itself.
        with Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))) as image:
            wide, high = image.size
        dx, dy = columns / wide, rows / high
        place = {"x0": dx / 2 - 0.5, "dx": dx, "y0": dy / 2 - 0.5, "dy": dy}
        smooth = "fast" if wide > self.wide else False
        trace = {"type": "image", "source": source, "hoverinfo": "skip", "zsmooth": smooth}
        self.traces.append(trace | place | self._axes(panel))

    def heat(
        self, values: np.ndarray, panel: int, *, hover: Mapping[str, str], opacity: float = 1, scale: int = 1
    ) -> None:
        """Put a map into a panel."""
        lines = [f"{name} {label(text)}" for name, text in hover.items()] + ["y %{y}, x %{x}", "<b>%{z:.4g}</b>"]
        trace = {
            "type": "heatmap",
            "z": values,
            "opacity": opacity,
            "coloraxis": f"coloraxis{'' if scale == 1 else scale}",
            "hovertemplate": "<br>".join(lines) + "<extra></extra>",
            "hoverongaps": False,
        }
        self.traces.append(trace | self._axes(panel))

    def title(self, text: str, panel: int, *, wrap: bool = True) -> None:
        """Write above a panel."""
        x, y = self._corner(panel)
        words = label(text, max(self.wide // 8, 6)) if wrap else label(text)
        self._write(words, x + self.wide / 2, y, xanchor="center", yanchor="bottom", yshift=2)

    def row_title(self, text: str, row: int) -> None:
        """Write left of a row."""
        _, y = self._corner(row * self.columns)
        self._write(label(text, 15), 0, y + self.high / 2, xanchor="right", yanchor="middle", xshift=-10, align="right")

    def corner(self, text: str) -> None:
        """Write left of the column titles, what they are."""
        self._write(f"<i>{label(text)}</i>", 0, 0, xanchor="right", yanchor="bottom", xshift=-10, yshift=2)

    def _write(self, text: str, x: float, y: float, **where: Any) -> None:
        place = {"xref": "paper", "yref": "paper", "x": x / self.across, "y": 1 - y / self.down}
        self.annotations.append({"text": text, "showarrow": False, **place, **where})

    def color_axis(self, values: np.ndarray, scale: int, title: str, column: int | None = None) -> None:
        """A colour scale over all values, with its bar at the right, or below a column."""
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        bar: dict[str, Any] = {"thickness": 12, "outlinewidth": 0, "tickfont": {"size": 11}, "nticks": 5}
        if column is None:
            length = min(self.down, 320)
            bar |= {"x": 1, "xpad": 14, "ypad": 0, "y": 1, "yanchor": "top", "len": length, "lenmode": "pixels"}
            bar["title"] = {"text": label(title), "side": "right", "font": {"size": 11}}
        else:
            center = (self._corner(column)[0] + self.wide / 2) / self.across
            bar |= {
                "orientation": "h",
                "x": center,
                "xanchor": "center",
                "xpad": 0,
                "y": 0,
                "yanchor": "top",
                "ypad": 10,
            }
            # Room for the ends' labels, which must not run into those of the next column.
            bar |= {"len": self.wide - 30, "lenmode": "pixels"}
            digits = max(0, 1 - math.floor(math.log10(high - low))) if high > low else 2
            bar |= {"tickvals": [low, high], "ticktext": [f"{low:.{digits}f}", f"{high:.{digits}f}"]}
            bar["title"] = {"text": label(title), "side": "bottom", "font": {"size": 11}}
        name = f"coloraxis{'' if scale == 1 else scale}"
        self.layout[name] = {"colorscale": SCALE, "cmin": low, "cmax": high, "colorbar": bar}

    def own_scales(self, values: np.ndarray | None = None) -> None:
        """Give each heat map the range of its own values, or of its row of `values`, and show no bar."""
        heats = [trace for trace in self.traces if trace["type"] == "heatmap"]
        for index, trace in enumerate(heats):
            over = trace["z"] if values is None else values[index]
            trace.pop("coloraxis", None)
            # A map of nothing but NaN draws nothing; any range will do.
            low, high = (np.nanmin(over), np.nanmax(over)) if np.isfinite(over).any() else (0, 1)
            trace |= {"colorscale": SCALE, "showscale": False, "zmin": float(low), "zmax": float(high)}
        self.layout["margin"]["r"] = 24
        self.layout["width"] = self.across + self.margin["l"] + 24

    def frame(self, name: str, draw: Callable[[int], None], number: int) -> None:
        """Add one frame of an animation: what `draw(number)` puts on the sheet; the first is what shows at first."""
        shown, self.traces = self.traces, []
        draw(number)
        self.frames.append({"name": name, "data": self.traces, "traces": list(range(len(self.traces)))})
        self.traces = shown or self.traces

    def figure(self) -> go.Figure:
        """The finished figure."""
        layout = self.layout | {"annotations": self.annotations}
        if self.frames:
            layout |= self._controls()
        return go.Figure({"data": self.traces, "layout": layout, "frames": self.frames})

    def _controls(self) -> dict[str, Any]:
        """A play button, a pause button and a slider below the panels."""
        at_once = {"mode": "immediate", "transition": {"duration": 0}}
        show = at_once | {"frame": {"duration": 0, "redraw": True}}
        play = at_once | {"frame": {"duration": 120, "redraw": True}, "fromcurrent": True}
        steps = [
            {"label": frame["name"], "method": "animate", "args": [[frame["name"]], show]} for frame in self.frames
        ]
        button = {"method": "animate"}
        return {
            "sliders": [
                {
                    "steps": steps,
                    "x": 0, "xanchor": "left", "len": 1, "y": 0, "yanchor": "top", "pad": {"t": 58, "b": 0},
                    "currentvalue": {"prefix": "frame ", "xanchor": "right", "font": {"size": 13}},
                    "bgcolor": _FAINT, "activebgcolor": "#21918c", "bordercolor": INK, "borderwidth": 1,
                    "tickcolor": INK, "font": {"size": 11}, "minorticklen": 0,
                }
            ],
            "updatemenus": [
                {
                    "type": "buttons", "direction": "right", "showactive": False,
                    "x": 0, "xanchor": "left", "y": 0, "yanchor": "top", "pad": {"t": 14},
                    "bgcolor": "rgba(0,0,0,0)", "bordercolor": INK, "font": {"size": 12},
                    "buttons": [
                        button | {"label": "▶ play", "args": [None, play]},
                        button | {"label": "❚❚ pause", "args": [[None], show]},
                    ],
                }
            ],
        }  # fmt: skip
