"""The explorer's page: what can be chosen at the left, the figures of one or two runs beside it."""

from __future__ import annotations

from typing import Any

from dash import dcc, html

from dit_probe.explore.source import LABELS, Source

RUNS = ("first", "second")
GRAPH: Any = {"displaylogo": False, "toImageButtonOptions": {"format": "png", "scale": 2}}
SOFTMAX = {"each": "in every layer and step, eq. (8)", "after": "of the mean", "none": "none: scores"}


def layout(source: Source, other: Source | None) -> Any:
    """Everything on the page; what does not apply to the traces is hidden, so that every callback finds its control."""
    return html.Div(
        [
            dcc.Store(id="width"),
            dcc.Interval(id="clock", interval=500, disabled=True),
            dcc.Download(id="download"),
            html.Header(
                [
                    html.H1("dit-probe explorer"),
                    html.P(_about(source, other), className="quiet"),
                    html.Button("Dark or light", id="theme", className="plain", title="Switch between dark and light"),
                ]
            ),
            html.Div(
                [
                    html.Aside(
                        html.Details([html.Summary("Choose"), *_controls(source, other)], open=True, id="choose"),
                        **_named("What is shown"),
                    ),
                    html.Main(
                        [
                            html.P(id="note", role="status", **_aria("live", "polite")),
                            html.Div([_run(run) for run in RUNS], id="runs"),
                            _export(),
                        ],
                        id="main",
                    ),
                ],
                id="columns",
            ),
        ],
        id="page",
    )


def named(names: list[str]) -> list[dict[str, Any]]:
    """Concepts as options of a checklist: shown by name, known by position."""
    return [{"label": name, "value": index} for index, name in enumerate(names)]


def _controls(source: Source, other: Source | None) -> list[Any]:
    view = source.first()
    frames, rows, columns = source.grid
    count = source.ds.sizes["sample"]
    return [
        _field(
            "Sample",
            [_number("sample", 0, count - 1, 0, "Position"), html.P(id="prompt", className="quiet")],
            hidden=count == 1,
        ),
        _field("Concepts", dcc.Checklist(named(source.names(0)), list(view.concepts), id="concepts")),
        _field("Space", dcc.RadioItems(_spaces(source), view.space, id="space")),
        _field("Softmax over concepts", dcc.RadioItems(SOFTMAX, view.softmax or "none", id="softmax")),
        _field("Layers", _range("layers", source.layers, view.layers)),
        _field("Denoising steps", _range("steps", source.steps, view.steps)),
        _field(
            "One layer, one step",
            [
                html.Div(
                    [
                        _number("layer", source.layers[0], source.layers[-1], None, "Layer"),
                        _number("step", source.steps[0], source.steps[-1], None, "Step"),
                    ],
                    className="pair",
                ),
                html.P("Or click on a cell of the lower figure. Empty: the mean of the above.", className="quiet"),
            ],
        ),
        _field(
            "Heads",
            [
                dcc.Checklist([str(head) for head in range(source.heads)], [], id="heads", className="numbers"),
                html.P("None chosen: all of them.", className="quiet"),
            ],
            hidden=not source.heads,
        ),
        _field("Branch", dcc.RadioItems(source.branches, view.branch, id="branch"), hidden=not source.branches),
        _field(
            "Frame",
            [
                dcc.Slider(0, max(frames - 1, 1), 1, value=0, id="frame", marks=None, updatemode="drag"),
                html.Button("Play", id="play", className="plain"),
            ],
            hidden=frames == 1,
        ),
        _field(
            "Patch",
            [
                html.Div(
                    [
                        _number("row", 0, rows - 1, None, "Row"),
                        _number("column", 0, columns - 1, None, "Column"),
                    ],
                    className="pair",
                ),
                html.P("Or click on the image or a map.", className="quiet"),
            ],
        ),
        _field(
            "Drawing",
            dcc.Checklist(
                {
                    "shared": "one colour scale for all concepts",
                    **({"outline": "outline of the masks"} if "mask" in source.ds else {}),
                },
                ["shared", "outline"] if "mask" in source.ds else ["shared"],
                id="drawing",
            ),
        ),
        _field("Compare with", _compare(source, other)),
    ]


