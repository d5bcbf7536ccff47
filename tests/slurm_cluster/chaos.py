"""Things that go wrong on a cluster, done to a job at work; whatever happens, the result must be the undisturbed one.

A trial submits a job, waits until it has committed some partitions, does one of :data:`EVENTS` to it, and waits for
the end without helping. ``benchmarks/chaos.py`` runs a campaign of them, ``tests/test_slurm_chaos.py`` some.
"""

from __future__ import annotations

import functools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from slurm_cluster.cluster import Cluster

from pipeline.partitions.dataset import Dataset
from pipeline.partitions.verify import verify

ROOT = Path(__file__).resolve().parents[2]
_LIMIT = 240.0  # seconds that a trial may take
_ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
# What job scripts would do after minutes, they do after seconds here.
HURRY = {"LOOK": "1", "WAIT": "5", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Work:
    """What the jobs do: draw images, ten to a partition."""

    partitions: int
    digest: str

    @classmethod
    def undisturbed(cls, folder: Path, partitions: int) -> Work:
        """The work, and what comes out when one local process does it."""
        output = folder / "undisturbed"
        command = [sys.executable, "-m", "pipeline.stages.download", f"output={output}"]
        command += [f"{key}={value}" for key, value in cls(partitions, "").settings.items()]
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True, timeout=300)
        return cls(partitions, str(Dataset.open(output).require_success()["content_digest"]))

    @property
    def settings(self) -> dict[str, str]:
        count = str(10 * self.partitions)
        return {"dataset": "shapes", "count": count, "image_size": "192", "partition_size": "10", "lease": "5"}


