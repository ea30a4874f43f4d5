"""Commands that show a saved trace: explore, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dit_probe.cli.shared import Store, app, split_numbers
from dit_probe.schema import human

Masks = Annotated[
    list[str] | None,
    typer.Option("--mask", metavar="CONCEPT=FILE", help="A picture, not black where the concept is; repeatable."),
]


@app.command()
def explore(
    store: Store,
    other: Annotated[str | None, typer.Argument(help="Another one to put beside it.")] = None,
    mask: Masks = None,
    host: Annotated[str, typer.Option(help="Address to listen on; any but this machine's own asks for a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8050,
    token: Annotated[str | None, typer.Option(help="What a browser must know; made and printed if needed.")] = None,
) -> None:
    """Serve a page to look at a saved trace, alone or beside another one, until interrupted."""
    from dit_probe.explore import serve

    serve(store, other, masks=_masks(mask), host=host, port=port, token=token, announce=_announce)


@app.command()
def report(
    store: Store,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    size: Annotated[int, typer.Option(min=1, help="Patches along a map; larger maps are averaged.")] = 32,
    samples: Annotated[str | None, typer.Option(help="Which, as 0,3 or 0-7; the first four if not given.")] = None,
    mask: Masks = None,
) -> None:
    """Write one self-contained page with the maps of a saved trace, to look at without this package."""
    from dit_probe.explore import page

    text = page(store, size=size, samples=split_numbers(samples, "--samples"), masks=_masks(mask))
    out.write_text(text, encoding="utf-8")
    typer.echo(f"page   {out.resolve()}  {human(out.stat().st_size)}")


def _announce(address: str) -> None:
    typer.echo(f"explorer  {address}\nCtrl+C ends it.")


def _masks(named: list[str] | None) -> dict[str, Any]:
    """Masks by concept, from pictures."""
    import numpy as np
    from PIL import Image

    found = {}
    for one in named or ():
        name, _, path = one.rpartition("=")
        if not name or not Path(path).is_file():
            raise typer.BadParameter(f"{one!r}: give CONCEPT=FILE, a picture that is there", param_hint="--mask")
        with Image.open(path) as picture:
            found[name] = np.asarray(picture.convert("L")) > 0
    return found
