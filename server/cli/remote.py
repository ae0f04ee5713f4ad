"""The command line's connection to a running server. Every failure is one line that says what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

import click
import httpx

_DEFAULT_URL = "http://127.0.0.1:8000"
_TIMEOUT = httpx.Timeout(60.0, connect=5.0)


class RemoteError(click.ClickException):
    """A request that failed; `status` is the HTTP status, or None if no server answered."""

    exit_code = 1

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status

    @property
    def passing(self) -> bool:
        """Whether the same request may well succeed in a moment."""
        return self.status is None or self.status in (429, 502, 503)


class Remote:
    """One server, one key. Paths are given without `/v1` in front."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        given = environ.get("COSERVE_BASE_URL") or environ.get("OPENAI_BASE_URL") or _DEFAULT_URL
        self.url = given.rstrip("/").removesuffix("/v1")
        key = environ.get("COSERVE_API_KEY") or environ.get("OPENAI_API_KEY") or ""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        try:
            # a proxy of the environment has no business between a user and a server of his own machine
            local = httpx.URL(self.url).host in ("127.0.0.1", "localhost", "::1")
            self._http = httpx.Client(
                base_url=f"{self.url}/v1", headers=headers, timeout=_TIMEOUT, trust_env=not local
            )  # fmt: skip
        except (httpx.InvalidURL, UnicodeEncodeError, ValueError) as error:
            raise click.UsageError(f"COSERVE_BASE_URL or COSERVE_API_KEY cannot be used: {error}") from None

    def get(self, path: str, **params: Any) -> dict[str, Any]:
        return self._json("GET", path, params={k: v for k, v in params.items() if v is not None})

    def post(self, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
        return self._json("POST", path, json={} if body is None else body, headers=headers)

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
        with self._stream("POST", path, json=body) as response:
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                if data == "[DONE]":
                    return
                if data:
                    event = json.loads(data)
                    if "error" in event:
                        raise RemoteError(str(event["error"].get("message", "the stream failed")))
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
        try:
            body: dict[str, Any] = response.json()
        except ValueError:
            raise RemoteError(f"{self.url} answered something that is no JSON: is it a coserve server?") from None
        return body

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
        except httpx.ConnectError:
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
            message, param = str(error["message"]), error.get("param")
        except (ValueError, KeyError, TypeError):
            return RemoteError(f"{self.url} answered {response.status_code}: is it a coserve server?", -1)
        if response.status_code == 401:
            message += " Set COSERVE_API_KEY; the admin key is in the file admin-key of the server's data directory."
        if param and str(param) not in message:
            message += f" ({param})"
        return RemoteError(message, response.status_code)


def _slow() -> httpx.Timeout:
    """Uploads and streams: seconds may pass between bytes, a queued request sends its first one late."""
    return httpx.Timeout(600.0, connect=5.0)
