"""`coserve models`: what a key may ask."""

from __future__ import annotations

import click

from coserve.server.cli.output import show_json, show_table, when
from coserve.server.cli.remote import Remote


@click.command("models")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """List the models that can be asked: the base model first, then adapters and finetuned models."""
    models = Remote().get("/models")["data"]
    if as_json:
        show_json(models)
        return
    rows = [(m["id"], m.get("parent"), m.get("max_model_len"), when(m["created"])) for m in models]
    show_table(("id", "base", "context", "created"), rows, "no models yet: the server may still be loading")