@dataclass
class Trial:
    """One job to disturb."""

    cluster: Cluster
    folder: Path
    work: Work
    way: str = "submit"
    """submit, array: by launch/submit.py; template: by slurm/download.sbatch."""
    seed: int = 0
    options: dict[str, str] = field(default_factory=dict)
    """Further keys of launch/submit.py."""
    jobs: list[str] = field(default_factory=list)
    note: str = ""
    held: list[int] = field(default_factory=list)
    """Ranks that stand still while the mischief is done, so that they do not finish meanwhile."""
    undo: list[Callable[[], object]] = field(default_factory=list)
    """What mends the nodes after the trial."""
    cancelled: int = 0
    """Elements of the array that were cancelled."""
    user: tuple[str, ...] = ()
    """What to run commands with, to be another user."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.begin = time.monotonic()

    @property
    def output(self) -> Path:
        return self.folder / "output"

    @property
    def environment(self) -> dict[str, str]:
        """Of the ranks: clocks of two nodes are wrong, if the event says so (:func:`skew_clocks`)."""
        if "skew" not in self.options:
            return {}
        (self.folder / "clocks").mkdir(exist_ok=True)
        (self.folder / "clocks/sitecustomize.py").write_text(WRONG_CLOCK)
        return {"PYTHONPATH": f"{ROOT}:{self.folder / 'clocks'}"}

    @property
    def job(self) -> str:
        return self.jobs[0]

    # ---- the job

    def submit(self) -> str:
        """Submit the job (again); its id."""
        if self.way == "template":
            environment = {**HURRY, "LATENTMILL_HOME": str(ROOT), "LOGS": str(self.folder / "logs")}
            settings = self.work.settings
            environment |= {"DATASET": settings.pop("dataset"), "OUTPUT": str(self.output), **self.environment}
            more = [f"{key}={value}" for key, value in settings.items()]
            tasks = self.options.get("tasks_per_node", "3")
            command = ["sbatch", "--parsable", "--nodes=2", f"--ntasks-per-node={tasks}", "--mem=1G"]
            command += [f"--chdir={self.folder}"]
            command += [ROOT / "slurm/download.sbatch", *more, f"hang_timeout={self.options['hang_timeout']}"]
            said = self.cluster.run(*self.user, *command, environment=environment).stdout
        else:
            size = (
                {"array": "3", "tasks_per_node": "2"} if self.way == "array" else {"nodes": "2", "tasks_per_node": "3"}
            )
            keys = {"stage": "download", **self.work.settings, "output": self.output, "cluster": "slurm"}
            setup = "; ".join(f"export {k}={v}" for k, v in {**HURRY, **self.environment}.items())
            keys |= size | {"setup": setup} | {key: value for key, value in self.options.items() if key != "skew"}
            words = [f"{key}={value}" for key, value in keys.items()]
            said = self.cluster.run(sys.executable, ROOT / "launch/submit.py", *words).stdout
        found = re.search(r"\d+", said.partition("submitted")[2] or said)
        assert found, said
        self.jobs.append(found[0])
        return found[0]

    def elements(self, job: str = "") -> list[dict[str, str]]:
        """What SLURM says of the job, or of each element of the array; nothing while it does not answer."""
        said = self.cluster.run("scontrol", "show", "job", "--oneliner", job or self.job, check=False).stdout
        return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in said.splitlines() if "JobState=" in line]

    def state(self, job: str = "") -> dict[str, str]:
        """What SLURM says of the job, or of one element of the array: one that has not completed, if there is any."""
        return min(self.elements(job), key=lambda one: one["JobState"] == "COMPLETED", default={})

    def committed(self) -> int:
        return len([path for path in self.output.glob("data/*/*") if not path.name.startswith(".")])

    def until(self, condition: Callable[[], object], what: str, seconds: float = _LIMIT) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(f"{what}: not after {seconds:g} s\n{self.story()}")
            time.sleep(0.1)

    def until_at_work(self) -> None:
        """Wait for a random number of commits."""
        wanted = self.random.randrange(2, self.work.partitions // 2)
        self.until(lambda: self.committed() >= wanted, f"{wanted} partitions")

    def ranks(self) -> list[int]:
        """Process ids of the ranks at work, of all lives."""
        found = processes("LATENTMILL_LIFE=", str(self.folder))
        return [pid for pid in found if re.match(r"\S*python\S* -m pipeline\.stages", words_of(pid))]

    def hold(self) -> None:
        def found() -> list[int]:
            self.held = self.ranks()
            return self.held

        self.until(found, "ranks")  # others' mischief may just have ended a life of this job
        send(self.held, signal.SIGSTOP)

    def release(self) -> None:
        """Idempotent."""
        send(self.held, signal.SIGCONT)
        self.held = []

    def nodes(self) -> list[str]:
        """Nodes of the job, the one with the batch script first."""
        state = self.state()
        names = self.cluster.run("scontrol", "show", "hostnames", state["NodeList"]).stdout.split()
        return sorted(names, key=lambda name: name != state["BatchHost"])

    def lives(self) -> int:
        return 1 + max((int(one["Restarts"]) for one in self.elements()), default=0)

    def story(self) -> str:
        """Everything that may explain a failure."""
        logs = sorted(self.folder.rglob("*.out")) + sorted(self.folder.rglob("*.log"))
        texts = [f"--- {path}\n{path.read_text(errors='replace')[-3000:]}" for path in logs]
        queue = self.cluster.run("squeue", check=False).stdout + self.cluster.run("sinfo", "-N", check=False).stdout
        return "\n".join([str(self.state()), queue, *texts])

    # ---- the end

    def finish(self) -> None:
        """Wait until all jobs have come to their end, by themselves."""
        for job in self.jobs:
            self.until(functools.partial(self._ended, job), f"the end of job {job}")
            states = [one["JobState"] for one in self.elements(job)]
            assert states.count("CANCELLED") == self.cancelled, self.story()
            finished = states.count("COMPLETED") + self._out_of_time_but_done(states)
            assert finished == len(states) - self.cancelled, self.story()

    def _out_of_time_but_done(self, states: list[str]) -> int:
        """A preempted job has a new end time; SLURM calls it TIMEOUT also where it finished its work before that."""
        done = any("finished; this life took" in path.read_text() for path in self.folder.rglob("*.out"))
        return states.count("TIMEOUT") if done else 0

    def _ended(self, job: str) -> bool:
        states = [one["JobState"] for one in self.elements(job)]
        return bool(states) and all(state in _ENDS for state in states)

    def check(self) -> None:
        """The result is complete, sound, and the same as without disturbance."""
        dataset = Dataset.open(self.output)
        success = dataset.require_success()
        assert success["counts"]["in"] == success["counts"]["kept"] == 10 * self.work.partitions
        assert success["content_digest"] == self.work.digest
        assert list(verify(dataset)) == []
        slots = [path.name for path in self.output.glob("data/*/*") if not path.name.startswith(".")]
        assert sorted(slots) == [f"{index:05d}" for index in range(self.work.partitions)]


def run(
    cluster: Cluster, folder: Path, event: str, work: Work, way: str = "submit", seed: int = 0, **options: str
) -> Trial:
    """Submit (with further ``options`` of launch/submit.py), disturb, wait, check."""
    act = EVENTS[event]
    trial = Trial(cluster, folder, work, way, seed, {"hang_timeout": "6", **OPTIONS.get(event, {}), **options})
    try:
        if event in BEFORE:
            BEFORE[event](trial)
        trial.submit()
        trial.until_at_work()
        trial.hold()
        trial.note = f"at {trial.committed()}/{work.partitions}: {act(trial)}"
        trial.release()
        trial.finish()
    finally:
        for mend in trial.undo:
            mend()
    trial.check()
    return trial


def processes(*words: str) -> list[int]:
    """Ids of processes in whose environment all of these words are."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            environment = environment_of(int(entry.name))
            if environment and all(word in environment for word in words):
                found.append(int(entry.name))
    return sorted(found)


