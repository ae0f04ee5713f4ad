"""`coserve chat`: one question or a conversation, streamed."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import click

from coserve.server.cli.numbers import FINITE
from coserve.server.cli.output import plain
from coserve.server.cli.remote import Remote, RemoteError


@click.command("chat")
@click.argument("prompt", nargs=-1)
@click.option("--model", "-m", help="A base model, adapter or finetuned model. [the server's base model]")
@click.option("--system", "-s", help="System message.")
@click.option("--max-tokens", type=int, metavar="N", help="Longest answer. [what the context leaves]")
@click.option("--temperature", type=FINITE, metavar="X", help="0 takes the likeliest token. [1]")
@click.option("--top-p", type=FINITE, metavar="X", help="Draw from the likeliest tokens of this share. [1]")
@click.option("--seed", type=int, metavar="N", help="The same seed gives the same answer. [drawn]")
def command(prompt: tuple[str, ...], model: str | None, system: str | None, **sampling: Any) -> None:
    """Ask PROMPT and print the answer; without one, read it from a pipe, or talk in the terminal.

    In a conversation Ctrl-C stops an answer, and Ctrl-D or /exit ends it; /new forgets what was said.
    """
    remote = Remote()
    talk = _Talk(remote, model or remote.default_model(), system, sampling)
    text = " ".join(prompt)
    if not text and not sys.stdin.isatty():
        text = _piped()
        if not text:
            raise click.UsageError("nothing to ask: give a PROMPT")
    if text:
        talk.ask(text)
        return
    _converse(talk)


def _piped() -> str:
    try:
        return sys.stdin.read().strip()
    except UnicodeDecodeError:
        raise RemoteError("the piped text is not UTF-8: convert it, for instance with iconv") from None


def _converse(talk: _Talk) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() edits lines and remembers them once it is there
    click.echo(f"{plain(talk.model)} (Ctrl-D or /exit to end, /new to start again)", err=True)
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            click.echo(err=True)
            return
        except UnicodeDecodeError:
            click.echo("that was not UTF-8; say it again", err=True)
            continue
        if text in ("/exit", "/quit"):
            return
        if text == "/new":
            talk.forget()
        elif text:
            try:
                talk.ask(text)
            except RemoteError as error:
                error.show()


class _Talk:
    """A conversation: what was said, and how the next answer is sampled."""

    def __init__(self, remote: Remote, model: str, system: str | None, sampling: dict[str, Any]) -> None:
        self.model = model
        self._remote = remote
        self._system = [{"role": "system", "content": system}] if system else []
        self._said: list[dict[str, str]] = []
        self._sampling = {name: value for name, value in sampling.items() if value is not None}

    def forget(self) -> None:
        self._said.clear()

    def ask(self, text: str) -> None:
        """Prints the answer as it comes and remembers it, also one that Ctrl-C cut short in a conversation."""
        question = {"role": "user", "content": text}
        messages = [*self._system, *self._said, question]
        answer: list[str] = []
        body = {"model": self.model, "messages": messages, "stream": True, **self._sampling}
        try:
            for chunk in self._remote.stream("/chat/completions", body):
                for choice in chunk["choices"]:
                    piece = choice["delta"].get("content") or ""
                    answer.append(piece)
                    click.echo(plain(piece) if sys.stdout.isatty() else piece, nl=False)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
        finally:
            if answer:
                click.echo()
        self._said += [question, {"role": "assistant", "content": "".join(answer)}]
