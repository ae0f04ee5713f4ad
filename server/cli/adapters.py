"""`coserve adapters …`: adapters of the key's tenant, as PEFT folders on this side."""

from __future__ import annotations

import tarfile
import tempfile
from pathlib import Path
from typing import IO

import click

from coserve.server.cli.output import show_json, show_table, size
from coserve.server.cli.remote import Remote, path_part

_FILES = ("adapter_config.json", "adapter_model.safetensors")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group("adapters")
def command() -> None:
    """List, upload, download and delete adapters."""


@command.command("list")
@_JSON
def list_adapters(as_json: bool) -> None:
    """Adapters that were uploaded or trained."""
    adapters = Remote().pages("/adapters")
    if as_json:
        show_json(adapters)
        return
    rows = [
        (
            a["id"],
            a["name"],
            a.get("version"),
            a.get("rank"),
            size(a["bytes"]) if a.get("bytes") else None,
            a.get("fine_tuned_model"),
        )
        for a in adapters
    ]
    show_table(("id", "name", "version", "rank", "size", "model"), rows, "no adapters: train or upload one")


@command.command("upload")
@click.argument("name")
@click.argument("source", type=click.Path(exists=True, readable=True, path_type=Path))
@_JSON
def upload(name: str, source: Path, as_json: bool) -> None:
    """Upload a PEFT folder.

    SOURCE is the folder or a tar of it. The same NAME again makes a new version.
    """
    with tempfile.TemporaryFile() as archive:
        if source.is_dir():
            pack(source, archive)
            file: IO[bytes] = archive
        else:
            file = source.open("rb")
        with file:
            adapter = Remote().upload("/adapters", {"name": name}, f"{source.name}.tar", file)  # type: ignore[arg-type]
    if as_json:
        show_json(adapter)
        return
    click.echo(f"{adapter['id']}: {adapter['name']}, version {adapter['version']}, rank {adapter['rank']}")


@command.command("download")
@click.argument("adapter", metavar="ADAPTER")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="New folder. [the adapter's name]")
def download(adapter: str, output: Path | None) -> None:
    """Download an adapter as a PEFT folder.

    ADAPTER is its id, its name or the id of a finetuned model or checkpoint.
    """
    target = output or Path(adapter.replace("/", "-").replace(":", "-"))
    if target.exists():
        raise click.UsageError(f"{target} exists: give another folder with --output")
    with tempfile.TemporaryFile() as archive:
        Remote().download(f"/adapters/{path_part(adapter)}/download", archive)
        archive.seek(0)
        unpack(archive, target)
    click.echo(str(target))


@command.command("delete")
@click.argument("adapter", metavar="ADAPTER")
def delete(adapter: str) -> None:
    """Delete an adapter with all its versions.

    ADAPTER is its id, its name or a finetuned model's id. Requests that run on it end well.
    """
    Remote().delete(f"/adapters/{path_part(adapter)}")
    click.echo(f"{adapter}: deleted")


def pack(folder: Path, archive: IO[bytes]) -> None:
    """The two files of a PEFT folder as a tar, and nothing else that lies beside them."""
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise click.UsageError(f"{folder} is no PEFT folder: it has no {missing[0]} (save it with save_pretrained)")
    try:
        with tarfile.open(fileobj=archive, mode="w", dereference=True) as tar:  # a hub's cache is a folder of links
            for name in _FILES:
                tar.add(folder / name, arcname=name)
    except OSError as error:
        raise click.ClickException(f"cannot read {error.filename or folder} ({error.strerror})") from None
    archive.seek(0)


def unpack(archive: IO[bytes], target: Path) -> None:
    """Plain files of a tar into a new folder. Nothing in it can reach outside of the folder."""
    try:
        with tarfile.open(fileobj=archive, mode="r:") as tar:
            members = [m for m in tar if m.isfile()]
            target.mkdir(parents=True)
            for member in members:
                source = tar.extractfile(member)
                if source is not None:
                    with source, (target / Path(member.name).name).open("xb") as file:
                        while chunk := source.read(1 << 20):
                            file.write(chunk)
    except tarfile.TarError as error:
        raise click.ClickException(f"the server sent a damaged archive ({error}): download it again") from None
    except OSError as error:
        raise click.ClickException(f"cannot write {target} ({error.strerror}): give --output") from None
