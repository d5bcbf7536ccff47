"""Planning: adopts an existing plan, makes one, or adds a generation to a finished dataset."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

from pipeline import stores
from pipeline.config import cli
from pipeline.config.options import condition_of, holds
from pipeline.config.schema import ConfigError, default_of
from pipeline.partitions.attempt import unless_removed
from pipeline.partitions.claims import Claims
from pipeline.partitions.dataset import Dataset, SlotReader
from pipeline.partitions.finalize import Incomplete, records
from pipeline.partitions.plan import (
    RELEASE,
    TAKEDOWN,
    Input,
    Partition,
    commit_plan,
    folder_name,
    inputs_digest,
    spans,
)
from pipeline.partitions.stage import AnyStage
from pipeline.storage import GONE, Folder, StorageError, probe

_POLL = 0.2
_HEAD_START = 3.0
"""Seconds in which only rank 0 may begin to plan, so that ranks that start together do not compete."""
_LOOK = 5.0
"""Maximum seconds between two checks of whether the planning rank is still alive."""
_CURE = "choose another output= or variant=, or overwrite=true"
_OURS = ("plan", "data", "claims", "events", "packed", "partial", "tables")


class Stale(ConfigError):
    """The existing output was made with other settings, inputs or code than those of this run."""


def open_or_plan(stage: AnyStage) -> Dataset:
    """The dataset to work on, with a plan that matches the stage's settings and all requested generations.

    Rank 0 makes the plan; another rank does so if rank 0 has not begun after a few seconds, or has shown no sign of
    life for a lease while planning.

    Raises:
        Unfinished: the upstream is not complete.
        Stale: the existing plan was made with other settings, inputs or code.
        ConfigError, StorageError: the output cannot be used.
    """
    upstream = _upstream_state(stage)
    while True:
        root = _open_root(stage)
        with unless_removed(root):
            ours = not _planned(root) and _make_first_plan(stage, root, upstream)
            dataset = Dataset(root)
            if not stage.config.overwrite or dataset.header["run_id"] == stage.config.run_id:
                return _extended(stage, dataset, upstream, ours)


def _extended(stage: AnyStage, dataset: Dataset, upstream: dict[str, Any] | None, ours: bool) -> Dataset:
    """``dataset`` with the requested generation, or with one for what the upstream has gained; Stale if it differs.

    ``ours``: this process has just made the plan, from the current inputs.
    """
    require_same(dataset, stage)
    if stage.rank.is_main:
        _check_watched(stage, dataset)
    try:
        append = _check_upstream(stage, dataset, upstream)
    except Stale:  # rank 0 may have planned from a newer state of the upstream: open it again
        stage.forget_upstream()
        upstream = _upstream_state(stage)
        append = _check_upstream(stage, dataset, upstream)
    if stage.rank.is_main:
        reads = not dataset.released or stage.config.retry_failed or stage.config.restore
        if stage.rechecks and reads and not ours:
            _recheck(stage, dataset)
        if append:
            _append(stage, dataset, upstream)
        elif stage.config.retry_failed:
            _retry(stage, dataset)
        elif stage.config.restore:
            _restore(stage, dataset)
    elif append or stage.config.retry_failed or (stage.config.restore and dataset.released):
        _await_generation(stage, dataset)
    return Dataset(dataset.root)


def _planned(root: Folder) -> bool:
    return root.exists("plan")


# ---- the output folder


def _open_root(stage: AnyStage) -> Folder:
    """Open the output folder, created if needed; with ``overwrite``, an existing one is moved aside once per run."""
    output = stage.output
    if stores.is_url(output):
        return _open_in_store(stage)
    if stage.config.overwrite:
        if stage.rank.is_main:
            _move_aside(stage, output)
        elif not stage.config.run_id:
            raise ConfigError("overwrite=true on several ranks needs run_id=<one text, the same on all ranks>")
        else:
            return _await_own_plan(stage, output)
    try:
        root = Folder.open(output, create=True)
    except OSError as error:
        raise StorageError(f"output {output} cannot be made: {error.strerror}") from error
    with unless_removed(root):
        _check_foreign(root)
    return root


def _check_foreign(root: Folder) -> None:
    foreign = [name for name in root.listdir() if name not in _OURS and not name.startswith(".")]
    if foreign and not _planned(root):
        raise ConfigError(
            f"output {root.path} is not empty ({foreign[0]} ...) and no dataset directory: choose another"
        )


def _open_in_store(stage: AnyStage) -> Folder:
    """Open an output in an object store."""
    place = stores.canonical(stage.output)
    if stores.is_hub(place):
        raise ConfigError(
            f"output={place}: the Hub is only read here: choose a local output=, and stage=publish to={place}"
        )
    if not stage.writes_to_stores:
        raise ConfigError(
            f"output={place}: stage={stage.name} needs a local folder; stage=publish to={place} copies it there"
        )
    for name in ("overwrite", "compact"):
        if getattr(stage.config, name):
            raise ConfigError(f"{name}=true does not work with an output in an object store: choose another output=")
    root = stores.open_output(place)
    _check_foreign(root)
    return root


def _move_aside(stage: AnyStage, output: Path) -> None:
    """Move aside and delete the output of an earlier run, unless it belongs to an earlier life of this same run."""
    header = _header_at(output)
    if header is None or _is_ours(stage, header):
        return
    stage.rank.log.info("overwrite=true: moving the old %s aside", output)
    aside = f".{output.name}.{uuid.uuid4().hex}"
    try:
        with Folder.open(output.parent) as parent:
            parent.rename(output.name, aside)
            moved = _header_at(output.parent / aside) or {}
            if moved.get("id") == header.get("id"):
                parent.trash(aside)
                return
            # in the meantime, another life of this run replaced the output: what was just moved aside is its new one
            parent.rename(aside, output.name)
    except OSError as error:
        if error.errno not in GONE:
            raise StorageError(f"output {output} cannot be moved aside: {error.strerror}") from error


def _header_at(output: Path) -> dict[str, Any] | None:
    """plan.json at ``output``; empty if it is damaged, None if there is no plan."""
    try:
        with Folder.open(output) as root:
            return root.read_json("plan/plan.json") or {} if _planned(root) else None
    except StorageError:
        return {}
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_ours(stage: AnyStage, header: dict[str, Any]) -> bool:
    return bool(stage.config.run_id) and header.get("run_id") == stage.config.run_id


def _await_own_plan(stage: AnyStage, output: Path) -> Folder:
    """On ranks other than 0 with ``overwrite``: wait for the plan of this run, not that of the run it replaces."""
    while True:
        try:
            root = Folder.open(output)
            header = root.read_json("plan/plan.json") or {}
            if header.get("run_id") == stage.config.run_id:
                return root
        except FileNotFoundError:
            pass
        _pause(stage)


def _pause(stage: AnyStage) -> None:
    stage.rank.check_stop()
    time.sleep(_POLL)


# ---- the first plan


def _make_first_plan(stage: AnyStage, root: Folder, upstream: dict[str, Any] | None) -> bool:
    """Make the plan, or wait until another rank has; returns whether this process made it."""
    try:
        claims = Claims(root, stage.config.lease)
    except OSError as error:
        raise StorageError(f"output {root.path} cannot be written: {error.strerror}") from error
    try:
        lease = stage.config.lease
        again = time.monotonic() + (0.0 if stage.rank.is_main else min(_HEAD_START, lease))
        while not _planned(root):
            if time.monotonic() < again:
                _pause(stage)
            elif claims.take("plan"):
                try:
                    if _plan(stage, root, upstream):
                        return True
                finally:
                    claims.release("plan")
            else:  # another rank plans: a thousand ranks that poll its claim would slow it down
                again = time.monotonic() + min(_LOOK, lease / 6)
        return False
    finally:
        claims.close()


def _plan(stage: AnyStage, root: Folder, upstream: dict[str, Any] | None) -> bool:
    stage.rank.log.info("%s: planning", root.path)
    try:
        probe(root)
        if stage.reads_upstream:
            stage.upstream.require_data()
        partitions = _partitions(stage)
        first = next(partitions, None)
        if first is None:
            told = "; ".join(stage.left_out().told())
            said = f"; left out: {told}" if told else ""
            raise ConfigError(f"stage {stage.name}: there is nothing to do: the input has no samples{said}")
        header = {**_header(stage, upstream), "generation": 0, "first": 0, "kind": "plan"}
        left_out = header["left_out"] = stage.left_out()  # complete once the last partition has been planned
        won = commit_plan(root, header, chain([first], partitions))
        for line in left_out.told():
            stage.rank.log.warning("left out of the plan: %s", line)
        return won
    except OSError as error:
        raise StorageError(f"output {root.path}: the plan cannot be made: {error}") from error


def _partitions(stage: AnyStage, since: int = 0) -> Iterator[Partition]:
    """The stage's planned partitions, with a check for signals: listing millions of files may take a while."""
    for partition in stage.partitions(since):
        stage.rank.check_stop()
        yield partition


