"""Show progress and problems: ``python launch/status.py <data_dir | output | run> key=value ...``.

python launch/status.py /data                       # a table of all stages and ranks, live on a terminal
python launch/status.py /data/mine logs=failed      # the end of the logs of the ranks that failed
python launch/status.py /data html=status.html      # a page with plots that refreshes itself
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.config.interpreter import ensure

if __name__ == "__main__":
    ensure(sys.path[0])

from launch.monitor.watch import Snapshot, Watch
from pipeline.config import cli
from pipeline.config.schema import ConfigError, StatusConfig


def main(argv: list[str]) -> int:
    with cli.errors_as_one_line():
        if cli.wants_help(argv):
            print(cli.help_text(StatusConfig, f"{cli.program('status')} <folder>"))
            return 0
        config = read(argv)
        watch = Watch(config.path, past=bool(config.html), only=config.stage)
        show = _logs if config.logs else _json if config.json else _publish if config.html or config.port else _table
        try:
            show(config, watch)
        except (KeyboardInterrupt, BrokenPipeError):
            sys.stderr.close()  # otherwise Python reports the broken pipe again at exit
    return 0


def read(argv: list[str]) -> StatusConfig:
    """The settings; the folder may be given without its key.

    Raises:
        ConfigError: a key or value is invalid.
    """
    bare = [word for word in argv[:1] if "=" not in word and not word.startswith("-")]
    settings: dict[str, str] = cli.parse(argv[len(bare) :])
    if bare:
        if "path" in settings:
            raise ConfigError("path is given more than once")
        settings["path"] = bare[0]
    return cli.build_given(StatusConfig, {}, settings)


def _follows(config: StatusConfig, default: bool) -> bool:
    return config.follow == "true" or (config.follow == "auto" and default)


def _looks(config: StatusConfig, watch: Watch, follow: bool) -> Iterator[Snapshot]:
    while True:
        snapshot = watch.look()
        yield snapshot
        if snapshot.over or not follow:
            return
        time.sleep(config.every)


def _table(config: StatusConfig, watch: Watch) -> None:
    from rich.console import Console
    from rich.live import Live

    from launch.monitor.status_table import render

    console = Console() if sys.stdout.isatty() else Console(width=180)
    if not _follows(config, console.is_terminal):
        console.print(render(watch.look(), config.ranks))
    elif not console.is_terminal:
        for snapshot in _looks(config, watch, True):
            console.print(render(snapshot, config.ranks), "")
    else:
        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
            for snapshot in _looks(config, watch, True):
                rows = max(3, min(config.ranks, console.height - 12 - 2 * len(snapshot.stages)))
                live.update(render(snapshot, min(rows, config.ranks)), refresh=True)


def _json(config: StatusConfig, watch: Watch) -> None:
    for snapshot in _looks(config, watch, _follows(config, False)):
        print(json.dumps(snapshot.as_dict()), flush=True)


def _publish(config: StatusConfig, watch: Watch) -> None:
    """Keep the page and the metrics for Prometheus up to date."""
    from launch.monitor.metrics import Server, text

    snapshot = watch.look()
    server = Server(config.host, config.port, lambda: text(snapshot)) if config.port else None
    if server:
        print(f"metrics: {server.address}", flush=True)
    going_on = _follows(config, True)
    told = False
    while True:
        going_on = going_on and (server is not None or not snapshot.over)
        if config.html:
            _write_page(config, watch, snapshot, config.every if going_on else 0)
            if not told:
                print(f"page: {Path(config.html).absolute()}", flush=True)
                told = True
        if not going_on:
            return
        time.sleep(config.every)
        snapshot = watch.look()


def _write_page(config: StatusConfig, watch: Watch, snapshot: Snapshot, every: float) -> None:
    from launch.monitor import page

    processes = {str(path): work.processes for path, work in watch.works.items()}
    try:
        page.write(Path(config.html), snapshot, processes, every)
    except OSError as error:
        raise ConfigError(f"html={config.html}: cannot be written: {error.strerror}") from None


def _logs(config: StatusConfig, watch: Watch) -> None:
    from launch.monitor.rank_logs import choose, collectives, show

    snapshot = watch.look()
    if config.logs in ("failed", "job") and (lines := collectives(snapshot)):
        print("==> collectives <==", *lines, "", sep="\n", flush=True)
    logs = choose(snapshot, config.logs)
    show(logs, config.lines, (lambda: not watch.look().over) if _follows(config, False) else None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
