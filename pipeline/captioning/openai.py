"""Captions from a server with OpenAI's interface for chats (vLLM, SGLang, llama.cpp, Ollama, OpenAI itself).

Requests run in an event loop in a thread of its own, a bounded number at a time. What may pass is tried again with
growing pauses; what a person must mend (a wrong key, no such model, an empty account) ends the rank at once, and so
does a server that answers none of a rank's questions.
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

_LOOK = 0.5  # seconds between looks whether we are to stop
_AHEAD = 4  # questions that wait for each that is asked, so that a slow answer holds up no other
_LONGEST_ANSWER = 1 << 22  # bytes
_LONGEST_PAUSE = 60.0  # seconds between two tries; a server that asks for more is taken at its word, up to _PATIENCE
_PATIENCE = 600.0
_CONNECT = 30.0
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
_BUSY = (429, 503)  # what a server says of itself, not of one request
_PERSON = (401, 402, 403, 404, 405)  # what a person must mend
_NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
_SILENT = 16  # questions in a row without an answer, of a server that has not answered a single one, that end the rank
_QUALITY = 90  # of the JPEGs that are sent
_LARGEST_COUNT = 10**9  # tokens that a server may say to have used for one answer


class Unanswered(Exception):
    """The server did not answer a request as it should.

    Args:
        reason: one snake_case word.
        again: whether another try may help, ``wait``: after how many seconds at least.
    """

    def __init__(self, reason: str, detail: str = "", *, again: bool = True, wait: float = 0.0) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
        self.again = again
        self.wait = wait


@dataclass
class Budget:
    """Tokens that may be spent, by all ranks together."""

    most: int
    elsewhere: int = 0
    """Spent for partitions that are committed by others, or were by an earlier life."""
    here: int = 0
    """Spent by this process."""

    def require(self) -> None:
        """Raises ConfigError if nothing is left."""
        if self.most and self.elsewhere + self.here >= self.most:
            raise ConfigError(
                f"token_budget={self.most} is spent ({self.elsewhere + self.here} tokens); committed partitions "
                "are kept: the same command with a larger budget resumes from here"
            )


class ChatClient:
    """Sends requests to one server; for use within one event loop.

    Args:
        base_url: as ``http://host:8000/v1``.
        key: sent as a bearer token; empty: none.
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
        """Names of the models that the server says to have; empty if it does not say."""
        try:
            body = await self._send("GET", "models", None)
            return [str(entry["id"]) for entry in body["data"]]
        except (Unanswered, KeyError, TypeError):
            return []

    async def ask(self, body: Mapping[str, Any], budget: Budget) -> tuple[Said, int]:
        """The answer to a chat, and the number of requests that it took; its tokens are taken from ``budget``.

        Raises:
            Unanswered: there is none.
            ConfigError: there will be none before a person has mended something, or the budget is spent.
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
            ConfigError: as of an earlier request.
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
        """The JSON of an answer with status 200."""
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
        """What an answer with another status means."""
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
    """The body of an answer.

    Raises:
        Unanswered: it is longer than an answer can be.
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
    """Code and message in the body of an answer that is an error; empty where there are none."""
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
    """What the JSON of an answer says.

    Raises:
        Unanswered: ``bad_answer``: it is no answer to a chat.
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
        raise Unanswered("bad_answer", "its content is no text")
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
    """The server at ``place``, a base URL. Its key comes from the environment and goes nowhere else.

    Raises:
        ConfigError: it is no URL, has a password in it, or no model is named.
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
        """Raises ConfigError that names the models that the server has."""
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
        """The result of ``future``, if it is there within a moment."""
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
        """Raises StorageError if the server seems to be down, or to understand nothing of what we ask."""
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