def _header(stage: AnyStage, upstream: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "stage_version": stage.version_with(stage.config),
        "config": {**cli.to_json(stage.config), "input": stage.input, "output": str(stage.output)},
        "identity": stage.identity(),
        "upstream": upstream,
        "schema": stage.schema(),
        "format": stage.format,
        "origin": stage.origin(),
        "extra": stage.extra(),
        "watched": stage.watched(),
        "model_files": stage.model_files(),
        "run_id": stage.config.run_id,
    }


def _upstream_state(stage: AnyStage) -> dict[str, Any] | None:
    """What the plan stores about the upstream; None if the stage reads no upstream."""
    if not stage.reads_upstream:
        return None
    success = stage.upstream.require_success()
    return {
        "path": str(stage.upstream.root.path),
        "stage": success["stage"],
        "content_digest": success["content_digest"],
        "partitions": success["partitions"],
        "kept": success["counts"]["kept"] + success["counts"].get("taken", 0),
    }


# ---- checks of an existing plan


def require_same(dataset: Dataset, stage: AnyStage) -> None:
    """Raise Stale, naming the first difference between the existing output and the one that ``stage`` would make.

    A setting that has no effect together with the others makes no difference.
    """
    header = dataset.header
    place = dataset.root.path
    if header["stage"] != stage.name:
        raise Stale(f"{place} is the output of stage {header['stage']}, not {stage.name}: {_CURE}")
    version = stage.version_with(stage.config)
    if header["stage_version"] != version:
        raise Stale(
            f"{place} was made by version {header['stage_version']} of stage {stage.name}, this is {version}: {_CURE}"
        )
    cls = type(stage.config)
    options = {field.name: field for field in dataclasses.fields(cls)}
    settings = {name: getattr(stage.config, name) for name in options}
    for name, value in stage.identity().items():
        was = header["identity"].get(name, default_of(cls, name))
        condition = condition_of(cls, options[name]) if name in options else ""
        if was != value and holds(condition, settings):
            raise Stale(f"{place} was made with {name}={_shown(was)}, now {name}={_shown(value)} is requested: {_CURE}")


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")


