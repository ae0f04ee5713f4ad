"""`coserve finetune FILE`: uploads the data, creates the job and, when asked, follows it."""

from __future__ import annotations

import contextlib
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coserve.server.cli.numbers import FINITE

if TYPE_CHECKING:
    from coserve.server.cli.remote import Remote

_FILE = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)

# option name -> (object of the request body, field)
_FIELDS = {
    "rank": ("adapter", "r"),
    "alpha": ("adapter", "alpha"),
    "dropout": ("adapter", "dropout"),
    "init": ("adapter", "init"),
    "learning_rate": ("training", "learning_rate"),
    "scheduler": ("training", "lr_scheduler"),
    "warmup_steps": ("training", "warmup_steps"),
    "weight_decay": ("training", "weight_decay"),
    "accumulation": ("training", "gradient_accumulation_steps"),
    "max_steps": ("training", "max_steps"),
    "max_length": ("training", "max_length"),
    "loss_on": ("training", "loss_on"),
    "eval_every": ("training", "eval_every"),
    "checkpoint_every": ("training", "checkpoint_every"),
    "publish_every": ("training", "publish_every"),
    "shuffle": ("training", "shuffle"),
    "priority": ("training", "priority"),
}


@click.command("finetune")
@click.argument("file", type=_FILE)
@click.option("--follow/--no-follow", default=False, help="Stay and show the progress until the job ends.")
@click.option("--validation", type=_FILE, help="Held-out rows; their loss is reported too.")
@click.option("--model", help="Base model. [the server's]")
@click.option("--suffix", help="Goes into the finetuned model's id.")
@click.option("--epochs", type=int, metavar="N", help="[3]")
@click.option("--batch-size", type=int, metavar="N", help="[8]")
@click.option("--accumulation", type=int, metavar="N", help="Batches a step. [1]")
@click.option("--learning-rate", "--lr", type=FINITE, metavar="X", help="[2e-4]")
@click.option("--scheduler", type=click.Choice(["cosine", "linear", "constant"]), help="Of the learning rate. [cosine]")
@click.option("--warmup-steps", type=int, metavar="N", help="Steps in which the learning rate rises. [0]")
@click.option("--weight-decay", type=FINITE, metavar="X", help="Of AdamW. [0]")
@click.option("--max-steps", type=int, metavar="N", help="End after so many steps.")
@click.option("--max-length", type=int, metavar="N", help="Cut longer rows instead of refusing the file.")
@click.option("--rank", type=int, metavar="R", help="Of the LoRA adapter. [16]")
@click.option("--alpha", type=FINITE, metavar="X", help="Of the LoRA adapter. [32]")
@click.option("--dropout", type=FINITE, metavar="X", help="Of the LoRA adapter. [0]")
@click.option("--target", "targets", multiple=True, metavar="MODULE", help="Module to adapt; repeat. [all linear]")
@click.option("--init", metavar="adapter:ID", help="Start from an adapter of yours.")
@click.option("--loss-on", type=click.Choice(["assistant", "completion", "all"]), help="Tokens that bear loss.")
@click.option("--eval-every", type=int, metavar="N", help="Steps between validations.")
@click.option("--checkpoint-every", type=int, metavar="N", help="Steps between checkpoints.")
@click.option("--publish-every", type=int, metavar="N", help="Steps between versions served while it trains.")
@click.option("--shuffle/--no-shuffle", default=None, help="Order of the rows. [shuffled]")
@click.option("--priority", type=click.Choice(["normal", "low"]), help="low gives way to others. [normal]")
@click.option("--seed", type=int, metavar="N", help="Of the adapter's first weights and the order. [drawn]")
@click.option("--json", "as_json", is_flag=True, help="Print the created job as JSON.")
def command(
    file: Path,
    follow: bool,
    validation: Path | None,
    model: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Train an adapter on FILE (JSON lines: messages, prompt/completion, text or token ids).

    The adapter is served by the same server under the id that is printed at the end. With --follow the exit code is 0
    if the job succeeded; Ctrl-C only leaves it.
    """
    from coserve.server.cli.output import show_json
    from coserve.server.cli.remote import Remote

    if follow and as_json:
        raise click.UsageError("--json prints the created job and nothing else: leave out --follow")
    remote = Remote()
    body = job_request(model or remote.default_model(), options)
    job = _create(remote, body, {"training_file": file, "validation_file": validation})
    if as_json:
        show_json(job)
    else:
        click.echo(f"created {job['id']}")
    if follow:
        from coserve.server.cli.follow import follow as follow_job

        sys.exit(follow_job(remote, job["id"]))
    if not as_json:
        click.echo(f"follow it with: coserve jobs follow {job['id']}", err=True)


def job_request(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """The body of the job's creation: only what was asked for, so that the server's defaults stand."""
    body: dict[str, Any] = {"model": model}
    for name in ("suffix", "seed"):
        if options.get(name) is not None:
            body[name] = options[name]
    hyperparameters = {
        field: options[name]
        for name, field in (("epochs", "n_epochs"), ("batch_size", "batch_size"))
        if options.get(name) is not None
    }
    if hyperparameters:
        body["method"] = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    for name, (group, field) in _FIELDS.items():
        if options.get(name) is not None:
            body.setdefault(group, {})[field] = options[name]
    if options.get("targets"):
        body.setdefault("adapter", {})["target_modules"] = list(options["targets"])
    return body


def _create(remote: Remote, body: dict[str, Any], files: Mapping[str, Path | None]) -> dict[str, Any]:
    """Uploads the files and creates the job; a job that is refused leaves no file behind."""
    from coserve.server.cli.remote import RemoteError, path_part

    uploaded = {name: _upload(remote, path) for name, path in files.items() if path is not None}
    try:
        return remote.post("/fine_tuning/jobs", body | uploaded, headers={"idempotency-key": str(uuid.uuid4())})
    except RemoteError as error:
        if error.refused:
            for file_id in uploaded.values():
                with contextlib.suppress(RemoteError):
                    remote.delete(f"/files/{path_part(file_id)}")
        raise


def _upload(remote: Remote, path: Path) -> str:
    with path.open("rb") as file:
        return str(remote.upload("/files", {"purpose": "fine-tune"}, path.name, file)["id"])
