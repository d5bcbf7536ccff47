"""Renders the status table on a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from launch.monitor.ranks import BAD, RankStatus
from launch.monitor.watch import ACTIVE, Snapshot, StageStatus
from pipeline.telemetry.units import duration, size

_COLOURS = {"finished": "green", "running": "cyan", "pending": "yellow", "slow": "yellow", "stuck": "yellow"}
_REASONS = 4
_PROBLEMS = 12
_HOSTS = 5
_FOLDED = 24  # minimum width of a column whose text may be wrapped
_STAGE_COLUMNS = ("memory", "MB/s in/out", "idle", "GPU", "loss", "dropped", "samples/s", "done", "ETA", "samples")
_RANK_COLUMNS = ("memory", "MB/s in/out", "job", "GPU", "idle", "samples/s", "at", "host", "samples", "heartbeat")


def render(snapshot: Snapshot, rows: int) -> RenderableType:
    """A table of all stages, and one with at most ``rows`` ranks of each stage that is active or ended badly."""
    parts: list[RenderableType] = [
        Text.assemble(
            (snapshot.root, "bold"), f"   {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(snapshot.time))}"
        )
    ]
    if snapshot.slurm:
        parts.append(Text(snapshot.slurm, "yellow"))
    if snapshot.submission:
        parts.append(Text(snapshot.submission, "cyan"))
    if not snapshot.stages and not snapshot.jobs:
        parts.append(Text("nothing has been planned here yet, and no job is pending for it"))
    if snapshot.stages:
        parts.append(_stages(snapshot.stages))
        parts += [note for stage in snapshot.stages for note in _notes(stage)]
    for stage in snapshot.stages:
        if rows and stage.ranks and stage.state not in ("finished", "stopped"):
            parts += [Text(""), _ranks(stage, rows)]
    problems = [f"{stage.name}: {problem}" for stage in snapshot.stages for problem in stage.problems]
    problems += [f"{job.label} ({job.id}) pending: {job.why}" for job in snapshot.jobs if job.why]
    problems += [
        f"{job.label} ({job.id}) {job.state.lower()}, nothing planned yet" for job in snapshot.jobs if not job.why
    ]
    parts += [Text(f"! {problem}", "yellow") for problem in problems[:_PROBLEMS]]
    if len(problems) > _PROBLEMS:
        parts.append(Text(f"  and {len(problems) - _PROBLEMS} more (json=true has them all)", "yellow"))
    return Group(*parts)


def _stages(stages: list[StageStatus]) -> FittingTable:
    rows: list[dict[str, str | Text]] = [
        {
            "stage": stage.name,
            "state": _coloured(stage.state),
            "done": share(stage.done, stage.total),
            "": f"{stage.done}/{stage.total}{' steps' if stage.unit == 'steps' else ''}",
            "samples": str(stage.samples),
            "dropped": str(stage.dropped or ""),
            "failed": Text(str(stage.failed or ""), "red"),
            "samples/s": number(stage.rate),
            "MB/s in/out": megabytes(stage.read_rate, stage.write_rate),
            "ETA": "" if stage.eta is None else duration(stage.eta),
            "memory": size(stage.memory),
            "GPU": "" if stage.gpu is None else f"{stage.gpu:.0%}",
            "idle": "" if stage.idle is None else f"{stage.idle:.0%}",
            "loss": "" if stage.loss is None else f"{stage.loss:.4f}",
        }
        for stage in stages
    ]
    return FittingTable(rows, _STAGE_COLUMNS)


def _notes(stage: StageStatus) -> Iterator[Text]:
    """The states of the stage's ranks, and why samples were dropped or failed."""
    if ranks := ranks_of(stage):
        yield Text(f"{stage.name}: ranks {ranks}")
    if stage.reasons:
        most = sorted(stage.reasons.items(), key=lambda reason: -reason[1])[:_REASONS]
        said = ", ".join(f"{count} {name.replace(':', ': ')}" for name, count in most)
        more = len(stage.reasons) - len(most)
        yield Text(f"{stage.name}: {said}{f', and {more} more reasons' if more else ''}")

    if stage.efficiency and stage.state not in ACTIVE:
        yield Text(f"{stage.name}: {stage.efficiency.told()}", "dim")
    for host in stage.hosts[:_HOSTS]:
        said = f"{stage.name}: {host.host}: {host.kept} of {host.asked} kept ({host.kept / max(1, host.asked):.1%})"
        yield Text(f"{said}{'; ' if host.reasons else ''}{host.reasons}", "dim")
    if len(stage.hosts) > _HOSTS:
        yield Text(f"{stage.name}: and {len(stage.hosts) - _HOSTS} more hosts (json=true)", "dim")


