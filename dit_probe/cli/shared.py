"""What the commands share: the application, its errors, common options."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from dit_probe.errors import ConceptError, DitProbeError

DEMO_MODEL = "flux-picturebook"


class Commands(TyperGroup):
    """Prints a warning in a line and an error of ours as one message, ending with 2; a bug keeps its traceback."""

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
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A microscope for multi-modal diffusion transformers.",
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A saved pipeline directory, a hub id or a demo model.")]
Device = Annotated[str | None, typer.Option(help="Torch device; the accelerator if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="Torch dtype; bfloat16 on an accelerator, else float32.")]
Offload = Annotated[bool, typer.Option("--offload", help="Move submodels to the device one at a time.")]


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
