"""`coserve keys …`: API keys, with an admin key."""

from __future__ import annotations

import click

from coserve.server.cli.output import show_json, show_table, when
from coserve.server.cli.remote import Remote, path_part

_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_PATH = "/organization/api_keys"


@click.group("keys")
def command() -> None:
    """Create, list and delete API keys. Needs an admin key."""


@command.command("create")
@click.option("--tenant", required=True, metavar="NAME", help="Whose key it is; a new tenant is made.")
@click.option("--name", metavar="TEXT", help="To tell the key from others.")
@_JSON
def create(tenant: str, name: str | None, as_json: bool) -> None:
    """Make a key. It is shown only now: the server keeps no copy."""
    key = Remote().post(_PATH, {"tenant": tenant} | ({"name": name} if name else {}))
    if as_json:
        show_json(key)
        return
    click.echo(key["key"])
    click.echo(f"{key['id']}, of tenant {tenant}; it cannot be shown again", err=True)


@command.command("list")
@_JSON
def list_keys(as_json: bool) -> None:
    """All live keys, without their secret part."""
    keys = Remote().pages(_PATH)
    if as_json:
        show_json(keys)
        return
    rows = [(k["id"], k.get("tenant"), k.get("name"), k.get("redacted_value"), when(k["created_at"])) for k in keys]
    show_table(("id", "tenant", "name", "key", "created"), rows, "no keys besides the admin key")


@command.command("delete")
@click.argument("key_id", metavar="KEY")
def delete(key_id: str) -> None:
    """Revoke a key; it stops working at once."""
    Remote().delete(f"{_PATH}/{path_part(key_id)}")
    click.echo(f"{key_id}: deleted")
