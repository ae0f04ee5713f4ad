"""The show: one server, a tenant that streams, a tenant that trains, and the adapter answering at the end.

Starts the server, runs the story, checks every claim that it makes, stops the server and says what to type next.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from coserve.server.demo import evaluation, finetuning, tenants
from coserve.server.demo.base_model import BaseModelError, licence_lines, prepare_base_model
from coserve.server.demo.client import CallFailed, Client
from coserve.server.demo.meter import between, percentile
from coserve.server.demo.orders import HELD_OUT_FILE, TRAINING_FILE, read_orders
from coserve.server.demo.progress import progress_bar
from coserve.server.demo.proof import IterationRecords
from coserve.server.demo.report import next_steps, print_answers, print_claims, print_speed
from coserve.server.demo.server_process import Running, ServerFailed, ServerProcess
from coserve.server.demo.streams import Streams
from coserve.server.demo.table import LiveTable
from coserve.server.demo.verdict import Measured, judge
from coserve.server.demo.watch import Watch

DEFAULT_DATA_DIR = Path("coserve-data")
CPU_PROMISE_MS = 300


@dataclass(frozen=True, slots=True)
class Plan:
    """What the show does. `model` None is the model that pip installs; only that one must learn the task."""

    model: str | None = None
    data_dir: Path = DEFAULT_DATA_DIR
    streams: int = 3
    steps: int = 36
    held_out: int = 40
    alone_seconds: float = 12.0  # streams without the job, for comparison
    made_by_make: bool = False  # then `make serve` starts the same server
    server_options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a show that ran to its end."""

    measured: Measured
    key: str  # the shop's: the adapter is its own
    adapter: str


def main(model: str | None = None, data_dir: Path | None = None, *, plan: Plan | None = None) -> int:
    """Run the show; 0 if everything it shows held, 1 if something did not, 130 if it was interrupted."""
    console = Console()
    plan = plan or Plan(
        model=model, data_dir=data_dir or default_data_dir(model), made_by_make="COSERVE_MAKE" in os.environ
    )
    try:
        return asyncio.run(_run(plan, console))
    except KeyboardInterrupt:
        console.print("Interrupted; the server is stopped.")
        return 130
    except (BaseModelError, ServerFailed, CallFailed) as error:
        console.print(f"The show did not come to its end: {error}", markup=False, highlight=False, soft_wrap=True)
        return 1


def default_data_dir(model: str | None) -> Path:
    """A data directory belongs to one base model, so each has its own."""
    if model is None:
        return DEFAULT_DATA_DIR
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model.rstrip("/").rsplit("/", 1)[-1])
    return DEFAULT_DATA_DIR.with_name(f"{DEFAULT_DATA_DIR.name}-{name}")


def server_options(plan: Plan) -> tuple[str, ...]:
    """The plan's options; for the known model on a CPU with a promise between tokens that keeps the show short.

    On two cores the default (twice a decode step, about 125 ms) trains 43 tokens/s beside three streams, 250 ms
    trains 82 and 500 ms 93, while the streams slow down from 10 to 6 to 3 tokens/s each.
    """
    if plan.model is None and not Path("/dev/nvidiactl").exists():
        return ("--slo-itl-ms", str(CPU_PROMISE_MS), *plan.server_options)
    return plan.server_options


def serve_command(plan: Plan, folder: str) -> str:
    """What starts the same server again."""
    if plan.made_by_make:
        return "make serve" if plan.model is None else f"make serve MODEL={shlex.quote(plan.model)}"
    return f"coserve serve --model {shlex.quote(folder)} --data-dir {shlex.quote(str(plan.data_dir))}"


async def _run(plan: Plan, console: Console) -> int:
    started = time.monotonic()
    with _stopped_by_signals():
        folder = await _model_folder(plan, console)
        console.print(f"Starting the server (model {folder}, data directory {plan.data_dir}) …", soft_wrap=True)
        server = ServerProcess(folder, plan.data_dir, options=server_options(plan))
        try:
            async with server as running:
                console.print(f"Ready at {running.url} after {time.monotonic() - started:.0f} s.")
                outcome = await _story(plan, running, console)
        except CallFailed as error:
            raise CallFailed("\n  ".join([f"{error}. The server's last words:", *server.last_lines])) from error
    claims = judge(outcome.measured, must_learn=plan.model is None)
    print_claims(console, claims)
    if server.exit_code != 0:
        console.print(f"✗ the server ended with exit code {server.exit_code}:", *server.last_lines, sep="\n  ")
    minutes, seconds = divmod(int(time.monotonic() - started), 60)
    held = all(claim.held for claim in claims) and server.exit_code == 0
    console.print(f"\n{'All of it held' if held else 'NOT all of it held'}, in {minutes} min {seconds} s.")
    next_steps(console, serve_command(plan, folder), outcome.adapter, outcome.key)
    return 0 if held else 1