def _check_upstream(stage: AnyStage, dataset: Dataset, upstream: dict[str, Any] | None) -> bool:
    """Whether the upstream has gained generations since the last plan; raises Stale if it has changed otherwise."""
    if upstream is None:
        return False
    known = last_upstream(dataset)
    assert known is not None
    if known["content_digest"] == upstream["content_digest"]:
        return False
    for generation in (stage.upstream.success or {})["generations"]:
        if generation["partitions"] == known["partitions"] and generation["content_digest"] == known["content_digest"]:
            return True
    if known["content_digest"] in replaced_digests(stage.upstream):
        raise Stale(
            f"samples of {upstream['path']} were taken down, but not yet those of {dataset.root.path}: "
            "run stage=takedown again with the same takedown= on the whole dataset"
        )
    raise Stale(
        f"{dataset.root.path} was made from different content of {upstream['path']} (its content_digest changed): "
        f"{_CURE}"
    )


def last_upstream(dataset: Dataset) -> dict[str, Any] | None:
    """What the newest plan that has an upstream stores about it; None if there is no such plan."""
    return next((p.header["upstream"] for p in reversed(dataset.plans) if p.header.get("upstream")), None)


def _recheck(stage: AnyStage, dataset: Dataset) -> None:
    """Plan again and compare; raises Stale if the inputs differ from those of the first plan, which all later
    generations use."""
    if dataset.header["config"].get("mirror", "") != getattr(stage.config, "mirror", ""):
        return  # the same files from another server
    if inputs_digest(_partitions(stage)) == dataset.header["inputs_digest"]:
        return
    if "watched" not in dataset.header and not any(map(stage.changed, _planned_inputs(dataset))):
        return  # planned by an earlier version, which chose files by other rules: the files it chose are unchanged
    if _only_as_expected(stage, dataset):
        return
    difference = first_difference(_planned_inputs(dataset), _inputs_now(stage))
    raise Stale(f"{dataset.root.path}: the input has changed since it was planned ({difference}): {_CURE}")


def _planned_inputs(dataset: Dataset) -> Iterator[Input]:
    return (file for index in range(dataset.planned_by(0).stop) for file in dataset.partition(index).inputs)


def _inputs_now(stage: AnyStage) -> Iterator[Input]:
    return (file for partition in _partitions(stage) for file in partition.inputs)


