"""Serves the numbers of the status table as metrics for Prometheus, in its text format, on a port.

The text format takes 15 lines here. prometheus_client is made for metrics that a program updates one by one; these are
all computed at once from events and records, and the launcher needs the package for nothing else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from launch.monitor.ranks import RankStatus
from launch.monitor.watch import Snapshot, StageStatus
from pipeline.config.schema import ConfigError

Sample = tuple[dict[str, str], float]

_STAGE: tuple[tuple[str, str, str, Callable[[StageStatus], float | None]], ...] = (
    ("done", "gauge", "Partitions committed, or steps made", lambda s: s.done),
    ("planned", "gauge", "Partitions planned, or steps asked for", lambda s: s.total),
    ("samples", "gauge", "Samples worked on", lambda s: s.samples),
    ("samples_kept", "gauge", "Samples kept", lambda s: s.kept),
    ("samples_per_second", "gauge", "Speed of all ranks together", lambda s: s.rate),
    ("read_bytes_per_second", "gauge", "Bytes read by all ranks", lambda s: s.read_rate),
    ("written_bytes_per_second", "gauge", "Bytes written by all ranks", lambda s: s.write_rate),
    ("eta_seconds", "gauge", "Time until it is done", lambda s: s.eta),
    ("memory_bytes", "gauge", "Resident memory of all ranks", lambda s: s.memory),
    ("gpu_use", "gauge", "Mean use of GPUs, 0 to 1", lambda s: s.gpu),
    ("idle", "gauge", "Mean share of time spent waiting, 0 to 1", lambda s: s.idle),
    ("loss", "gauge", "Training loss", lambda s: s.loss),
    ("finished", "gauge", "1 if finished", lambda s: float(s.state == "finished")),
)
_RANK: tuple[tuple[str, str, str, Callable[[RankStatus], float | None]], ...] = (
    ("samples_per_second", "gauge", "Speed", lambda r: r.rate),
    ("heartbeat_age_seconds", "gauge", "Time since the last sign of life", lambda r: r.heartbeat),
    ("memory_bytes", "gauge", "Resident memory", lambda r: r.memory),
    ("idle", "gauge", "Share of time spent waiting, 0 to 1", lambda r: r.idle),
    ("gpu_use", "gauge", "Use of its GPU, 0 to 1", lambda r: r.gpu),
)


def text(snapshot: Snapshot) -> str:
    """The metrics in Prometheus' text format, version 0.0.4."""
    return "".join(_lines(snapshot))


def _lines(snapshot: Snapshot) -> Iterator[str]:
    def of(stage: StageStatus, **more: str) -> dict[str, str]:
        return {"stage": stage.stage, "path": stage.path, **more}

    stages = snapshot.stages
    for name, kind, help_, value in _STAGE:
        yield from _family(f"stage_{name}", kind, help_, [(of(s), v) for s in stages if (v := value(s)) is not None])
    bad = [
        (of(s, outcome=name.partition(":")[0], reason=name.partition(":")[2]), float(count))
        for s in stages
        for name, count in s.reasons.items()
    ]
    yield from _family("stage_bad_samples", "gauge", "Samples dropped or failed, by reason", bad)
    states = [(of(s, state=state), float(count)) for s in stages for state, count in s.states.items()]
    yield from _family("stage_ranks", "gauge", "Ranks of the newest run, by state", states)
    live = [(s, r) for s in stages for r in s.ranks if r.live or s.state == "running"]
    for name, kind, help_, of_rank in _RANK:
        samples = [(of(s, rank=str(r.rank), host=r.host), v) for s, r in live if (v := of_rank(r)) is not None]
        yield from _family(f"rank_{name}", kind, help_, samples)


def _family(name: str, kind: str, help_: str, samples: list[Sample]) -> Iterator[str]:
    if not samples:
        return
    yield f"# HELP latentmill_{name} {help_}\n# TYPE latentmill_{name} {kind}\n"
    for labels, value in samples:
        said = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        yield (
            f"latentmill_{name}{{{said}}} {value:g}\n"
            if abs(value) < 1e6
            else (f"latentmill_{name}{{{said}}} {value:.0f}\n")
        )


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class Server:
    """Answers GET /metrics with the text that ``current`` returns, in a background thread.

    Raises:
        ConfigError: the port cannot be obtained.
    """

    def __init__(self, host: str, port: int, current: Callable[[], str]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path not in ("/metrics", "/"):
                    self.send_error(404)
                    return
                body = current().encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"port={port}: cannot listen at {host}: {error}") from None
        self.address = f"http://{host}:{self._server.server_address[1]}/metrics"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
