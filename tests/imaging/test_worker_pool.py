"""Workers: order is kept, work is bounded, and whatever kills or stops one costs the task that it was at, no other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.imaging import worker_pool
from pipeline.imaging.worker_pool import Lost, Pool, WorkerError, available_cpus, worker_count


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool("faulty:obey", workers=2, timeout=1, memory=2**30)
    yield pool
    pool.close()


def results(pool: Pool, tasks: list[bytes]) -> list[object]:
    found = list(pool.map(enumerate(tasks)))
    assert [token for token, _ in found] == list(range(len(tasks))), "in order, each once"
    return [result for _, result in found]


def plain(count: int) -> list[bytes]:
    return [f"task {number}".encode() for number in range(count)]


def test_results_come_in_order_from_any_number_of_workers() -> None:
    tasks = [b"sleep 0.05", *plain(100), bytes(3_000_000), *plain(10), b""]
    for count in (0, 1, 3):
        pool = Pool("faulty:obey", workers=count)
        assert results(pool, tasks) == [task[::-1] for task in tasks]
        assert len(pool.pids) == count
        pool.close()


def test_a_token_without_data_is_handed_through_in_its_place(pool: Pool) -> None:
    tasks = [("a", b"x"), ("b", None), ("c", b"y")]
    assert list(pool.map(tasks)) == [("a", b"x"), ("b", None), ("c", b"y")]


def test_crashes_and_hangs_cost_the_task_that_the_worker_was_at(pool: Pool) -> None:
    tasks = plain(40)
    tasks[5], tasks[6], tasks[20], tasks[30] = b"segfault", b"hang", b"abort", b"spin"
    found = results(pool, tasks)
    assert [(n, r.reason) for n, r in enumerate(found) if isinstance(r, Lost)] == [
        (5, "crash"),
        (6, "timeout"),
        (20, "crash"),
        (30, "timeout"),
    ]
    assert "SIGSEGV" in found[5].detail
    assert [r for r in found if not isinstance(r, Lost)] == [
        t[::-1] for n, t in enumerate(tasks) if n not in (5, 6, 20, 30)
    ]
    assert len(pool.pids) == 2, "who died was replaced"
    assert results(pool, plain(5)) == [task[::-1] for task in plain(5)]


def test_a_task_whose_worker_was_killed_from_outside_gets_a_second_try(pool: Pool, tmp_path: Path) -> None:
    task = b"killed-once " + str(tmp_path / "mark").encode()
    assert results(pool, [b"a", task, b"b"]) == [b"a", task[::-1], b"b"]


def test_memory_beyond_the_cap_is_refused_and_a_worker_that_grew_is_replaced(pool: Pool) -> None:
    assert results(pool, [b"gorge"]) == [b"refused"]
    one = Pool("faulty:obey", workers=1, memory=2**28)
    before = results(one, [b"pid"])
    assert results(one, [b"grow 1000", b"pid"])[1] == before[0]
    assert results(one, [b"grow 150000000"]) == [b"grow 150000000"[::-1]]
    assert results(one, [b"pid"]) != before
    one.close()


def test_what_is_under_way_is_bounded(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "_TASKS", 8)
    taken = 0

    def source() -> Iterator[tuple[int, bytes]]:
        nonlocal taken
        for number in range(200):
            taken += 1
            yield number, b"x"

    for number, _ in pool.map(source()):
        assert taken <= number + 1 + 2 * 8


def test_a_task_at_which_the_function_raises_is_lost(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    found = results(pool, [b"a", b"raise", b"b", b"raise"])
    lost = Lost("crash", "the worker failed with ValueError: a defect")
    assert found == [b"a", lost, b"b", lost]
    assert caplog.text.count("  | ValueError: a defect") == 1, "the first traceback is shown"


def test_a_function_that_raises_at_every_task_ends_the_rank(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "_DEFECTS", 3)
    with pytest.raises(WorkerError, match="ValueError: a defect"):
        results(pool, [b"raise"] * 5)


def test_a_worker_that_says_that_it_leaves_is_not_tried_for_ever(pool: Pool) -> None:
    found = results(pool, [b"a", b"leave", b"b"])
    assert found == [b"a", Lost("crash", "the worker ended with code 0"), b"b"]


def test_workers_that_do_not_start_end_the_rank() -> None:
    pool = Pool("faulty:no_such_function")
    with pytest.raises(WorkerError, match="do not start"):
        results(pool, [b"x"])
    pool.close()


def test_an_abandoned_map_leaves_nothing_to_the_next(pool: Pool) -> None:
    for _ in pool.map(enumerate(plain(50))):
        break
    assert results(pool, plain(20)) == [task[::-1] for task in plain(20)]


def test_the_wait_can_be_interrupted(pool: Pool) -> None:
    class StopNow(Exception):
        pass

    def tick() -> None:
        raise StopNow

    with pytest.raises(StopNow):
        list(pool.map([("a", b"hang")], tick))


def test_workers_end_with_their_rank_and_only_with_it(tmp_path: Path) -> None:
    script = (
        "from pipeline.imaging.worker_pool import Pool\n"
        "pool = Pool('faulty:obey', workers=2, timeout=600)\n"
        "for number, _ in pool.map(enumerate([b'x', b'hang', b'hang', b'y'])):\n"
        "    print(*pool.pids, flush=True)\n"
    )
    paths = os.pathsep.join(sys.path)
    rank = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}
    )
    assert rank.stdout is not None
    found = [psutil.Process(int(pid)) for pid in rank.stdout.readline().split()]
    for process in found:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            process.send_signal(number)
    rank.kill()
    rank.wait()
    rank.stdout.close()
    # those that hang see nothing of it until their alarm: end them as it would
    for process in found:
        assert process.is_running()
        process.send_signal(signal.SIGALRM)
    assert not psutil.wait_procs(found, timeout=60)[1]


def test_auto_is_what_this_rank_may_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(worker_pool, "_cgroup_file", lambda name: tmp_path / name)
    assert (available_cpus(), available_cpus(4), available_cpus(64)) == (16, 4, 1)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert available_cpus() == 16
    (tmp_path / "cpu.max").write_text("350000 100000\n")
    assert available_cpus() == 3
    (tmp_path / "cpu.max").unlink()
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "8")
    assert available_cpus(2) == 4
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    assert worker_count("auto", 2) == 3
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "8(x2)")  # srun bound each of 8 tasks to its own CPUs
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "16")
    assert available_cpus(8) == 16
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "1(x2)")  # one task on each node: a torchrun of 8 ranks
    assert available_cpus(8) == 2
    assert worker_count("7") == 7
