"""`coserve …`: one file a command group, imported only when it is called, so that `--help` answers at once."""

from __future__ import annotations

import importlib

import click

_COMMANDS = {
    "serve": "Serve a model: generation and finetuning in one process.",
    "demo": "Show co-serving on a real 270M model, then end.",
    "chat": "Talk with a model of a running server.",
    "finetune": "Train an adapter on a data file.",
    "jobs": "List, show, follow, pause, resume and cancel finetuning jobs.",
    "models": "List the models that can be asked.",
    "adapters": "List, upload, download and delete adapters.",
    "keys": "Create, list and delete API keys (admin).",
}


class _Lazy(click.Group):
    """Imports `coserve.server.cli.<name>` for the command `<name>`; its click object is called `command`."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"coserve.server.cli.{name}").command
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.command(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="coserve", prog_name="coserve")
def main() -> None:
    """One multi-tenant server that generates text and finetunes LoRA adapters in the same iterations.

    Commands other than serve and demo talk to a running server: set COSERVE_BASE_URL and COSERVE_API_KEY
    (or OPENAI_BASE_URL and OPENAI_API_KEY).
    """
