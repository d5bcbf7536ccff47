"""Captions from a server with OpenAI's chat interface (vLLM, SGLang, llama.cpp, Ollama, or OpenAI).

A limited number of requests runs concurrently, in an event loop in a separate thread. Transient errors are retried with
increasing pauses. Errors that a person must fix (a wrong key, an unknown model, no credit) end the rank immediately, as
does a server that answers none of its questions.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp

from pipeline.captioning.answers import Said
from pipeline.captioning.base import Captioner, Question, Written
from pipeline.config.schema import ConfigError, public_text
from pipeline.imaging import transform
from pipeline.randomness import keyed_seed
from pipeline.registry import captioners
from pipeline.sources.http.client import retry_after
from pipeline.storage import StorageError

if TYPE_CHECKING:
    from pipeline.captioning.journal import Journal
    from pipeline.distributed import Rank

_LOOK = 0.5  # seconds between checks whether to stop
_AHEAD = 4  # pending questions per connection, so that a slow answer does not delay others
_LONGEST_ANSWER = 1 << 22  # maximum bytes
_LONGEST_PAUSE = 60.0  # maximum seconds between tries, unless the server asks for more (up to _PATIENCE)
_PATIENCE = 600.0
_CONNECT = 30.0
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
_BUSY = (429, 503)  # concerns the server, not one request
_PERSON = (401, 402, 403, 404, 405)  # a person must fix these
_NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
_SILENT = 16  # unanswered questions that end the rank if the server has never answered
_QUALITY = 90  # of JPEGs that are sent
_LARGEST_COUNT = 10**9  # maximum plausible tokens per answer


class Unanswered(Exception):
    """The server did not answer a request, or answered incorrectly.

    Args:
        reason: a snake_case identifier.
        again: whether a retry may succeed, after at least ``wait`` seconds.
    """

    def __init__(self, reason: str, detail: str = "", *, again: bool = True, wait: float = 0.0) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
        self.again = again
        self.wait = wait


@dataclass
class Budget:
    """Limit on the tokens spent by all ranks."""

    most: int
    elsewhere: int = 0
    """Tokens spent on committed partitions."""
    here: int = 0
    """Tokens spent by this process since then."""

    def require(self) -> None:
        """Raise ConfigError if the limit is reached."""
        if self.most and self.elsewhere + self.here >= self.most:
            raise ConfigError(
                f"token_budget={self.most} is spent ({self.elsewhere + self.here} tokens); committed partitions "
                "are kept: the same command with a larger budget resumes from here"
            )


class ChatClient:
    """Sends requests to a server, within one event loop.

    Args:
        base_url: URL such as ``http://host:8000/v1``.
        key: bearer token; empty for none.
        share: this rank's share of the limits on requests and tokens per minute.
    """

    def __init__(self, base_url: str, key: str, config: Any, share: float = 1.0) -> None:
        self._base = base_url.rstrip("/")
        self._key = key
        self._config = config
        self._gap = 60 / (config.requests_per_minute * share) if config.requests_per_minute else 0.0
        self._token_seconds = 60 / (config.tokens_per_minute * share) if config.tokens_per_minute else 0.0
        self._places = asyncio.Semaphore(config.connections)
        self._next = self._tokens_due = self._paused_until = 0.0
        self._session: aiohttp.ClientSession | None = None
        self._refusal: ConfigError | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def models(self) -> list[str]:
        """Names of the models on the server; empty if it does not list them."""
        try:
            body = await self._send("GET", "models", None)
            return [str(entry["id"]) for entry in body["data"]]
        except (Unanswered, KeyError, TypeError):
            return []

    async def ask(self, body: Mapping[str, Any], budget: Budget) -> tuple[Said, int]:
        """Send a chat; return the answer and the number of requests, and deduct the tokens from ``budget``.

        Raises:
            Unanswered: there is no valid answer.
            ConfigError: a person must fix something first, or the budget is spent.
        """
        async with self._places:
            for attempt in range(self._config.retries + 1):
                await self._turn()
                budget.require()
                try:
                    said = understood(await self._send("POST", "chat/completions", body), body["max_tokens"])
                except Unanswered as error:
                    if not error.again or attempt == self._config.retries or error.wait > _PATIENCE:
                        raise
                    pause = min(_LONGEST_PAUSE, 0.5 * 2.0**attempt * random.uniform(0.5, 1.5))
                    await asyncio.sleep(max(error.wait, pause))
                    continue
                tokens = said.prompt_tokens + said.completion_tokens
                budget.here += tokens
                self._tokens_due = max(self._tokens_due, time.monotonic()) + tokens * self._token_seconds
                return said, attempt + 1
        raise AssertionError("unreachable")

    async def _turn(self) -> None:
        """Wait until the limits allow a request.

        Raises:
            ConfigError: the error of an earlier request that a person must fix.
        """
        while True:
            if self._refusal is not None:
                raise self._refusal
            now = time.monotonic()
            wait = max(self._next, self._tokens_due, self._paused_until) - now
            if wait <= 0:
                self._next = now + self._gap
                return
            await asyncio.sleep(wait)

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        """Send a request and return the JSON of the response with status 200."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=self._config.timeout, sock_connect=_CONNECT),
                connector=aiohttp.TCPConnector(limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"User-Agent": "latentmill", "Accept": "application/json"},
            )
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            async with self._session.request(
                method, f"{self._base}/{path}", json=body, headers=headers, allow_redirects=False
            ) as response:
                data = await _limited(response)
                if response.status != HTTPStatus.OK:
                    raise self._refused(response, data)
        except TimeoutError:
            raise Unanswered("server_timeout", f"no answer within {self._config.timeout:g} s") from None
        except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError):
            raise ConfigError(f"captioner=openai:{self._base}: its certificate is not valid") from None
        except aiohttp.InvalidURL:
            raise ConfigError(f"captioner=openai:{self._base}: not a URL") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Unanswered("server_unreachable", type(error).__name__) from None
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise Unanswered("bad_answer", "no JSON") from None

    def _refused(self, response: aiohttp.ClientResponse, data: bytes) -> Exception:
        """The exception for a response with another status."""
        code, message = error_of(data)
        status = response.status
        if status in _PERSON or code in _NO_MONEY:
            said = " ".join(self._without_key(message).split())[:300]
            self._refusal = ConfigError(
                f"captioner=openai:{self._base}: the server refuses every request with status {status}"
                f"{f' ({said})' if said else ''}: {self._cure(status, code)}"
            )
            return self._refusal
        wait = retry_after(response.headers.get("Retry-After", ""))
        if status in _BUSY:
            self._paused_until = max(self._paused_until, time.monotonic() + min(wait, _PATIENCE))
        return Unanswered(f"http_{status}", code, again=status in _AGAIN, wait=wait)

    def _cure(self, status: int, code: str) -> str:
        if code in _NO_MONEY or status == HTTPStatus.PAYMENT_REQUIRED:
            return "the account has no credit or quota left"
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            there = "" if self._key else ", which is not set"
            return f"the key is that of the environment variable api_key_env={self._config.api_key_env}{there}"
        return "check the base URL (it usually ends in /v1), and that the server serves served_model="

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "...") if self._key else text


