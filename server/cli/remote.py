"""The command line's connection to a running server. Every failure is one line that says what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO
from urllib.parse import quote

import click
import httpx

_DEFAULT_URL = "http://127.0.0.1:8000"
_STRANGER = "is it a coserve server? COSERVE_BASE_URL says where to look"
_TIMEOUT = httpx.Timeout(60.0, connect=5.0)


class RemoteError(click.ClickException):
    """A request that failed; `status` is the HTTP status, or None if no server answered."""

    exit_code = 1

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status

    @property
    def refused(self) -> bool:
        """Whether a server understood the request and did nothing for it."""
        return self.status is not None and 400 <= self.status < 500

    @property
    def passing(self) -> bool:
        """Whether the same request may well succeed in a moment."""
        return self.status is None or self.status in (429, 502, 503)


class _Object(dict[str, Any]):
    """A JSON object of an answer; a key that every coserve server gives and this one does not is said in one line."""

    def __missing__(self, key: str) -> Any:
        raise RemoteError(f"the server's answer has no {key!r}: {_STRANGER}")


class Remote:
    """One server, one key. Paths are given without `/v1` in front."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        given = environ.get("COSERVE_BASE_URL") or environ.get("OPENAI_BASE_URL") or _DEFAULT_URL
        self.url = given.rstrip("/").removesuffix("/v1")
        key = environ.get("COSERVE_API_KEY") or environ.get("OPENAI_API_KEY") or ""
        key = key.strip()
        if not (key.isascii() and key.isprintable()):
            raise RemoteError("COSERVE_API_KEY (or OPENAI_API_KEY) has characters that no key has: copy the key again")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        try:
            # a proxy of the environment has no business between a user and a server of his own machine
            local = httpx.URL(self.url).host in ("127.0.0.1", "localhost", "::1")
            self._http = httpx.Client(
                base_url=f"{self.url}/v1", headers=headers, timeout=_TIMEOUT, trust_env=not local
            )  # fmt: skip
        except (httpx.InvalidURL, ValueError) as error:
            raise RemoteError(f"COSERVE_BASE_URL cannot be used: {error}") from None

    def get(self, path: str, **params: Any) -> dict[str, Any]:
        return self._json("GET", path, params={k: v for k, v in params.items() if v is not None})

    def post(self, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
        return self._json("POST", path, **_body({} if body is None else body, headers))

    def delete(self, path: str) -> dict[str, Any]:
        return self._json("DELETE", path)

    def upload(self, path: str, fields: Mapping[str, str], name: str, file: BinaryIO) -> dict[str, Any]:
        return self._json("POST", path, data=dict(fields), files={"file": (name, file)}, timeout=_slow())

    def download(self, path: str, target: BinaryIO) -> None:
        with self._stream("GET", path) as response:
            for chunk in response.iter_bytes(1 << 20):
                target.write(chunk)

    def stream(self, path: str, body: Any) -> Iterator[dict[str, Any]]:
        """The data of each server-sent event. Raises RemoteError also for an error inside the stream."""
        with self._stream("POST", path, **_body(body)) as response:
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                if data == "[DONE]":
                    return
                if data:
                    event = _parsed(data)
                    if "error" in event:
                        raise RemoteError(str(event["error"]["message"]))
                    yield event
        raise RemoteError("the answer broke off: the server ended the connection; ask again")

    def pages(self, path: str, limit: int | None = None) -> list[dict[str, Any]]:
        """All entries of a list, or the first `limit` of them."""
        found: list[dict[str, Any]] = []
        after = None
        while True:
            page = self.get(path, after=after, limit=min(100, limit - len(found)) if limit else 100)
            found += page["data"]
            if not page.get("has_more") or not page["data"] or (limit and len(found) >= limit):
                return found
            after = page["data"][-1]["id"]

    def default_model(self) -> str:
        models = self.get("/models")["data"]
        if not models:
            raise RemoteError("the server lists no model yet; it may still be loading: try again in a moment")
        return str(models[0]["id"])

    # ------------------------------------------------------------------ inside

    def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        with self._errors():
            response = self._http.request(method, path, **options)
        if response.is_error:
            raise self._refusal(response)
        return _parsed(response.text)

    @contextmanager
    def _stream(self, method: str, path: str, **options: Any) -> Iterator[httpx.Response]:
        with self._errors(), self._http.stream(method, path, timeout=_slow(), **options) as response:
            if response.is_error:
                response.read()
                raise self._refusal(response)
            yield response

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            if "SSL" in str(error):
                raise RemoteError(f"{self.url} does not speak TLS as asked ({error}): try http:// instead") from None
            raise RemoteError(
                f"no server answers at {self.url}: start one with `coserve serve --model …`, or set COSERVE_BASE_URL"
            ) from None
        except httpx.TimeoutException:
            raise RemoteError(f"{self.url} did not answer in time: see its log, or try again") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RemoteError(f"talking to {self.url} failed ({error}): check COSERVE_BASE_URL") from None

    def _refusal(self, response: httpx.Response) -> RemoteError:
        try:
            error = response.json()["error"]
            message, param, code = str(error["message"]), error.get("param"), error.get("code")
        except (ValueError, KeyError, TypeError, AttributeError):
            return RemoteError(f"{self.url} answered {response.status_code}: {_STRANGER}", -1)
        if response.status_code == 401:
            message += " Set COSERVE_API_KEY; the admin key is in the file admin-key of the server's data directory."
        if code == "unknown_url":
            message += " Check COSERVE_BASE_URL."
        if response.status_code == 400 and param and str(param) not in message:
            message += f" ({param})"
        return RemoteError(message, response.status_code)


def _slow() -> httpx.Timeout:
    """Uploads and streams: seconds may pass between bytes, a queued request sends its first one late."""
    return httpx.Timeout(600.0, connect=5.0)


def path_part(reference: str) -> str:
    """An id or name as one part of a URL's path, which it cannot lead out of."""
    if reference in ("", ".", ".."):
        raise click.UsageError(f"{reference!r} is no id or name")
    try:
        return quote(reference, safe="")
    except UnicodeEncodeError:
        raise click.UsageError("an id or name is text: this one has bytes that are not UTF-8") from None


def _body(body: Any, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A JSON body as httpx takes it."""
    try:
        content = json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise RemoteError("the text is not UTF-8: convert it, for instance with iconv") from None
    return {"content": content, "headers": {"content-type": "application/json", **(headers or {})}}


def _parsed(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text, object_hook=_Object)
    except ValueError:
        raise RemoteError(f"the server answered something that is no JSON: {_STRANGER}") from None
    if not isinstance(value, _Object):
        raise RemoteError(f"the server answered no JSON object: {_STRANGER}")
    return value
