"""``dit-probe …``: the main jobs from a shell. Heavy libraries are imported by the command that needs them."""

from dit_probe.cli import dataset_tracing as dataset_tracing
from dit_probe.cli import encoding as encoding
from dit_probe.cli import evaluation as evaluation
from dit_probe.cli import exploring as exploring
from dit_probe.cli import tracing as tracing
from dit_probe.cli.shared import app as app


def main() -> None:
    """Entry point of the command ``dit-probe``."""
    app()
