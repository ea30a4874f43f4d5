"""The explorer: a Dash application on one trace, or on two beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_probe.errors import DitProbeError
from dit_probe.explore import choices, drawing
from dit_probe.explore.source import Source

try:
    from dash import ClientsideFunction, Dash, Input, Output, State, ctx, no_update
except ImportError as error:
    raise DitProbeError('the explorer needs Dash, which is an extra: pip install "dit-probe[explore]"') from error

from dit_probe.explore import controls, parts

_PAGE = """<!doctype html>
<html lang="en"><head>{%metas%}<title>{%title%}</title>{%favicon%}{%css%}</head>
<body>{%app_entry%}<footer>{%config%}{%scripts%}{%renderer%}</footer></body></html>
"""


def app(trace: Any, other: Any = None, *, masks: Mapping[str, Any] | None = None) -> Dash:
    """Make the explorer of a trace, or of two.

    Reads what is chosen and nothing else, so that a store of any size opens at once.

    Args:
        trace: what `dit_probe.open` returns, or where the store is, which the Python lines of the page then name. A
            variable ``mask`` is outlined and measured.
        other: another one to put beside it.
        masks: of the first trace, as in `with_masks`.

    Returns:
        The application; in a notebook ``app(ds).run()`` shows it. `serve` serves it elsewhere.

    Raises:
        MapError: no sample, nothing recorded that a map can be made of, or masks that do not fit.
        StoreError: as `dit_probe.open`.

    Example:
        >>> import numpy as np, xarray as xr
        >>> dims = ("sample", "step", "layer", "concept", "image_token")
        >>> ds = xr.Dataset({"score_output": (dims, np.random.rand(1, 2, 3, 2, 4))},
        ...     coords={"patch_y": ("image_token", [0, 0, 1, 1]), "patch_x": ("image_token", [0, 1, 0, 1])})
        >>> app(ds).title
        'dit-probe explorer'
    """
    source = Source(trace, masks)
    second = None if other is None else Source(other)
    if second is not None and second.name == source.name:
        source.name, second.name = source.path or f"{source.name} (1)", second.path or f"{second.name} (2)"
    found = Dash(
        "dit_probe.explore",
        title="dit-probe explorer",
        update_title="",
        assets_folder=str(Path(__file__).parent / "assets"),
        assets_ignore=r"page\..*",
        index_string=_PAGE,
        meta_tags=[{"name": "viewport", "content": "width=device-width, initial-scale=1"}],
    )
    found.layout = controls.layout(source, second)
    _connect(found, source, second)
    return found


def _connect(found: Dash, source: Source, other: Source | None) -> None:
    """Everything that happens on the page."""
    outputs = {
        f"{run}-{part}": Output(f"{run}-{part}", name)
        for run in controls.RUNS
        for part, name in parts.PROPERTIES.items()
    }
    outputs |= {"second-hidden": Output("second", "hidden"), "compared-hidden": Output("compared", "hidden")}
    outputs |= {"note": Output("note", "children"), "failed": Output("note", "className")}
    outputs |= {"code": Output("code", "children")}

    @found.callback(
        output=outputs,
        inputs={
            "chosen": {name: Input(name, "value") for name in choices.CONTROLS},
            "row": Input("row", "value"),
            "column": Input("column", "value"),
            "width": Input("width", "data"),
        },
        prevent_initial_call=True,
    )
    def draw(chosen: choices.Chosen, row: int | None, column: int | None, width: float | None) -> dict[str, Any]:
        answer = dict.fromkeys(outputs, no_update)
        if width is None:  # the browser has not said yet
            return answer
        alone = chosen["compare"] == "none"
        try:
            runs = choices.runs(chosen, source, other)
            for run, (one, view) in runs.items():
                patch = choices.place(row, column, source.grid, one.grid)
                drawn = parts.run(one, view, chosen, patch, width)
                answer |= {f"{run}-{part}": value for part, value in drawn.items()}
            note, failed = drawing.summary(source, choices.at(runs["first"][1], chosen)), ""
            answer |= {"code": parts.lines(runs, chosen, width), "second-hidden": alone}
        except DitProbeError as error:
            note, failed = str(error), "failed"
        return answer | {"note": note, "failed": failed, "compared-hidden": alone}

    @found.callback(
        Output("layer", "value"),
        Output("step", "value"),
        Output("layers-words", "children"),
        Output("steps-words", "children"),
        Input("layers", "value"),
        Input("steps", "value"),
        Input("first-course", "clickData"),
        Input("second-course", "clickData"),
    )
    def choose_cell(layers: list[int], steps: list[int], first: Any, second: Any) -> Any:
        words = parts.between(layers, source.layers), parts.between(steps, source.steps)
        click = {"first-course": first, "second-course": second}.get(str(ctx.triggered_id))
        if click is None:  # a range was moved, and is what is shown again
            return None, None, *words
        point = click["points"][0]
        return int(point["x"]), int(point["y"]), *words

    @found.callback(
        Output("row", "value"),
        Output("column", "value"),
        Input("first-maps", "clickData"),
        Input("second-maps", "clickData"),
        State("compare", "value"),
        prevent_initial_call=True,
    )
    def choose_patch(first: Any, second: Any, compare: str) -> Any:
        on_second = ctx.triggered_id == "second-maps"
        point = (second if on_second else first)["points"][0]
        grid = other.grid if on_second and compare == "second" and other else source.grid
        return choices.place(round(point["y"]), round(point["x"]), grid, source.grid) or (no_update, no_update)

    @found.callback(Output("concepts", "options"), Output("prompt", "children"), Input("sample", "value"))
    def choose_sample(sample: int | None) -> Any:
        if sample is None or not 0 <= sample < source.ds.sizes["sample"]:
            return no_update, ""
        return controls.named(source.names(sample)), source.prompt(sample)

    @found.callback(
        Output("download", "data"),
        inputs={
            "_pages": Input("save-page", "n_clicks"),
            "_tables": Input("save-table", "n_clicks"),
            "chosen": {name: State(name, "value") for name in choices.CONTROLS},
            "width": State("width", "data"),
        },
        prevent_initial_call=True,
    )
    def save(_pages: Any, _tables: Any, chosen: choices.Chosen, width: float | None) -> Any:
        try:
            runs = choices.runs(chosen, source, other)
            if ctx.triggered_id == "save-table":
                return {"content": parts.table(runs, chosen), "filename": "maps.csv", "type": "text/csv"}
            return {"content": parts.page(runs, chosen, width), "filename": "maps.html", "type": "text/html"}
        except DitProbeError:  # the page says it already
            return no_update

    @found.callback(
        Output("clock", "disabled"), Output("play", "children"), Input("play", "n_clicks"), prevent_initial_call=True
    )
    def play(clicks: int) -> Any:
        return (False, "Pause") if clicks % 2 else (True, "Play")

    @found.callback(
        Output("frame", "value"), Input("clock", "n_intervals"), State("frame", "value"), prevent_initial_call=True
    )
    def next_frame(_ticks: int, frame: int) -> int:
        return (frame + 1) % source.grid[0]

    found.clientside_callback(ClientsideFunction("explorer", "start"), Output("width", "data"), Input("main", "id"))
