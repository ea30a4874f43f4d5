"""What the commands share: the application, its errors, common options."""

from __future__ import annotations

import json
import math
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from dit_probe.errors import ConceptError, DitProbeError

DEMO_MODEL = "flux-picturebook"

EXAMPLES = {
    "demo": "dit-probe demo --model sd35-picturebook --out demo.html",
    "trace": 'dit-probe trace MODEL --prompt "a fox in the snow" --concepts fox,snow,sky --store run.zarr',
    "encode": 'dit-probe encode MODEL photo.jpg --prompt "a fox in the snow" --concepts fox,snow,sky --store run.zarr',
    "trace-dataset": "dit-probe trace-dataset MODEL --prompts prompts.txt --concepts fox,snow,sky --store run.zarr",
    "maps": "dit-probe maps run.zarr --space cross --layers 10-18 --out maps.html",
    "info": "dit-probe info run.zarr --check",
    "plan": "dit-probe plan MODEL --concepts fox,snow,sky --height 1024 --width 1024 --steps 28",
    "verify": "dit-probe verify MODEL --height 256 --width 256",
    "models": "dit-probe models --json",
    "probes": "dit-probe probes",
    "evaluate": "dit-probe evaluate numbers.zarr --model MODEL --data VOCdevkit --subset single_class --plan",
    "reproduce": "dit-probe reproduce table1 --model MODEL --data VOCdevkit --out reproduction",
    "explore": "dit-probe explore run.zarr other.zarr --mask fox=fox.png",
    "report": "dit-probe report run.zarr --out report.html",
}
"""One call of every command, shown below its help."""

STATUS = (
    "Ends with 0 when all is well, 1 when a check fails or samples failed, 2 when a call or its surroundings are wrong "
    "(one message on stderr says what), and 130 when it was interrupted. Results are on stdout; progress, on stderr, "
    "only on a terminal."
)


class Commands(TyperGroup):
    """Prints a warning in a line and an error of ours as one message, ending with 2; a bug keeps its traceback."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command, with its example."""
        command = super().get_command(ctx, cmd_name)
        if command is not None and cmd_name in EXAMPLES:
            command.epilog = f"Example: {EXAMPLES[cmd_name]}"
        return command

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except DitProbeError as error:
            Console(stderr=True).print(
                f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False, soft_wrap=True
            )
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A microscope for multi-modal diffusion transformers.",
    epilog=STATUS,
)


def complete_model(incomplete: str) -> list[str]:
    """Demo models and saved pipelines that begin like this, for the shell's completion."""
    from dit_probe import demo

    saved = [str(path.parent) for path in Path().glob(f"{incomplete}*/model_index.json")] if incomplete else []
    return [name for name in demo.names() if name.startswith(incomplete)] + saved


Store = Annotated[str, typer.Argument(help="Directory or URL of a store.")]
NewStore = Annotated[str, typer.Option("--store", help="Directory or URL of the store.")]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A saved pipeline directory, a hub id or a demo model.", autocompletion=complete_model
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Device = Annotated[str | None, typer.Option(help="Torch device; the accelerator if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="Torch dtype; bfloat16 on an accelerator, else float32.")]
Offload = Annotated[bool, typer.Option("--offload", help="Move submodels to the device one at a time.")]


def print_json(found: Any) -> None:
    """Facts for a script; numbers of numpy's become Python's, and undefined ones null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(name): plain(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        value = value.item() if hasattr(value, "item") else value
        return None if isinstance(value, float) and not math.isfinite(value) else value

    typer.echo(json.dumps(plain(found), indent=2, allow_nan=False))


def console() -> Console:
    """The terminal, or a pipe that is wide enough for a table."""
    return Console() if sys.stdout.isatty() else Console(width=200)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    Console(stderr=True).print(
        f"{category.__name__}: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True
    )


def split_words(text: str) -> list[str]:
    """``sun,boat`` as ["sun", "boat"]."""
    found = [word.strip() for word in text.split(",")]
    if not all(found):
        raise ConceptError(f"{text!r} names an empty concept. Separate the words by single commas: sun,boat,water")
    return found


def split_numbers(text: str | None, option: str) -> list[int] | None:
    """``3,5-7`` as [3, 5, 6, 7]."""
    if text is None:
        return None
    try:
        parts = [part.split("-") for part in text.split(",")]
        return [number for part in parts for number in range(int(part[0]), int(part[-1]) + 1)]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not like 3,5 or 10-18", param_hint=option) from None