def _ranks(stage: StageStatus, rows: int) -> FittingTable:
    shown = f": {rows} of {len(stage.ranks)} ranks; ranks=1000 shows more" if len(stage.ranks) > rows else ""
    return FittingTable(
        [
            {
                "rank": str(rank.rank),
                "state": _coloured(rank.state),
                "host": rank.host,
                "job": f"{rank.job}{f' life {rank.life}' if rank.life else ''}",
                "at": str(rank.at) if rank.at >= 0 else "",
                "partitions": f"{rank.partitions}/{own_share(stage, rank)}" if stage.unit == "partitions" else "",
                "samples": str(rank.samples),
                "failed": Text(str(rank.failed or ""), "red"),
                "samples/s": number(rank.rate),
                "MB/s in/out": megabytes(rank.read_rate, rank.write_rate),
                "heartbeat": duration(rank.heartbeat) if rank.live or rank.state in BAD else "",
                "memory": size(rank.memory),
                "GPU": "" if rank.gpu is None else f"{rank.gpu:.0%} {size(rank.gpu_memory or 0)}",
                "idle": f"{rank.idle:.0%}" if rank.live else "",
            }
            for rank in foremost(stage.ranks, rows)
        ],
        _RANK_COLUMNS,
        f"{stage.name}{shown}",
    )


def foremost(ranks: list[RankStatus], rows: int) -> list[RankStatus]:
    """The ``rows`` most important ranks, preferring those with problems, ordered by number."""
    by_need = sorted(ranks, key=lambda r: (BAD.index(r.state) if r.state in BAD else len(BAD), not r.live, r.rank))
    return sorted(by_need[:rows], key=lambda rank: rank.rank)


def own_share(stage: StageStatus, rank: RankStatus) -> int:
    """Number of partitions assigned to this rank; it does more if others are late."""
    world = max(1, stage.world_size)
    return stage.total * (rank.rank + 1) // world - stage.total * rank.rank // world


def ranks_of(stage: StageStatus) -> str:
    """States of a stage's ranks as text: ``64: 60 running, 4 silent``."""
    if not stage.states or stage.state == "finished":
        return ""
    said = ", ".join(f"{count} {state}" for state, count in stage.states.items())
    missing = stage.world_size - len(stage.ranks)
    if missing > 0 and stage.state in ACTIVE:
        said += f", {missing} not started"
    return f"{stage.world_size}: {said}"


def share(done: int, total: int) -> str:
    """Percentage as text; never 100 before everything is done."""
    if not total:
        return ""
    return "100%" if done >= total else f"{min(99.9, 100 * done / total):.1f}%"


def number(value: float) -> str:
    return "" if value <= 0 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def megabytes(read: float, written: float) -> str:
    return f"{read / 1e6:.1f}/{written / 1e6:.1f}" if read or written else ""


class FittingTable:
    """A table without empty columns; if it is too wide, the least important columns are omitted.

    Args:
        rows: Column → text.
        least: Columns that may be omitted, the least important first.
        folded: Column whose text may be wrapped.
    """

    def __init__(
        self, rows: Sequence[Mapping[str, str | Text]], least: Sequence[str], title: str = "", folded: str = ""
    ) -> None:
        self._rows, self._least, self._title, self._folded = rows, least, title, folded

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        names = [name for name in self._rows[0] if any(row[name] for row in self._rows)]
        widths = {name: max(len(name), *(cell_len(str(row[name])) for row in self._rows)) for name in names}
        if self._folded in widths:
            widths[self._folded] = min(widths[self._folded], _FOLDED)
        left_out = []
        for name in self._least:
            if sum(widths[n] + 2 for n in names) - 2 <= options.max_width:
                break
            if name in names:
                names.remove(name)
                left_out.append(name)
        table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False, title_style="bold")
        for place, name in enumerate(names):
            left, folded = place < 2 or name == self._folded, place == 0 or name == self._folded
            if self._folded:
                left, folded = place == 0 or name == self._folded, name == self._folded
            table.add_column(name, justify="left" if left else "right", no_wrap=not folded, overflow="fold")
        for row in self._rows:
            table.add_row(*(row[name] for name in names))
        if self._title:
            yield Text(self._title, "bold")
        yield table
        if left_out:
            yield Text(f"a wider terminal also shows {', '.join(reversed(left_out))}", "dim")


def _coloured(state: str) -> Text:
    return Text(state, _COLOURS.get(state, "red" if state in (*BAD, "unreadable") else ""))
