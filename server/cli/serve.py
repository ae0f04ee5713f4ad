"""`coserve serve`: options into settings, settings into the supervisor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from coserve.server.cli.numbers import FINITE


@click.command("serve")
@click.option("--model", metavar="PATH_OR_ID", help="Folder of a transformers decoder, or a hub id.")
@click.option("--host", help="Address to listen on. [127.0.0.1]")
@click.option("--port", type=int, help="Port to listen on; 0 takes a free one. [8000]")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Jobs, adapters, keys and files. [coserve-data]")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), help="Of weights and K/V. [auto]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="[auto]")
@click.option("--max-model-len", type=int, metavar="N", help="Longest context, in tokens. [the model's]")
@click.option("--kv-memory", metavar="BYTES", help="For keys and values, as 512MiB or 4GB. [1GiB on a CPU]")
@click.option("--adapter-memory", metavar="BYTES", help="For adapters on the device. [256MiB on a CPU]")
@click.option("--activation-memory", metavar="BYTES", help="For what training stores. [2GiB on a CPU]")
@click.option("--adapter-cache-memory", metavar="BYTES", help="For adapters beside the device. [512MiB on a CPU]")
@click.option("--slo-ttft-ms", type=FINITE, metavar="N", help="Promise for the first token. [auto]")
@click.option("--slo-itl-ms", type=FINITE, metavar="N", help="Promise between two tokens. [auto]")
@click.option("--train-window", type=int, metavar="N", help="Most tokens of a training window. [auto]")
@click.option("--activations", type=click.Choice(["auto", "save", "recompute"]), help="Kept for the backward. [auto]")
@click.option("--threads", type=int, metavar="N", help="CPU threads of the engine. [all cores]")
@click.option("--served-model-name", metavar="NAME", help="The base model's id. [last part of --model]")
@click.option("--max-running", type=int, metavar="N", help="Sequences that run at once. [64 on a CPU]")
@click.option("--grace-seconds", type=FINITE, metavar="N", help="How long a shutdown may take. [30]")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="[info]")
@click.option("--config", type=click.Path(path_type=Path), help="TOML file of settings; options here win over it.")
def command(config: Path | None, **options: Any) -> None:
    """Serve MODEL until a signal; then drain, save the jobs and exit with 0.

    Every option can stand in the environment (--max-model-len as COSERVE_MAX_MODEL_LEN) or in the --config file.
    Exit codes: 0 drained, 1 it
    had to be killed or did not start, 2 usage, 3 model refused, 4 data directory locked, 5 port taken.
    """
    from coserve.server.config import SettingsError, resolve_settings
    from coserve.server.supervisor import serve

    try:
        settings = resolve_settings(options, config_file=config)
    except SettingsError as error:
        raise click.UsageError(str(error)) from None
    sys.exit(serve(settings))
