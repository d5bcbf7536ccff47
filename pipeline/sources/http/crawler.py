"""Downloads many small files concurrently, in an event loop in its own thread, and returns them in order."""

from __future__ import annotations

import asyncio
import queue
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol
from urllib.robotparser import RobotFileParser

from pipeline.samples import SampleError
from pipeline.sources.http.client import Client, Head, Policy, Sink
from pipeline.sources.http.target import FetchError, Target
from pipeline.stores import is_url

_HELD = 256 << 20  # maximum bytes of results that wait in memory; others wait on disk
_ROBOTS = 512 << 10  # maximum bytes read of a robots.txt
_MOST_ROBOTS = 10_000
_LOOK = 0.5  # seconds between checks whether to stop


_Done = tuple[int, bytes | BaseException]


class SmallSink(Sink, Protocol):
    """A sink that holds the file in memory."""

    def data(self) -> bytes:
        """The complete file, once it has arrived; may raise SampleError."""


class Crawler:
    """Downloads lists of URLs; connections and the state of hosts are kept between calls."""

    def __init__(self, policy: Policy, *, robots_txt: bool = False) -> None:
        self._robots = _Robots(policy.user_agent.partition(" ")[0]) if robots_txt else None
        self._policy = policy
        self._loop = asyncio.new_event_loop()
        self._clients: list[Client] = []
        thread = threading.Thread(target=_serve, args=(self._loop,), name="crawler", daemon=True)
        thread.start()
        weakref.finalize(self, _close, self._loop, self._clients)

    def fetch_all(
        self, jobs: Sequence[tuple[str, SmallSink]], step: Callable[[], None], scratch: Path | None
    ) -> Iterator[bytes | SampleError]:
        """Yield the file or error of each URL in order; ``step`` is called regularly and may raise."""
        done: queue.SimpleQueue[_Done] = queue.SimpleQueue()
        work = asyncio.run_coroutine_threadsafe(self._all(jobs, done), self._loop)
        shelf = _Shelf(scratch)
        try:
            for number in range(len(jobs)):
                while number not in shelf:
                    step()
                    with suppress(queue.Empty):
                        index, result = done.get(timeout=_LOOK)
                        if isinstance(result, BaseException) and not isinstance(result, SampleError):
                            raise result
                        shelf.put(index, result)
                yield shelf.take(number)
        finally:
            work.cancel()
            shelf.close()

    async def _all(
        self,
        jobs: Sequence[tuple[str, SmallSink]],
        done: queue.SimpleQueue[tuple[int, bytes | SampleError | BaseException]],
    ) -> None:
        if not self._clients:
            self._clients.append(await Client(self._policy).__aenter__())
        (client,) = self._clients

        async def one(number: int, url: str, sink: SmallSink) -> None:
            try:
                if self._robots:
                    await self._robots.check(client, url)
                await client.fetch(url, sink)
                done.put((number, sink.data()))
            except SampleError as error:
                error.__traceback__ = None  # it would keep the received bytes in memory
                done.put((number, error))
            except Exception as error:
                done.put((number, error))

        async with asyncio.TaskGroup() as group:
            for number, (url, sink) in enumerate(jobs):
                group.create_task(one(number, url, sink))


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()


def _close(loop: asyncio.AbstractEventLoop, clients: list[Client]) -> None:
    asyncio.run_coroutine_threadsafe(_end(loop, clients), loop)


async def _end(loop: asyncio.AbstractEventLoop, clients: list[Client]) -> None:
    for client in clients:
        await client.__aexit__()
    loop.stop()


class _Shelf:
    """Results that wait to be yielded in order: some in memory, the rest in a file."""

    def __init__(self, scratch: Path | None) -> None:
        self._scratch = scratch
        self._held = 0
        self._results: dict[int, bytes | SampleError | tuple[int, int]] = {}
        self._file: IO[bytes] | None = None
        self._end = 0

    def __contains__(self, number: int) -> bool:
        return number in self._results

    def put(self, number: int, result: bytes | SampleError) -> None:
        if isinstance(result, bytes) and self._held + len(result) > _HELD:
            self._file = self._file or tempfile.TemporaryFile(dir=self._scratch)  # noqa: SIM115
            self._file.seek(self._end)
            self._file.write(result)
            self._results[number] = (self._end, len(result))
            self._end += len(result)
            return
        if isinstance(result, bytes):
            self._held += len(result)
        self._results[number] = result

    def take(self, number: int) -> bytes | SampleError:
        result = self._results.pop(number)
        if isinstance(result, tuple):
            assert self._file is not None
            self._file.seek(result[0])
            return self._file.read(result[1])
        if isinstance(result, bytes):
            self._held -= len(result)
        return result

    def close(self) -> None:
        if self._file:
            self._file.close()


class _Text:
    """A sink for a short text."""

    def __init__(self) -> None:
        self.text = b""

    def have(self) -> tuple[int, str]:
        return 0, ""

    def begin(self, head: Head) -> None:
        self.text = b""

    def write(self, data: bytes) -> None:
        self.text += data[: _ROBOTS - len(self.text)]


class _Robots:
    """The rules in each host's robots.txt (RFC 9309), fetched once."""

    def __init__(self, agent: str) -> None:
        self._agent = agent
        self._known: dict[tuple[str, str, int], asyncio.Future[RobotFileParser]] = {}

    async def check(self, client: Client, url: str) -> None:
        """Raise FetchError ``robots_txt`` if the host disallows ``url``."""
        if is_url(url):
            return
        target = Target.parse(url)
        rules = self._known.get(target.origin)
        if rules is None or (rules.done() and not rules.cancelled() and rules.exception()):
            if len(self._known) >= _MOST_ROBOTS:
                self._known.clear()
            rules = asyncio.ensure_future(self._rules(client, target))
            self._known[target.origin] = rules
        allowed = (await asyncio.shield(rules)).can_fetch(self._agent, target.url)
        if not allowed:
            raise FetchError("robots_txt", "disallowed")

    async def _rules(self, client: Client, target: Target) -> RobotFileParser:
        text = _Text()
        rules = RobotFileParser()
        try:
            await client.fetch(f"{target.scheme}://{target.netloc}/robots.txt", text)
        except FetchError as error:
            if not error.reason.startswith("http_4") or error.reason == "http_429":
                raise FetchError("robots_unreachable", error.reason, retryable=True) from None
        rules.parse(text.text.decode("utf-8", "replace").splitlines())
        return rules
