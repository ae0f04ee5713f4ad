"""The HTTP calls of the show, made the way any client makes them: a base URL and a tenant's key, nothing else."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx

_TIMEOUT = httpx.Timeout(120.0, connect=10.0)


class CallFailed(Exception):
    """The server refused a call, or a stream broke; the message is the server's own."""


class Client:
    """One tenant's calls. Close it with `aclose`, or use it in `async with`."""

    def __init__(self, url: str, key: str) -> None:
        self._http = httpx.AsyncClient(
            base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=_TIMEOUT, trust_env=False
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def get(self, path: str, **query: Any) -> Any:
        """The JSON that `path` answers. Raises CallFailed."""
        return (await self._call("GET", path, params=query)).json()

    async def text(self, path: str) -> str:
        """The text that `path` answers. Raises CallFailed."""
        return (await self._call("GET", path)).text

    async def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return (await self._call("POST", path, json=body)).json()

    async def delete(self, path: str) -> Any:
        return (await self._call("DELETE", path)).json()

    async def upload(self, name: str, content: bytes, purpose: str = "fine-tune") -> str:
        """The id of the new file."""
        answer = await self._call("POST", "/v1/files", data={"purpose": purpose}, files={"file": (name, content)})
        return str(answer.json()["id"])

    async def complete(self, **body: Any) -> str:
        """The text of one plain completion."""
        return str((await self.post("/v1/completions", body))["choices"][0]["text"])

    async def stream(self, **body: Any) -> AsyncIterator[str]:
        """The pieces of one streamed completion. Raises CallFailed if it does not end as a whole stream ends."""
        finished = False
        try:
            async with self._http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise _refused(response)
                async for line in response.aiter_lines():
                    if not line.startswith("data:"):
                        continue
                    data = line.removeprefix("data:").strip()
                    if data == "[DONE]":
                        break
                    event = json.loads(data)
                    if "error" in event:
                        raise CallFailed(f"the stream ended with: {event['error'].get('message')}")
                    for choice in event["choices"]:
                        if choice["text"]:
                            yield choice["text"]
                        finished = finished or choice["finish_reason"] is not None
        except httpx.HTTPError as error:
            raise CallFailed(f"the stream broke: {type(error).__name__} {error}") from error
        if not finished:
            raise CallFailed("the stream was cut without a finish reason")

    async def _call(self, method: str, path: str, **rest: Any) -> httpx.Response:
        try:
            response = await self._http.request(method, path, **rest)
        except httpx.HTTPError as error:
            raise CallFailed(f"{method} {path}: {type(error).__name__} {error}") from error
        if response.status_code >= 300:
            raise _refused(response)
        return response


def _refused(response: httpx.Response) -> CallFailed:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    return CallFailed(f"{response.request.method} {response.request.url.path}: {response.status_code} {message}")
