"""cluster=slurm: each stage as a job or an array of jobs that starts when the stages before it have succeeded.

The scripts (slurm/job.sh) do the rest: once they are submitted, this program and its machine are no longer needed.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import shlex
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import submitit
from submitit.core.utils import FailedJobError

from launch import forecast, pack, precheck
from launch.finished import already_done, finished_as_asked, makes_data
from launch.notify import host_of, require_url
from launch.script import Array, Script
from launch.slurm_commands import (
    SlurmError,
    ask,
    comment_for,
    find,
    max_array_size,
    name_for,
    one_line,
    outer_job_forgotten,
    persistently,
    require_slurm,
    without_slurm,
)
from pipeline.config import cli
from pipeline.config.schema import ConfigError, dataset_name, public_text, traits_of
from pipeline.distributed.standard_output import forgive

if TYPE_CHECKING:
    from launch.job import Job

_SOON = 60.0  # seconds; a job that could start within this time can start now


@dataclass
class Submitted:
    """A stage that was submitted, or that does not need to be."""

    job: Job
    ids: tuple[str, ...]
    how: str
    scripts: tuple[Script, ...]
    size: str = ""
    notes: tuple[str, ...] = ()
    """Further lines to print for it."""


# ---- submission


def submit(jobs: list[Job]) -> int:
    """Submit the jobs in order, each depending on those whose results it needs; skips finished and submitted ones.

    Raises:
        ConfigError: sbatch refused a job; those submitted before it stay, and the same command finds them.
    """
    require_slurm()
    forgive()  # submit the whole chain even if nobody reads the output (submit.py … | head -1)
    done: list[Submitted] = []
    with outer_job_forgotten():
        _check_first(jobs)
        forecast.warn(jobs)
        limit = max_array_size() if any(job.request.config.array for job in jobs) else 0
        for job in jobs:
            try:
                entry = _submit(job, done, limit)
            except SlurmError as error:
                ids = [i for other in done for i in other.ids]
                hint = f"; submitted before it: {' '.join(ids)} (the same command finds them)" if ids else ""
                raise ConfigError(f"{job.stage}: {error}{hint}") from None
            done.append(entry)
            print(f"{entry.how:<22} {job.stage:<10} {entry.size:<24} {job.output or ''}", flush=True)
            for note in entry.notes:
                print(f"{'':<22} {note}", flush=True)
    _advise(done)
    return 0


def _check_first(jobs: list[Job]) -> None:
    """Check all jobs before any is submitted.

    Raises:
        ConfigError: a stage would fail; the message names it.
    """
    for url in {job.request.config.notify for job in jobs} - {""}:
        require_url(url)
    names, coming = queued()
    for job in jobs:
        waits = job.request.config.after or job.request.config.begin or "dependency" in job.request.options
        if not waits and name_of(job) not in names:
            for part in job.parts or (job,):
                try:
                    precheck.check(part, coming)
                except ConfigError as error:
                    raise ConfigError(f"{part.stage}: {error}; nothing was submitted") from None
                coming |= {str(part.output)} if part.output else set()
        coming |= {str(part.output) for part in job.parts or (job,) if part.output}
    _check_after({job.request.config.after for job in jobs} - {""})


def queued() -> tuple[set[str], set[str]]:
    """Names of this user's jobs in the queue, and the outputs that their comments name."""
    said = persistently(lambda: ask("squeue", "--noheader", "--me", "--format=%j %k"))
    words = [line.split() for line in said.splitlines() if line.strip()]
    return {word[0] for word in words}, {place for word in words for place in pack.places(" ".join(word[1:2]))} - {""}


def _check_after(texts: set[str]) -> None:
    """Raises ConfigError for a job that SLURM does not know, because it would treat such a dependency as fulfilled."""
    for text in texts:
        for number in re.findall(r"\d+(?:_\d+)?", text):
            try:
                persistently(functools.partial(ask, "scontrol", "show", "job", "--oneliner", number))
            except SlurmError:
                raise ConfigError(
                    f"after={text}: SLURM does not know job {number} (any more), and would not wait for it; "
                    "if it has succeeded, leave after= out"
                ) from None