async def _model_folder(plan: Plan, console: Console) -> str:
    if plan.model is not None:
        return plan.model
    with progress_bar("Preparing Gemma 3 270M (once)") as progress:
        folder = await asyncio.to_thread(prepare_base_model, plan.data_dir, progress)
    console.print(*licence_lines(folder), sep="\n", style="dim", highlight=False, soft_wrap=True)
    return str(folder)


async def _story(plan: Plan, running: Running, console: Console) -> Outcome:
    async with contextlib.AsyncExitStack() as stack:
        admin = await stack.enter_async_context(Client(running.url, running.admin_key))
        keys = {name: await tenants.make_key(admin, name) for name in (tenants.READERS, tenants.SHOP)}
        readers = await stack.enter_async_context(Client(running.url, keys[tenants.READERS]))
        shop = await stack.enter_async_context(Client(running.url, keys[tenants.SHOP]))
        await tenants.cancel_leftovers(shop)

        held_out = read_orders(HELD_OUT_FILE)[: plan.held_out]
        console.print(f"\n1. The base model answers {len(held_out)} held-out orders, before anything is trained …")
        base_before = await evaluation.base_answers(shop, running.model)
        before = await evaluation.ask(shop, running.model, held_out)
        console.print(f"   exactly right: {before.exact} of {len(held_out)}")

        streams = Streams(readers, running.model, plan.streams)
        records = IterationRecords()
        table = stack.enter_context(LiveTable(console))
        watch = await stack.enter_async_context(Watch(admin, streams, table, records))
        stack.push_async_callback(streams.stop)

        console.print(f"2. Tenant A ({tenants.READERS}) opens {plan.streams} streams, alone at first …")
        watch.stage = "tenant A alone"
        alone_from, alone_sample = time.monotonic(), await watch.sample()
        streams.start()
        await asyncio.sleep(plan.alone_seconds)
        alone_rates = between(alone_sample, await watch.sample())

        console.print(f"3. Tenant B ({tenants.SHOP}) trains an adapter on {TRAINING_FILE.name}, beside the streams …")
        watch.stage = "tenant A streams, tenant B trains"
        train_from, train_from_wall = time.monotonic(), time.time()
        train_sample, pieces = await watch.sample(), streams.gaps.pieces
        job_id = await finetuning.create_job(shop, running.model, TRAINING_FILE, plan.steps)

        def on_progress(progress: finetuning.Progress) -> None:
            watch.check()
            watch.progress = progress

        job = await finetuning.follow(shop, job_id, on_progress)
        await watch.read_records(2000)
        train_to, train_to_wall = time.monotonic(), time.time()
        train_rates = between(train_sample, await watch.sample())
        pieces = streams.gaps.pieces - pieces
        if job["status"] != "succeeded":
            raise CallFailed(f"the job {job_id} {job['status']}: {(job.get('error') or {}).get('message')}")
        adapter = str(job["fine_tuned_model"])
        console.print(f"   {adapter} is there after {train_to - train_from:.0f} s, and served at once")

        console.print("4. The adapter answers the same orders: no restart, and the streams go on …")
        watch.stage = "tenant A streams, tenant B asks its adapter"
        after = await evaluation.ask(shop, adapter, held_out)
        console.print(f"   exactly right: {after.exact} of {len(held_out)}")
        longest = max([0.0, streams.seconds_since_last_piece(time.monotonic()), *streams.gaps.since(alone_from)[-1:]])
        await streams.stop()
        base_after = await evaluation.base_answers(shop, running.model)
        await watch.read_records(2000)

    print_answers(console, before, after)
    shared = records.summary(train_from_wall, train_to_wall)
    gaps_alone, gaps_training = streams.gaps.since(alone_from, train_from), streams.gaps.since(train_from, train_to)
    print_speed(
        console,
        [
            ("streams alone", alone_rates, percentile(gaps_alone, 0.5), percentile(gaps_alone, 0.99)),
            ("with the job", train_rates, percentile(gaps_training, 0.5), percentile(gaps_training, 0.99)),
        ],
        shared,
    )
    measured = Measured(
        job_status=job["status"],
        steps=finetuning.read_progress(job).step or 0,
        pieces_during_training=pieces,
        longest_gap=longest,
        stream_failures=tuple(streams.failures),
        shared=records.summary(train_from_wall, float("inf")),
        base_unchanged=base_before == base_after,
        exact_before=before.exact,
        exact_after=after.exact,
        held_out=len(held_out),
    )
    return Outcome(measured, keys[tenants.SHOP], adapter)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """A terminal that goes away, or a SIGTERM, ends the show like Ctrl-C does: the server is stopped first."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    numbers = (signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, task.cancel)
    try:
        yield
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