async def _limited(response: aiohttp.ClientResponse) -> bytes:
    """Read the body of a response.

    Raises:
        Unanswered: it is too long.
    """
    pieces: list[bytes] = []
    size = 0
    async for piece in response.content.iter_any():
        pieces.append(piece)
        size += len(piece)
        if size > _LONGEST_ANSWER:
            response.close()
            raise Unanswered("bad_answer", f"more than {_LONGEST_ANSWER >> 20} MiB")
    return b"".join(pieces)


def error_of(data: bytes) -> tuple[str, str]:
    """Code and message in the body of an error response; empty if there are none."""
    try:
        body = json.loads(data)
        error = body.get("error", body) if isinstance(body, dict) else {}
    except (ValueError, RecursionError):
        return "", data[:300].decode("utf-8", "replace")
    if not isinstance(error, dict):
        return "", str(error)
    code = str(error.get("code") or error.get("type") or "")
    return (code if code.replace("_", "").isalnum() and len(code) < 60 else ""), str(error.get("message") or "")


def understood(body: Any, max_tokens: int) -> Said:
    """Parse the JSON of a response.

    Raises:
        Unanswered: ``bad_answer`` if it is not a valid chat response.
    """
    try:
        choice = body["choices"][0]
        message = choice["message"]
        content = message.get("content")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Unanswered("bad_answer", "no choice with a message in it") from None
    finish = choice.get("finish_reason")
    refused = bool(message.get("refusal")) or finish == "content_filter"
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    if content is not None and not isinstance(content, str):
        raise Unanswered("bad_answer", "its content is not text")
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    prompt, completion = (_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens"))
    return Said(
        content or "",
        cut=finish == "length",
        refused=refused,
        prompt_tokens=prompt or 0,
        completion_tokens=max_tokens if completion is None else completion,
    )


def _count(value: Any) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST_COUNT
    return value if whole else None


@captioners.register("openai")
class ChatServer(Captioner):
    """The server at the base URL ``place``. The key is read from the environment and sent only to this server.

    Raises:
        ConfigError: ``place`` is not a URL or contains a password, or no model is named.
    """

    def __init__(self, place: str, config: Any, rank: Rank) -> None:
        super().__init__(config)
        parts = urlsplit(place)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"captioner=openai:{public_text(place)}: expected a base URL, such as http://host:8000/v1"
            )
        if parts.username or parts.password or parts.query:
            raise ConfigError(
                f"captioner=openai:{public_text(place)}: leave secrets and parameters out of the URL: the key comes "
                f"from the environment variable api_key_env={config.api_key_env}"
            )
        self._place = place
        self.budget = Budget(config.token_budget)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_serve, args=(self._loop,), name="chat-server", daemon=True)
        self._thread.start()
        key = os.environ.get(config.api_key_env, "") if config.api_key_env else ""
        self._client = ChatClient(place, key, config, 1 / rank.world_size)
        self._answered = False
        self._silent = 0
        if not config.served_model:
            self.close_after(self._client.models())

    def close_after(self, models: Any) -> None:
        """Close the client and raise a ConfigError that lists the models on the server."""
        names = asyncio.run_coroutine_threadsafe(models, self._loop).result(self.config.timeout + _CONNECT)
        self.close()
        served = f"; the server has {', '.join(names[:10])}" if names else ""
        raise ConfigError(
            f"captioner=openai:{self._place} needs served_model=<name of the model on the server>{served}"
        )

    def describe(self) -> dict[str, Any]:
        return {"name": "openai", "model": self.config.served_model}

    def spent(self, tokens: int) -> None:
        self.budget.elsewhere, self.budget.here = tokens, 0

    def close(self) -> None:
        if not self._loop.is_closed() and self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._client.close(), self._loop).result(_CONNECT)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_CONNECT)
            self._loop.close()

    def write(
        self, questions: Iterator[Question], journal: Journal | None, step: Callable[[], None]
    ) -> Iterator[Written]:
        waiting: deque[Future[Written]] = deque()
        most = _AHEAD * self.config.connections
        more = True
        try:
            while more or waiting:
                while more and len(waiting) < most and not (waiting and waiting[0].done()):
                    question = next(questions, None)
                    more = question is not None
                    if question is not None:
                        waiting.append(self._submit(question, journal))
                if waiting and (written := self._ended(waiting[0], step)) is not None:
                    waiting.popleft()
                    yield written
        finally:
            for future in waiting:
                future.cancel()

    def _ended(self, future: Future[Written], step: Callable[[], None]) -> Written | None:
        """The result of ``future``, or None if it is not available within a short time."""
        step()
        try:
            return future.result(_LOOK)
        except TimeoutError:
            return None
        except CancelledError:
            raise StorageError("the connection to the server was closed while captions were asked for") from None

    def _submit(self, question: Question, journal: Journal | None) -> Future[Written]:
        known = journal.get(question) if journal is not None else None
        if known is not None:
            self.budget.here += known.prompt_tokens + known.completion_tokens
            done: Future[Written] = Future()
            done.set_result(known)
            return done
        image = transform.encode(question.image, "jpeg", _QUALITY)
        return asyncio.run_coroutine_threadsafe(self._written(question, image, journal), self._loop)

    async def _written(self, question: Question, image: bytes, journal: Journal | None) -> Written:
        written = Written()
        body = self._body(question, base64.b64encode(image).decode())
        for attempt in range(self.config.attempts):
            seed = keyed_seed(self.config.seed, "recaption", question.key, question.number, attempt)
            settings = {"temperature": self.temperature(attempt), "seed": seed % 2**31}
            try:
                said, requests = await self._client.ask(body | settings, self.budget)
            except Unanswered as error:
                self._missed(error)
                written.reason, written.detail, written.retryable = error.reason, error.detail, True
                return written
            self._answered = True
            written.requests += requests
            if not said.prompt_tokens:
                written.noted["tokens_not_counted"] += 1
            if written.take(said, self.config.refusals):
                break
        else:
            written.give_up(self.config.attempts, retryable=True)
        if journal is not None:
            journal.add(question, written)
        return written

    def _missed(self, error: Unanswered) -> None:
        """Raise StorageError if the server seems to be down or unable to process our requests."""
        self._silent = 0 if self._answered else self._silent + 1
        if self._silent >= _SILENT:
            raise StorageError(
                f"captioner=openai:{self._place}: none of the first {self._silent} requests was answered ({error}): "
                "is the server running, and does the model accept images? The same command resumes from here"
            )

    def _body(self, question: Question, image: str) -> dict[str, Any]:
        content = [
            {"type": "text", "text": question.prompt},
            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{image}"}},
        ]
        system = [{"role": "system", "content": self.config.system}] if self.config.system else []
        return {
            "model": self.config.served_model,
            "messages": [*system, {"role": "user", "content": content}],
            "max_tokens": self.config.max_tokens,
        }


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()