def _submit(job: Job, before: list[Submitted], max_array: int) -> Submitted:
    scripts = scripts_of(job, max_array)
    if already_done(job):
        return Submitted(job, (), "finished already", scripts, _size(scripts[0]))
    if ids := find(scripts[0].name):
        return _present(job, ids, scripts)
    if only_looks(job):
        scripts = (_small(scripts[0]),)
    dependency = dependency_of(job, before)
    notes: tuple[str, ...] = ()
    for script in scripts:
        request = replace(script.request, options={**script.request.options, **dependency})
        chosen, notes = preferred(replace(script, request=request))
        ids += _sbatch_once(chosen)
    return Submitted(job, ids, f"submitted: {','.join(ids)}", scripts, _size(scripts[0]), notes)


def _present(job: Job, ids: tuple[str, ...], scripts: tuple[Script, ...]) -> Submitted:
    """The job that is already pending or running for the same output, with its size.

    Raises:
        ConfigError: its settings would give another result than those of ``job``.
    """
    results, others = precheck.differences(job, scripts[0].logs / f"{ids[0]}_submission.sh")
    if results:
        raise ConfigError(
            f"{job.stage}: job {' '.join(ids)} is in the queue for {job.output} with {'; '.join(results)}: "
            f"scancel {' '.join(ids)}, or choose another output= or variant="
        )
    size, wanted = size_of_job(ids[0]) or _size(scripts[0]), _size(scripts[0])
    notes = [f"it has {size}, {wanted} is asked for now: scancel {' '.join(ids)} first"] if size != wanted else []
    notes += [f"it has {'; '.join(others)}: scancel {' '.join(ids)} first"] if others else []
    return Submitted(job, ids, f"submitted before: {','.join(ids)}", scripts, size, tuple(notes))


