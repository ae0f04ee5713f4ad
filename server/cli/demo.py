"""`coserve demo`: hands over to the show."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command("demo")
@click.option("--model", metavar="PATH_OR_ID", help="Any other model. [the 270M model that pip installs]")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where the model and the jobs go.")
def command(model: str | None, data_dir: Path | None) -> None:
    """Show co-serving: streams that keep flowing while an adapter is trained, then asked. Ends by itself."""
    from coserve.server.demo.show import main

    sys.exit(main(model=model, data_dir=data_dir))
