"""`coserve jobs …`: finetuning jobs of the key's tenant."""

from __future__ import annotations

import sys
from typing import Any

import click

from coserve.server.cli.output import show_fields, show_json, show_table, when
from coserve.server.cli.remote import Remote, path_part

_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_JOB = click.argument("job_id", metavar="JOB")


@click.group("jobs")
def command() -> None:
    """List, show, follow, pause, resume and cancel finetuning jobs."""


@command.command("list")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="At most so many.")
@_JSON
def list_jobs(limit: int, as_json: bool) -> None:
    """Finetuning jobs, newest first."""
    jobs = Remote().pages("/fine_tuning/jobs", limit)
    if as_json:
        show_json(jobs)
        return
    rows = [(j["id"], j["status"], _steps(j), when(j["created_at"]), j["fine_tuned_model"]) for j in jobs]
    show_table(("id", "status", "steps", "created", "model"), rows, "no jobs: create one with `coserve finetune FILE`")


@command.command("show")
@_JOB
@_JSON
def show(job_id: str, as_json: bool) -> None:
    """One job: status, progress, loss, result, error."""
    _show(Remote().get(f"/fine_tuning/jobs/{path_part(job_id)}"), as_json)


@command.command("follow")
@_JOB
def follow(job_id: str) -> None:
    """Stay until the job ends; Ctrl-C only leaves it. Exit code 0: it succeeded."""
    from coserve.server.cli.follow import follow as follow_job

    sys.exit(follow_job(Remote(), job_id))


@command.command("events")
@_JOB
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="At most so many.")
@_JSON
def events(job_id: str, limit: int, as_json: bool) -> None:
    """What happened, newest first."""
    found = Remote().pages(f"/fine_tuning/jobs/{path_part(job_id)}/events", limit)
    if as_json:
        show_json(found)
        return
    rows = [(when(e["created_at"]), e["level"], e["message"]) for e in found]
    show_table(("time", "level", "message"), rows, "no events yet")


@command.command("checkpoints")
@_JOB
@_JSON
def checkpoints(job_id: str, as_json: bool) -> None:
    """The kept checkpoints: each is a model to ask."""
    found = Remote().pages(f"/fine_tuning/jobs/{path_part(job_id)}/checkpoints")
    if as_json:
        show_json(found)
        return
    rows = [(c["step_number"], c["fine_tuned_model_checkpoint"], when(c["created_at"])) for c in found]
    show_table(("step", "model", "created"), rows, "no checkpoints yet")


def _action(name: str, text: str) -> None:
    @command.command(name, help=text)
    @_JOB
    @_JSON
    def act(job_id: str, as_json: bool) -> None:
        job = Remote().post(f"/fine_tuning/jobs/{path_part(job_id)}/{name}")
        if as_json:
            show_json(job)
            return
        click.echo(f"{job['id']}: {job['status']}")


_action("cancel", "End a job; what it trained so far stays as its checkpoints.")
_action("pause", "Stop a job at its next unit of work and keep its place.")
_action("resume", "Go on with a paused job.")


def _show(job: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show_json(job)
        return
    progress = job.get("progress") or {}
    error = job.get("error") or {}
    show_fields(
        [
            ("id", job["id"]),
            ("status", job["status"]),
            ("reason", progress.get("reason")),
            ("queue position", progress.get("queue_position")),
            ("base model", job["model"]),
            ("finetuned model", job["fine_tuned_model"]),
            ("steps", _steps(job)),
            ("loss", None if progress.get("loss") is None else f"{progress['loss']:.4f}"),
            ("tokens/s", progress.get("tokens_per_second") or progress.get("expected_tokens_per_second")),
            ("expected end", when(job.get("estimated_finish"))),
            ("trained tokens", job.get("trained_tokens")),
            ("training file", job["training_file"]),
            ("validation file", job.get("validation_file")),
            ("result files", " ".join(job.get("result_files") or [])),
            ("created", when(job["created_at"])),
            ("finished", when(job.get("finished_at"))),
            ("error", ": ".join(filter(None, (error.get("code"), error.get("message"))))),
        ]
    )


def _steps(job: dict[str, Any]) -> str:
    progress = job.get("progress") or {}
    return f"{progress.get('step') or 0}/{progress['total_steps']}" if progress.get("total_steps") else ""