def size_of_job(number: str) -> str:
    """Nodes and ranks of a job in the queue, in the form of :func:`_size`; empty if SLURM does not report them."""
    try:
        lines = ask("scontrol", "show", "job", "--oneliner", number).splitlines()
    except SlurmError:
        return ""
    facts = dict(re.findall(r"(\S+?)=(\S*)", lines[0])) if lines else {}
    try:
        nodes, tasks = int(facts["NumNodes"].partition("-")[0]), int(facts["NumTasks"])
    except (KeyError, ValueError):
        return ""
    elements = re.search(r"--array=0-(\d+)", _script_text(facts.get("Command", "")))
    return _sizes(int(elements[1]) + 1 if elements else 0, nodes, max(1, tasks // max(1, nodes)))


def _script_text(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, ValueError):
        return ""


def only_looks(job: Job) -> bool:
    """Whether the job only has to check that its source is unchanged."""
    return makes_data(job.stage) and not traits_of(job.stage).upstream and finished_as_asked(job)


def _small(script: Script) -> Script:
    """The same script with a single process."""
    config = replace(script.request.config, nodes=1, tasks_per_node=1, gpus_per_node=0, array=0)
    return replace(script, array=None, request=replace(script.request, config=config))


def preferred(script: Script) -> tuple[Script, tuple[str, ...]]:
    """The script for the first of several partitions in which it can start now, else for all that accept it.

    Of several partitions, SLURM chooses the one in which the job can start first, regardless of their order. Also
    returns notes for the user.
    """
    names = script.request.config.partition.split(",")
    if len(names) == 1:
        return script, ()
    accepted, notes = [], []
    for name in names:
        good, said = test_only(_on(script, name))
        if not good:
            notes.append(f"not in partition {name}: {said}")
            continue
        accepted.append(name)
        start = re.search(r"to start at (\S+)", said)
        if start and time.mktime(time.strptime(start[1], "%Y-%m-%dT%H:%M:%S")) < time.time() + _SOON:
            return _on(script, name), (*notes, f"partition {name}: the first that can start it now")
    return _on(script, ",".join(accepted or names)), tuple(notes)


def _on(script: Script, partition: str) -> Script:
    config = replace(script.request.config, partition=partition)
    return replace(script, request=replace(script.request, config=config))


def rehearse(jobs: list[Job]) -> int:
    """Print the scripts, and SLURM's answer to each; returns 1 if it would refuse one."""
    why = without_slurm()
    accepted = True
    for job in jobs:
        for script in scripts_of(job, 0 if why or not job.request.config.array else max_array_size()):
            print(f"# ==== {job.stage}: {job.output or ''}\n{_public(script)}")
            good, said = (True, f"not checked: {why}") if why else test_only(script)
            accepted &= good
            print(f"# ==== {job.stage}: {'' if good else 'refused: '}{said}\n")
    forecast.print_for_slurm(jobs, not why)
    return 0 if accepted else 1


def _size(script: Script) -> str:
    return _sizes(script.array.total if script.array else 0, script.nodes, script.tasks_per_node)


def _sizes(elements: int, nodes: int, ranks: int) -> str:
    times = f"{elements} x " if elements else ""
    return f"{times}{nodes} node{'s' * (nodes > 1)} x {ranks} rank{'s' * (ranks > 1)}"


def _advise(done: list[Submitted]) -> None:
    ids = [i for entry in done for i in entry.ids]
    if ids:
        logs = sorted({str(script.logs) for entry in done if entry.ids for script in entry.scripts})
        outputs = [str(entry.job.output) for entry in done if entry.ids and entry.job.output]
        watch = f"{cli.program('status')} {shlex.quote(os.path.commonpath(outputs))}" if outputs else "squeue --me"
        print(f"watch: {watch}\nstop:  scancel {' '.join(ids)}\nlogs:  {' '.join(logs)}")


def scripts_of(job: Job, max_array: int = 0) -> tuple[Script, ...]:
    """The script of a job; several scripts if an array is larger than SLURM allows.

    Raises:
        ConfigError: the job is an array, but the ranks of its stage wait for each other.
    """
    config = job.request.config
    if job.parts:
        return (pack.script_of(job, name_of(job), comment_of(job), logs_of(job)),)
    single = Script(job.stage, name_of(job), comment_of(job), job.arguments, logs_of(job), job.request)
    if not config.array or single.single:
        return (single,)
    if traits_of(job.stage).lockstep:
        raise ConfigError(f"array={config.array}: the ranks of stage {job.stage} wait for each other: use nodes=")
    size = min(config.array, max_array or config.array)
    starts = range(0, config.array, size)
    # the parts of a large array run at the same time and share array_parallelism
    parallel = max(1, config.array_parallelism // len(starts)) if config.array_parallelism else 0
    arrays = [Array(min(size, config.array - start), start, config.array, parallel) for start in starts]
    return tuple(replace(single, array=array) for array in arrays)


def name_of(job: Job) -> str:
    """The job's name in SLURM: the stage, and a hash that identifies the work."""
    if job.parts:
        return name_for("pack", " ".join(name_of(part) for part in job.parts))
    return name_for(job.stage, str(job.output) if job.output else " ".join(sorted(job.arguments)))


def comment_of(job: Job) -> str:
    """The job's comment in SLURM: its output, for launch/status.py and for people who read squeue."""
    if job.parts:
        return pack.comment([comment_of(part) for part in job.parts if part.output])
    return comment_for(place_of(job))


def place_of(job: Job) -> Path:
    """The job's output; for a tool without one, a folder of its name below the folder that it works on."""
    config = job.config
    root = Path(getattr(config, "input", "") or getattr(config, "data_dir", "")).absolute()
    return job.output or root / dataset_name(getattr(config, "dataset", "")) / job.stage


def logs_of(job: Job) -> Path:
    """The folder of the job's scripts and logs, next to its output."""
    if job.parts:
        return (job.output or Path.cwd()) / "logs" / "pack.slurm"
    place = place_of(job)
    return place.parent / "logs" / f"{place.name}.slurm"


def dependency_of(job: Job, before: list[Submitted]) -> dict[str, str]:
    """Options of sbatch that make ``job`` wait for those jobs of ``before`` whose results it needs.

    This is only an optimization: SLURM forgets old jobs, and treats ``afterok`` of an unknown job as fulfilled, so that
    each stage itself checks that its input is finished. A job after an array waits for the end of all elements
    (``afterany``), because no single element has to succeed: the others do its work.
    """
    waiting = [entry for entry in before if entry.ids and _needs(job, entry.job)]
    words = [f"{'afterany' if entry.scripts[0].array else 'afterok'}:{':'.join(entry.ids)}" for entry in waiting]
    after = job.request.config.after
    if after and not waiting:  # jobs that wait for a job of this command already wait for after= indirectly
        words += [re.sub(r"(^|,)(?=\d)", r"\1afterok:", after)]
    words += [text for name, text in job.request.options.items() if name == "dependency"]
    return {"dependency": ",".join(words), "kill-on-invalid-dep": "yes"} if words else {}


def _needs(job: Job, other: Job) -> bool:
    """Whether a job needs the output of another one, for the same dataset."""
    return any(
        pack.share_data(one, two) and _stage_needs(one.stage, two.stage)
        for one in job.parts or (job,)
        for two in other.parts or (other,)
    )


def _stage_needs(stage: str, other: str) -> bool:
    """Stages that use a finished run need dataset stages and training; any other stage needs all before it."""
    return not traits_of(stage).reads_run or makes_data(other) or traits_of(other).lockstep


# ---- calls of sbatch


class _Executor(submitit.SlurmExecutor):
    """Submits our own script with submitit. Nothing is pickled, because the script contains the whole command."""

    def __init__(self, script: Script) -> None:
        super().__init__(script.logs)
        self._script = script

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self._script.text

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        submission_file_path.chmod(0o600)  # settings may contain secrets, for example in URLs
        return super()._make_submission_command(submission_file_path)

    def submit_script(self) -> str:
        """Submit the script and return the job's id."""
        return str(self._submit_command("").job_id)


def _sbatch_once(script: Script) -> tuple[str, ...]:
    """Submit the script, retrying while SLURM does not answer, unless an attempt that seemed to fail succeeded."""
    tries = 0

    def attempt() -> tuple[str, ...]:
        nonlocal tries
        tries += 1
        if tries > 1 and script.array is None and (found := find(script.name)):
            return found
        return (_sbatch(script),)

    return persistently(attempt)


def _sbatch(script: Script) -> str:
    said = io.StringIO()
    try:
        script.logs.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stderr(said):
            return _Executor(script).submit_script()
    except FailedJobError as error:
        raise SlurmError(one_line(str(error) or said.getvalue())) from None
    except OSError as error:
        raise ConfigError(f"{script.logs} cannot be written: {error.strerror}") from None


def test_only(script: Script) -> tuple[bool, str]:
    """Whether SLURM would accept the script, and the message of ``sbatch --test-only``."""
    with outer_job_forgotten():
        done = subprocess.run(
            ["sbatch", "--test-only"], input=script.text, capture_output=True, text=True, check=False, timeout=120
        )
    return done.returncode == 0, one_line(done.stderr + done.stdout)


def _public(script: Script) -> str:
    """The script without secrets."""
    notify = script.request.config.notify
    text = script.text.replace(shlex.quote(notify), f"<a URL at {host_of(notify)}>") if notify else script.text
    return public_text(text)