def environment_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def words_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
    except OSError:
        return ""


def send(pids: list[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


# ---- events: each does its mischief and says what it did


def kill_a_rank(trial: Trial) -> str:
    send([trial.random.choice(trial.held)], signal.SIGKILL)
    return "kill -9 of a rank"


def kill_all_ranks(trial: Trial) -> str:
    send(trial.held, signal.SIGKILL)
    return f"kill -9 of {len(trial.held)} ranks"


def freeze_a_rank(trial: Trial) -> str:
    """The others finish, or its silence is noticed."""
    trial.held.remove(trial.random.choice(trial.held))
    return "SIGSTOP of a rank"


def freeze_all_ranks(trial: Trial) -> str:
    count, trial.held = len(trial.held), []
    return f"SIGSTOP of {count} ranks"


def kill_srun(trial: Trial) -> str:
    victims = [
        pid for pid in processes(f"SLURM_JOB_ID={trial.job}", str(trial.folder)) if words_of(pid).startswith("srun ")
    ]
    send(victims, signal.SIGKILL)
    return "kill -9 of srun"


def crash_batch_node(trial: Trial) -> str:
    return _crash(trial, trial.nodes()[0])


def crash_other_node(trial: Trial) -> str:
    return _crash(trial, trial.nodes()[-1])


def _crash(trial: Trial, node: str) -> str:
    trial.cluster.node("crash", node)
    trial.until(lambda: _lost(trial, node), f"{node} is missed")
    trial.cluster.node("start", node)
    return f"{node} crashed"


def _lost(trial: Trial, node: str) -> bool:
    """Whether SLURM has noticed that the node is gone, or nothing is left to notice it by."""
    state = trial.cluster.run("sinfo", "--noheader", f"--nodes={node}", "--partition=main", "--format=%T").stdout
    return "down" in state or trial.state()["JobState"] == "COMPLETED"


def reboot_node(trial: Trial) -> str:
    """It is back before anybody has missed it."""
    node = trial.nodes()[0]
    trial.cluster.node("crash", node)
    time.sleep(1)
    trial.cluster.node("start", node)
    return f"{node} crashed and came back"


def cut_batch_node(trial: Trial) -> str:
    return _cut(trial, trial.nodes()[0])


def cut_other_node(trial: Trial) -> str:
    return _cut(trial, trial.nodes()[-1])


def _cut(trial: Trial, node: str) -> str:
    old = _outlive(trial, "cut", node)
    trial.cluster.node("heal", node)
    return f"{node} cut off and healed; {old} old ranks went on next to the new ones"


def _outlive(trial: Trial, action: str, node: str) -> int:
    """Ranks fall asleep, their node gets lost, the job begins again elsewhere, the ranks awake and write on."""
    old = trial.held
    trial.cluster.node(action, node)
    trial.until(lambda: trial.lives() > 1 and trial.state()["JobState"] == "RUNNING", "another life")
    trial.until(lambda: set(trial.ranks()) - set(old), "new ranks")
    time.sleep(trial.random.uniform(0, 1.5))
    left = [pid for pid in old if pid in trial.ranks()]
    trial.release()
    time.sleep(trial.random.uniform(0, 4))
    return len(left)


def orphan_batch_node(trial: Trial) -> str:
    """Its daemon dies; its tasks and the batch script live on, and can reach everybody."""
    node = trial.nodes()[0]
    old = _outlive(trial, "orphan", node)
    trial.cluster.node("revive", node)
    return f"slurmd of {node} killed; {old} old ranks went on next to the new ones"


def _kill_controller(trial: Trial) -> None:
    """Not before it has saved what it knows of the job: SLURM loses, or holds, a job of which it knows nothing more."""
    time.sleep(max(0.0, 8 - (time.monotonic() - trial.begin)))
    trial.cluster.controller("kill")


def restart_controller(trial: Trial) -> str:
    away = trial.random.uniform(0.5, 8)
    _kill_controller(trial)
    trial.release()
    time.sleep(away)
    trial.cluster.controller("start")
    return f"controller away for {away:.1f} s"


def lose_controller_and_ranks(trial: Trial) -> str:
    """The job script wants to requeue while nobody answers."""
    _kill_controller(trial)
    said = kill_all_ranks(trial)
    time.sleep(trial.random.uniform(3, 8))
    trial.cluster.controller("start")
    return f"controller away, {said}"


def requeue(trial: Trial) -> str:
    trial.cluster.run("scontrol", "requeue", trial.job)
    return "scontrol requeue"


def preempt(trial: Trial) -> str:
    nodes = ["--nodes=4", "--exclusive", "--partition=high", "--output=/dev/null"]
    trial.jobs.append(trial.cluster.run("sbatch", "--parsable", *nodes, "--wrap=sleep 2").stdout.strip())
    trial.until(lambda: trial.lives() > 1, "another life")  # SLURM wakes the ranks up: SIGCONT comes with its signals
    return "preempted"


def tell_usr2(trial: Trial) -> str:
    """What SLURM does before the time limit, without the wait for it."""
    trial.cluster.run("scancel", "--signal=USR2", trial.job)
    return "SIGUSR2"


def tell_term(trial: Trial) -> str:
    trial.cluster.run("scancel", "--signal=TERM", trial.job)
    return "SIGTERM"


def reach_time_limit(trial: Trial) -> str:
    """Ranks stand still until SLURM warns them, and wakes them up."""
    trial.until(lambda: trial.lives() > 1, "another life")
    return "time limit"


def submit_twice(trial: Trial) -> str:
    """By sbatch; launch/submit.py would find the first one."""
    way, trial.way = trial.way, "template"
    trial.submit()
    trial.way = way
    return "submitted twice"


def lose_environment(trial: Trial) -> str:
    """One node no longer sees Python, from the next life on."""
    return _spoil(trial, "hide", Path(sys.prefix), "has no Python environment")


def make_read_only(trial: Trial) -> str:
    """The output turns read-only on one node under its ranks, which go on.

    That takes a moment in which none of them has a file of a partition open, so each is stopped at such a moment. Their
    events, which are always open, are on a file system of their own.
    """
    node = trial.random.choice(trial.nodes())
    for pid in trial.held:
        if f"SLURMD_NODENAME={node}" in environment_of(pid):
            while _writes(pid, trial.output / "data"):
                send([pid], signal.SIGCONT)
                time.sleep(0.005)
                send([pid], signal.SIGSTOP)
                time.sleep(0.005)
    trial.cluster.node("readonly", node, trial.output)
    return f"{node} cannot write the output any more"


def _writes(pid: int, folder: Path) -> bool:
    """Whether the process, which is stopped, has a file below ``folder`` open for writing."""
    with suppress(FileNotFoundError):  # it has ended
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            if str(descriptor.readlink()).startswith(f"{folder}/"):
                flags = re.search(r"flags:\s*(\d+)", Path(f"/proc/{pid}/fdinfo/{descriptor.name}").read_text())
                if flags and int(flags[1], 8) & os.O_ACCMODE:
                    return True
    return False


def mount_output(trial: Trial) -> None:
    """On each node the output is a file system of its own."""
    (trial.output / "events").mkdir(parents=True)
    for node in NODES:
        for path in (trial.output, trial.output / "events"):
            trial.cluster.node("mount", node, path)
            trial.undo.insert(0, functools.partial(trial.cluster.node, "show", node, path))


def _spoil(trial: Trial, action: str, path: Path, what: str) -> str:
    node = trial.random.choice(trial.nodes())
    trial.cluster.node(action, node, path)
    trial.undo.append(lambda: trial.cluster.node("show", node, path))
    return f"{node} {what}, {kill_all_ranks(trial)}"


def delete_logs(trial: Trial) -> str:
    """The ranks then fail, too, so that another life needs the folder."""
    for logs in trial.folder.rglob("logs"):
        shutil.rmtree(logs, ignore_errors=True)
    trial.cluster.run("scancel", "--signal=USR2", trial.job)
    return "log folder deleted, SIGUSR2"


def cancel_an_element(trial: Trial) -> str:
    """The other elements do its work as well."""
    trial.cluster.run("scancel", f"{trial.job}_1")
    trial.cancelled = 1
    return "one element of the array cancelled"


def throttle_a_node(trial: Trial) -> str:
    """Its ranks run for a tenth of the time, until all the others have done their part."""
    node = trial.nodes()[-1]
    slow = [pid for pid in trial.held if f"SLURMD_NODENAME={node}" in environment_of(pid)]
    fast = [pid for pid in trial.held if pid not in slow]
    send(fast, signal.SIGCONT)
    trial.held = slow
    begin, seconds = time.monotonic(), trial.random.uniform(3, 8)
    while time.monotonic() < begin + seconds:
        send(slow, signal.SIGCONT)
        time.sleep(0.02)
        send(slow, signal.SIGSTOP)
        time.sleep(0.18)
    return f"{node} ran at a tenth of its speed for {seconds:.0f} s"


def skew_clocks(trial: Trial) -> str:
    """Clocks were wrong from the start (:data:`WRONG_CLOCK`); now a rank dies as well."""
    return f"clocks of nodes differ by hours, {kill_a_rank(trial)}"


def let_another_user_help(trial: Trial) -> str:
    """Somebody of the same group submits the same work, with logs of their own."""
    way, trial.way, trial.user = trial.way, "template", ("setpriv", "--reuid=65534", "--clear-groups")
    trial.submit()
    trial.way, trial.user = way, ()
    return "submitted by another user as well"


def open_to_others(trial: Trial) -> None:
    """Whatever the trial's jobs write can be written by everybody: SLURM passes on the umask of who submits."""
    before = os.umask(0)
    trial.undo.append(lambda: os.umask(before))
    trial.folder.chmod(0o777)
    trial.folder.parent.chmod(0o711)
    assert not (closed := closed_above(ROOT)), f"other users cannot enter {closed}, so they cannot run {ROOT}"
    python = Path(sys.base_prefix).resolve()
    if closed := closed_above(python):  # an interpreter in somebody's home: no other user could start it
        for node in NODES:
            trial.cluster.node("open", node, closed, python)
            trial.undo.append(functools.partial(trial.cluster.node, "show", node, closed))


def closed_above(path: Path) -> Path | None:
    """The outermost folder on the way to ``path`` that only its owner and group can enter."""
    return next((folder for folder in reversed([path, *path.parents]) if not folder.stat().st_mode & 0o001), None)


NODES = ("node1", "node2", "node3", "node4")
WRONG_CLOCK = """
import os, time
_real, _late = time.time, {"node1": 3600.0, "node2": -7200.0}.get(os.environ.get("SLURMD_NODENAME"), 0.0)
time.time = lambda: _real() - _late
"""
BEFORE: dict[str, Callable[[Trial], object]] = {
    "let_another_user_help": open_to_others,
    "make_read_only": mount_output,
}
"""What must be so before the job is submitted."""
EVENTS: dict[str, Callable[[Trial], str]] = {
    act.__name__: act
    for act in (
        kill_a_rank,
        kill_all_ranks,
        freeze_a_rank,
        freeze_all_ranks,
        kill_srun,
        crash_batch_node,
        crash_other_node,
        reboot_node,
        cut_batch_node,
        cut_other_node,
        orphan_batch_node,
        restart_controller,
        lose_controller_and_ranks,
        requeue,
        preempt,
        tell_usr2,
        tell_term,
        reach_time_limit,
        submit_twice,
        lose_environment,
        make_read_only,
        delete_logs,
        cancel_an_element,
        throttle_a_node,
        skew_clocks,
        let_another_user_help,
    )
}
_PATIENT = {"hang_timeout": "300"}
OPTIONS = {
    "skew_clocks": {"skew": "true"},
    "throttle_a_node": _PATIENT,
    "reach_time_limit": {"time": "00:01:00", "signal_seconds": "20", **_PATIENT},
    **dict.fromkeys(("cut_batch_node", "cut_other_node", "orphan_batch_node", "preempt"), _PATIENT),
    **dict.fromkeys(("restart_controller", "lose_controller_and_ranks"), _PATIENT),
}
"""Settings that an event needs."""