def _compare(source: Source, other: Source | None) -> list[Any]:
    choices = {"none": "nothing", "first": "this run"} | ({"second": other.name} if other else {})
    most = max(source.ds.sizes["sample"], other.ds.sizes["sample"] if other else 1)
    return [
        dcc.RadioItems(choices, "second" if other else "none", id="compare"),
        html.Div(
            [
                _number("second-sample", 0, most - 1, 0, "Its sample"),
                html.P("Its space", className="quiet"),
                dcc.RadioItems({"same": "the same"} | _spaces(source, other), "same", id="second-space"),
            ],
            id="compared",
            hidden=other is None,
        ),
    ]


def _run(run: str) -> Any:
    """The part of the page that shows one run; the second one is hidden until there is something to compare."""
    return html.Section(
        [
            html.H2(id=f"{run}-title"),
            _figure(f"{run}-maps", f"Maps of the {run} run"),
            html.P(id=f"{run}-words", className="unseen"),
            html.Div(
                id=f"{run}-numbers", className="scrolled", tabIndex="0", role="region", **_named(f"Numbers, {run} run")
            ),
            html.H3(id=f"{run}-where"),
            _figure(f"{run}-course", f"One patch of the {run} run"),
        ],
        id=run,
        hidden=run == "second",
        **_aria("labelledby", f"{run}-title"),
    )


def _export() -> Any:
    return html.Section(
        [
            html.H2("Take it with you"),
            html.P("The camera above each figure saves it as PNG.", className="quiet"),
            html.Div(
                [
                    html.Button("Figures as HTML", id="save-page"),
                    html.Button("Maps as CSV", id="save-table"),
                    html.Button("Copy the Python lines", id="copy"),
                ],
                className="buttons",
            ),
            html.Pre(id="code", tabIndex="0", role="region", **_named("Python lines that draw these figures")),
        ]
    )


def _about(source: Source, other: Source | None) -> str:
    identity, count = source.ds.attrs.get("identity", {}), source.ds.sizes["sample"]
    facts = [source.name, str(identity.get("model", "")), f"{count} sample{'s' if count > 1 else ''}"]
    if other:
        facts.append(f"beside {other.name}")
    return " · ".join(fact for fact in dict.fromkeys(facts) if fact)


def _field(title: str, children: Any, *, hidden: bool = False) -> Any:
    return html.Fieldset([html.Legend(title), *(children if isinstance(children, list) else [children])], hidden=hidden)


def _number(name: str, low: int, high: int, value: int | None, title: str) -> Any:
    box = dcc.Input(id=name, type="number", min=low, max=high, step=1, value=value, debounce=0.25)
    return html.Div([html.Label(f"{title} ({low} to {high})", htmlFor=name), box], className="number")


def _range(name: str, labels: tuple[int, ...], chosen: tuple[int, ...]) -> list[Any]:
    low, high = labels[0], max(labels[-1], labels[0] + 1)
    slider = dcc.RangeSlider(low, high, 1, value=[chosen[0], chosen[-1]], id=name, marks=None, updatemode="drag")
    return [slider, html.P(id=f"{name}-words", className="quiet")]


def _spaces(*sources: Source | None) -> dict[str, str]:
    return {name: text for name, text in LABELS.items() if any(source and name in source.spaces for source in sources)}


def _named(name: str) -> Any:
    return _aria("label", name)


def _aria(attribute: str, value: str) -> Any:
    return {f"aria-{attribute}": value}


def _figure(name: str, title: str) -> Any:
    graph = dcc.Graph(id=name, config=GRAPH)
    return html.Div(graph, className="figure", role="group", **_named(title))