def _only_as_expected(stage: AnyStage, dataset: Dataset) -> bool:
    """Whether only inputs of taken-down samples were removed and only inputs that a retry reads were added."""
    retry = stage.config.retry_failed or any(plan.header["kind"] == "retry" for plan in dataset.plans)
    may_be_added = retry and stage.retries_added
    if not may_be_added and not dataset.taken:
        return False
    before, now = (
        {(file.path, file.start, file.stop): file for file in files}
        for files in (_planned_inputs(dataset), _inputs_now(stage))
    )
    if any(now.get(place, file) != file for place, file in before.items()):
        return False
    return len(before.keys() - now.keys()) <= len(dataset.taken) and (may_be_added or now.keys() <= before.keys())


_WINDOW = 10_000  # inputs to look ahead, to tell whether an input was added or removed


def first_difference(planned: Iterator[Input], now: Iterator[Input]) -> str:
    """The first difference between the planned and the current inputs, as text for a message."""
    for before, after in zip_longest(planned, now):
        if before == after:
            continue
        if before is None or after is None:
            return f"{after.path} was added" if before is None else f"{before.path} was removed"
        if before.path != after.path:
            if before.path in (file.path for file in islice(now, _WINDOW)):
                return f"{after.path} was added"
            return f"{before.path} was removed"
        same = before.mtime_ns >= 0 and (before.size, before.mtime_ns) == (after.size, after.mtime_ns)
        return f"{after.path}{', or what lies next to it,' if same else ''} was modified"
    return "files were added, removed or modified"


def _check_watched(stage: AnyStage, dataset: Dataset) -> None:
    """Raises Stale if a file that the output depends on has changed since it was planned.

    Plans of earlier versions do not list these files, and are not checked.
    """
    for kind, state in (("watched", stage.watched), ("model_files", stage.model_files)):
        before: dict[str, str] | None = dataset.header.get(kind)
        if before is None:
            continue
        now = state()
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                what = "was added" if name not in before else "was removed" if not now.get(name) else "was modified"
                raise Stale(f"{dataset.root.path}: {name} {what} since it was planned: {_CURE}")


# ---- further generations


def _append(stage: AnyStage, dataset: Dataset, upstream: dict[str, Any] | None) -> None:
    """Add a generation for what the upstream has gained."""
    since = (last_upstream(dataset) or {})["partitions"]
    _add(stage, dataset, "append", upstream, lambda: _partitions(stage, since))


def _retry(stage: AnyStage, dataset: Dataset) -> None:
    """Add a generation that tries the retryable failures again; once per run, and only to a finished dataset."""
    newest = dataset.plans[-1].header
    if newest["kind"] == "retry" and stage.config.run_id and newest["run_id"] == stage.config.run_id:
        return
    try:
        partitions = retries(dataset)
    except Incomplete:
        stage.rank.log.info(
            "%s is not finished: finishing it first, then run retry_failed=true again", dataset.root.path
        )
        return
    if not partitions:
        stage.rank.log.info("%s: no retryable failures", dataset.root.path)
        dataset.root.append(_nothing_to_add(stage), b"")
        return
    _add(stage, dataset, "retry", last_upstream(dataset), lambda: partitions)


def _restore(stage: AnyStage, dataset: Dataset) -> None:
    """Add a generation that restores data that were removed on purpose."""
    if dataset.success is None:
        stage.rank.log.info("%s is not finished: finishing it first, then run restore=true again", dataset.root.path)
    elif dataset.released:
        commit_repair(dataset, dataset.released, str(dataset.success["content_digest"]))


def _add(
    stage: AnyStage,
    dataset: Dataset,
    kind: str,
    upstream: dict[str, Any] | None,
    partitions: Callable[[], Iterable[Partition]],
) -> None:
    header = {**_header(stage, upstream), "first": dataset.partitions, "kind": kind}
    if not _commit_generation(dataset, header, partitions):
        stage.rank.log.info("%s: another run added generation %d", dataset.root.path, len(dataset.plans))


def _commit_generation(dataset: Dataset, header: dict[str, Any], partitions: Callable[[], Iterable[Partition]]) -> bool:
    """Add the next generation to ``dataset``; False if another process has added one with the same number."""
    generation = len(dataset.plans)
    while not commit_plan(dataset.root, {**header, "generation": generation}, partitions()):
        if dataset.root.exists(folder_name(generation)):
            return False
    return True


