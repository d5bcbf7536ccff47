"""The decorator that runs a function as one rank, and reports to the other ranks and the launcher how it ended."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar, overload

from pipeline.config.life import Life
from pipeline.config.schema import ConfigError
from pipeline.config.startup import missing
from pipeline.distributed.ending import hard_exit
from pipeline.distributed.environment import find_place
from pipeline.distributed.peers import FINISHED, STOPPED, PeerFailed, quiet_torch
from pipeline.distributed.progress import Progress
from pipeline.distributed.rank import TIMEOUT, Rank
from pipeline.distributed.signals import EXIT_ENVIRONMENT, EXIT_PEER, EXIT_STOPPED, EXIT_STORAGE, Stopped
from pipeline.distributed.standard_output import forgive
from pipeline.distributed.watchdog import Watchdog, show_stacks_on_request
from pipeline.registry import ExpectedError

P = ParamSpec("P")
Result = TypeVar("Result")
_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


@overload
def distributed(function: Callable[Concatenate[Rank, P], Result]) -> Callable[P, Result]: ...


@overload
def distributed(
    *, timeout: float = TIMEOUT
) -> Callable[[Callable[Concatenate[Rank, P], Result]], Callable[P, Result]]: ...


def distributed(function: Callable[..., Any] | None = None, *, timeout: float = TIMEOUT) -> Callable[..., Any]:
    """Run ``function(rank, config, …)`` as one of any number of ranks; call it as ``function(config, …)``.

    The config (first argument, or ``config=``) may have ``expect_world_size``, ``rank_offset`` and ``world_size`` (see
    :func:`find_place`), ``hang_timeout`` (see :class:`Watchdog`) and ``device`` (see :func:`choose_device`). While the
    function runs, signals only set a flag (:attr:`Rank.stopping`), and the package logs to stderr from the level
    ``LATENTMILL_LOG`` (INFO) on, with the rank at the beginning of each line.

    A process that a launcher started ends here if the function raises. Its exit code is that of ``SystemExit``; 2 for a
    :class:`ConfigError` and 1 for an :class:`ExpectedError` (logged as one line); 130 for Ctrl-C; :data:`EXIT_STOPPED`
    for :class:`Stopped`; :data:`EXIT_PEER` if another rank failed; :data:`EXIT_HUNG` if it was stuck;
    :data:`EXIT_STORAGE` if the file system cannot be written; :data:`EXIT_ENVIRONMENT` if a module is missing;
    otherwise 1, with the traceback. In a single process, the exception is raised as by any function; if it is not
    caught, the process ends with the same codes.

    Args:
        timeout: maximum seconds to wait for other ranks.
    """
    if function is None:
        return functools.partial(distributed, timeout=timeout)

    @functools.wraps(function)
    def main(*args: Any, **kwargs: Any) -> Any:
        config = args[0] if args else kwargs.get("config")
        options = {name: getattr(config, name, 0) for name in ("expect_world_size", "rank_offset", "world_size")}
        try:
            rank = Rank(find_place(os.environ, **options), timeout, getattr(config, "device", "auto"))
        except ConfigError as error:
            Life().ended(2, f"error: {error}")
            _end_if_uncaught(error, 2)
            raise
        if rank.launched:
            forgive()
        quiet_torch()
        with log_as(rank), rank.signals, _watched(rank, getattr(config, "hang_timeout", 0.0)):
            try:
                result = function(rank, *args, **kwargs)
                rank.close()
                _say_ended(rank, 0)
            except BaseException as error:
                _end(rank, error)
                raise
        return result

    return main


def _watched(rank: Rank, timeout: float) -> Watchdog:
    """The watchdog of this process; only processes that a launcher started are ended when stuck, not notebooks."""
    if not rank.launched:
        timeout = 0.0
    else:
        show_stacks_on_request()
    return Watchdog(timeout, Progress(rank).made, rank.life, lambda: rank.on_hang())


@contextlib.contextmanager
def log_as(rank: Rank) -> Iterator[None]:
    """Context in which the package logs to stderr, with the rank in each line if a launcher started the process."""
    logger = logging.getLogger("pipeline")
    handler = logging.StreamHandler(sys.stderr)
    prefix = f"[{rank!r}] " if rank.launched else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix.replace('%', '%%')}%(message)s", "%H:%M:%S"))
    before = logger.level, logger.propagate
    logger.setLevel(_level())
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


def _level() -> int:
    name = os.environ.get("LATENTMILL_LOG", "INFO").upper()
    levels = logging.getLevelNamesMapping()
    if name not in levels:
        raise ConfigError(f"LATENTMILL_LOG={name}: expected one of {', '.join(levels)}")
    return levels[name]


def _end(rank: Rank, error: BaseException) -> None:
    """Log the error, report it to the other ranks, and end this process if a launcher started it; otherwise return."""
    code, message = _verdict(rank, error)
    if not rank.launched:
        rank.close()
        _end_if_uncaught(error, code)
        return
    if message:
        plain = isinstance(error, SystemExit | ExpectedError)
        trace = error if code in (1, EXIT_ENVIRONMENT) and not plain else None
        rank.log.log(logging.INFO if code == EXIT_STOPPED else logging.ERROR, message, exc_info=trace)
    if code in (0, EXIT_STOPPED):
        rank.close(STOPPED if code else FINISHED)
    else:
        rank.abort(message or f"exit code {code}")
    _say_ended(rank, code, "" if code == EXIT_STOPPED else message)
    hard_exit(code)


def _say_ended(rank: Rank, code: int, reason: str = "") -> None:
    rank.life.ended(code, reason, rank.steps, time.monotonic() - rank.begin - rank.waited)


def _verdict(rank: Rank, error: BaseException) -> tuple[int, str]:
    """The exit code for an error, and the message to log."""
    if isinstance(error, Stopped):
        return EXIT_STOPPED, str(error)
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return error.code or 0, ""
        return 1, str(error.code)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, ConfigError):
        return 2, f"error: {error}"
    refused = _refused(error)
    if isinstance(error, ExpectedError) and not refused:
        return 1, f"error: {error}"
    if isinstance(error, Exception) and (peer := rank.failed_peer()):
        return EXIT_PEER, f"{peer}; this rank ends as well"
    if isinstance(error, PeerFailed):
        return EXIT_PEER, str(error)
    if isinstance(error, ImportError):
        return EXIT_ENVIRONMENT, missing(error)
    if refused:
        return EXIT_STORAGE, f"error: {error if str(refused) in str(error) else f'{error}: {refused}'}"
    return 1, f"{type(error).__name__}: {error}"


def _refused(error: BaseException | None) -> OSError | None:
    """The OSError by which a file system refused to be written, if it caused ``error``; otherwise None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _REFUSED:
            return error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def _end_if_uncaught(error: BaseException, code: int) -> None:
    """End this process with ``code`` if nothing catches ``error``, as a test or a notebook may.

    Python then calls ``sys.excepthook``, and would wait for running threads afterwards.
    """
    previous = sys.excepthook

    def end(kind: type[BaseException], raised: BaseException, trace: TracebackType | None) -> None:
        if raised is not error:
            previous(kind, raised, trace)
            return
        if isinstance(error, ConfigError | ExpectedError):
            print(f"error: {error}", file=sys.stderr)
        elif isinstance(error, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
        else:
            previous(kind, raised, trace)
        hard_exit(code)

    sys.excepthook = end
