"""Writes the page of commands from the commands themselves when the site is built."""

from __future__ import annotations

import inspect
from typing import Any, Literal, get_args, get_origin, get_type_hints

LISTED = "<!-- Every command is described here when the site is built. -->"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put all commands into the page that has the mark."""
    return markdown.replace(LISTED, commands()) if LISTED in markdown else markdown


def commands() -> str:
    """A section for every command: what it does, an example, its arguments and options."""
    from dit_probe.cli import app
    from dit_probe.cli.shared import EXAMPLES

    lines: list[str] = []
    for registered in app.registered_commands:
        function: Any = registered.callback
        name = function.__name__.replace("_", "-")
        hints = get_type_hints(function, include_extras=True)
        parameters = inspect.signature(function).parameters.values()
        lines += [f"## {name}", "", inspect.getdoc(function) or "", "", "```sh", EXAMPLES[name], "```", ""]
        lines += ["| option | default | what it does |", "| --- | --- | --- |"]
        lines += [row(parameter, *get_args(hints[parameter.name])) for parameter in parameters] + [""]
    return "\n".join(lines)


def row(parameter: inspect.Parameter, kind: Any, information: Any) -> str:
    """One argument or option of a command as a row of a table."""
    option = "Option" in type(information).__name__
    flags = ", ".join(information.param_decls or ()) or f"--{parameter.name.replace('_', '-')}"
    flags = flags if option else information.metavar or parameter.name.upper()
    value = parameter.default
    default = "" if value is None or value is False or value == "" else f"`{value}`"
    words = [choice for part in (kind, *get_args(kind)) if get_origin(part) is Literal for choice in get_args(part)]
    choices = f" One of {', '.join(f'`{word}`' for word in words)}." if words else ""
    text = (information.help or "").replace("|", "\\|")
    return f"| `{flags}` | {'**needed**' if value is parameter.empty else default} | {text}{choices} |"