def retries(dataset: Dataset) -> list[Partition]:
    """New partitions for the inputs whose newest outcome is a retryable failure, one per affected partition.

    A failed archive is read again as a whole; in other partitions, only the failed keys.

    Raises:
        Incomplete: not all partitions are committed.
    """
    keys_redone: dict[tuple[Input, ...], set[str]] = defaultdict(lambda: set(dataset.taken))
    archives_redone: set[tuple[Input, ...]] = set()
    found: list[Partition] = []
    concerned = [
        index
        for index, record in enumerate(records(dataset))
        if record["counts"].get("retryable") or _is_retry(dataset, index)
    ]
    for index in reversed(concerned):  # newest first
        partition = dataset.partition(index)
        inputs = partition.inputs  # a retry has the same inputs as the original partition
        keys, archive = _failed_keys(dataset, index)
        keys -= keys_redone[inputs]
        if archive and inputs not in archives_redone:
            found.append(Partition(inputs))
        elif keys:
            found.append(Partition(inputs, len(keys), frozenset(keys), len(keys)))
        keys_redone[inputs] |= keys | (partition.only or frozenset())
        if partition.only is None:
            archives_redone.add(inputs)
    return found[::-1]


def _is_retry(dataset: Dataset, index: int) -> bool:
    return bool(dataset.planned_by(index).header["kind"] == "retry")


def _failed_keys(dataset: Dataset, index: int) -> tuple[set[str], bool]:
    """Keys with a retryable failure in partition ``index``, and whether a container in it has one."""
    table = SlotReader(dataset, index).ledger(["key", "container", "outcome", "retryable"]).to_pylist()
    failed = [row for row in table if row["outcome"] == "failed" and row["retryable"]]
    return {row["key"] for row in failed if not row["container"]}, any(row["container"] for row in failed)


def _await_generation(stage: AnyStage, dataset: Dataset) -> None:
    """On ranks other than 0: wait until rank 0 has added the generation or found that there is nothing to add."""
    if dataset.success is None or (len(dataset.plans) > 1 and _is_ours(stage, dataset.plans[-1].header)):
        return
    stage.rank.log.info("%s: waiting up to lease=%g s for rank 0 to plan", dataset.root.path, stage.config.lease)
    begin = time.monotonic()
    while time.monotonic() - begin < stage.config.lease:
        if stage.config.run_id and dataset.root.exists(_nothing_to_add(stage)):
            return
        if dataset.root.exists(folder_name(len(dataset.plans))):
            return
        _pause(stage)


def _nothing_to_add(stage: AnyStage) -> str:
    return f"claims/nothing-to-add.{stage.config.run_id}"


def replaced_digests(dataset: Dataset) -> set[str]:
    """Content digests that ``dataset`` had before samples were taken down from it."""
    return {str(plan.header["replaces"]) for plan in dataset.plans if plan.header["kind"] == TAKEDOWN}


def commit_takedown(
    dataset: Dataset,
    taken: dict[str, tuple[int, str]],
    requests: dict[str, list[str]],
    upstream: Dataset | None,
) -> bool:
    """Add a generation that rewrites partitions without some samples; False if another generation was added first.

    Args:
        taken: key → the partition with its newest row, and the reason that this row will have.
        requests: hash of each line of the list that named samples by something other than the key → their keys.
        upstream: the dataset that ``dataset`` was made from, from which these samples were already removed.
    """
    last = last_upstream(dataset)
    if last is not None and upstream is not None:
        last = {**last, "content_digest": upstream.require_success()["content_digest"]}
    header = {
        **_again(dataset),
        "upstream": last,
        "kind": TAKEDOWN,
        "redo": spans(index for index, _ in taken.values()),
        "taken": taken,
        "requests": requests,
        "replaces": dataset.require_success()["content_digest"],
    }
    return _commit_generation(dataset, header, list)


def _again(dataset: Dataset) -> dict[str, Any]:
    """Common header fields of a generation that adds no partitions."""
    same = {name: value for name, value in dataset.header.items() if name not in ("id", "format_version")}
    return {**same, "first": dataset.partitions}


def commit_repair(dataset: Dataset, redo: Iterable[int], content_digest: str) -> bool:
    """Add a generation that makes the partitions ``redo`` again, in new folders that replace the old ones.

    ``content_digest`` is the expected digest of the result (empty: unknown). False if another run was first.
    """
    header = {
        **_again(dataset),
        "upstream": last_upstream(dataset),
        "kind": "repair",
        "redo": spans(redo),
        "mends": content_digest,
    }
    return _commit_generation(dataset, header, list)


def commit_release(dataset: Dataset) -> bool:
    """Add a generation that keeps only the ledgers and records of all partitions; False if another was first."""
    redo = set(range(dataset.partitions)) - dataset.released
    header = {**_again(dataset), "upstream": last_upstream(dataset), "kind": RELEASE, "redo": spans(redo)}
    return _commit_generation(dataset, header, list)
