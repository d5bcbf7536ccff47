"""cluster=slurm: each stage as a job or an array of jobs that starts when the stages before it have succeeded.

The scripts do the rest (slurm/job.sh): this program may end, and the machine that it ran on, once they are submitted.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import submitit
import xxhash
from submitit.core.utils import FailedJobError

from launch import pack
from launch.script import LOCKSTEP, Array, Script
from pipeline.config import MAIN_LINE, UPSTREAMS, ConfigError, identity, public_text

if TYPE_CHECKING:
    from launch.submit import Job

T = TypeVar("T")
_PAUSES = (2, 4, 8, 15, 30, 30, 60, 60, 60)  # seconds between tries while the controller does not answer
_ENDING = 60.0  # seconds to wait for jobs of the same work that are about to end
_AWAY = re.compile(
    "unable to contact slurm controller|socket timed out|connection refused|communication connection failure|"
    "zero bytes were transmitted|temporarily unable|resource temporarily unavailable|transport endpoint|"
    "unable to establish control|unexpected message|backup controller",
    re.IGNORECASE,
)
_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")


class SlurmError(ConfigError):
    """SLURM refused, or cannot be reached; the message is its own, on one line."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.passing = bool(_AWAY.search(message))


@dataclass
class Submitted:
    """A stage that is in SLURM's hands, or need not be."""

    job: Job
    ids: tuple[str, ...]
    how: str
    scripts: tuple[Script, ...]


# ---- what to submit


def submit(jobs: list[Job]) -> int:
    """Submit the jobs in order, each after those whose results it needs; what is there already is not doubled.

    Raises:
        SlurmError: sbatch refused one; what was submitted before it stays, and the same command finds it.
    """
    require_slurm()
    done: list[Submitted] = []
    with outer_job_forgotten():
        limit = max_array_size() if any(job.request.config.array for job in jobs) else 0
        for job in jobs:
            try:
                entry = _submit(job, done, limit)
            except SlurmError as error:
                ids = [i for other in done for i in other.ids]
                hint = f"; submitted before it: {' '.join(ids)} (the same command finds them)" if ids else ""
                raise ConfigError(f"{job.stage}: {error}{hint}") from None
            done.append(entry)
            print(f"{entry.how:<22} {job.stage:<10} {_size(entry):<24} {job.output or ''}", flush=True)
    _advise(done)
    return 0


def _submit(job: Job, before: list[Submitted], max_array: int) -> Submitted:
    scripts = scripts_of(job, max_array)
    if already_done(job):
        return Submitted(job, (), "finished already", scripts)
    if ids := find(scripts[0].name):
        return Submitted(job, ids, f"submitted before: {','.join(ids)}", scripts)
    dependency = dependency_of(job, before)
    ids = ()
    for script in scripts:
        request = replace(script.request, options={**script.request.options, **dependency})
        ids += _sbatch_once(replace(script, request=request))
    return Submitted(job, ids, f"submitted: {','.join(ids)}", scripts)


def rehearse(jobs: list[Job]) -> int:
    """Print the scripts, and what SLURM would say of them; 1 if it would refuse one."""
    available = shutil.which("sbatch") is not None
    accepted = True
    for job in jobs:
        for script in scripts_of(job, max_array_size() if available and job.request.config.array else 0):
            print(f"# ==== {job.stage}: {job.output or ''}\n{public_text(script.text)}")
            good, said = test_only(script) if available else (True, "no SLURM on this machine that could be asked")
            accepted &= good
            print(f"# ==== {job.stage}: {'' if good else 'refused: '}{said}\n")
    return 0 if accepted else 1


def _size(entry: Submitted) -> str:
    script = entry.scripts[0]
    times = f"{script.array.total} x " if script.array else ""
    nodes = f"{script.nodes} node{'s' * (script.nodes > 1)}"
    return f"{times}{nodes} x {script.tasks_per_node} rank{'s' * (script.tasks_per_node > 1)}"


def _advise(done: list[Submitted]) -> None:
    ids = [i for entry in done for i in entry.ids]
    if ids:
        logs = sorted({str(script.logs) for entry in done if entry.ids for script in entry.scripts})
        outputs = [str(entry.job.output) for entry in done if entry.ids and entry.job.output]
        watch = f"python launch/status.py {shlex.quote(os.path.commonpath(outputs))}" if outputs else "squeue --me"
        print(f"watch: {watch}\nstop:  scancel {' '.join(ids)}\nlogs:  {' '.join(logs)}")


def scripts_of(job: Job, max_array: int = 0) -> tuple[Script, ...]:
    """The script of a job; several where an array is larger than SLURM allows.

    Raises:
        ConfigError: an array of a stage that cannot be one.
    """
    config = job.request.config
    if job.parts:
        return (pack.script_of(job, name_of(job), comment_of(job), logs_of(job)),)
    single = Script(job.stage, name_of(job), comment_of(job), job.arguments, logs_of(job), job.request)
    if not config.array or single.single:
        return (single,)
    if job.stage in LOCKSTEP:
        raise ConfigError(f"array={config.array}: the ranks of stage {job.stage} wait for each other: use nodes=")
    size = min(config.array, max_array or config.array)
    starts = range(0, config.array, size)
    # The parts of a large array run side by side and share what may run at a time.
    parallel = max(1, config.array_parallelism // len(starts)) if config.array_parallelism else 0
    arrays = [Array(min(size, config.array - start), start, config.array, parallel) for start in starts]
    return tuple(replace(single, array=array) for array in arrays)


def name_of(job: Job) -> str:
    """The job's name in SLURM: the stage, and what tells this work from any other."""
    if job.parts:
        return name_for("pack", " ".join(name_of(part) for part in job.parts))
    return name_for(job.stage, str(job.output) if job.output else " ".join(sorted(job.arguments)))


def name_for(stage: str, work: str) -> str:
    """The name of the job that does ``stage`` in the folder ``work``."""
    return f"{stage}-{xxhash.xxh3_64_hexdigest(f'{stage} {work}')[:10]}"


def comment_of(job: Job) -> str:
    """For people who look at squeue, and for launch/status.py."""
    if job.parts:
        return pack.comment([comment_of(part) for part in job.parts if part.output])
    return comment_for(job.output or "")


def comment_for(output: str | Path) -> str:
    return str(output).translate({ord(c): "_" for c in "'\"\\ "})


def logs_of(job: Job) -> Path:
    """The folder of the job's scripts and logs, beside its output."""
    config = job.config
    if job.parts:
        return (job.output or Path.cwd()) / "logs" / "pack.slurm"
    output = job.output or Path(getattr(config, "input", "") or getattr(config, "data_dir", "")).absolute() / job.stage
    return output.parent / "logs" / f"{output.name}.slurm"


def dependency_of(job: Job, before: list[Submitted]) -> dict[str, str]:
    """Options of sbatch that let ``job`` wait for those of ``before`` whose results it needs.

    Only an economy: SLURM forgets jobs and then lets their children run, so that each stage looks for itself if its
    input is finished (``afterok`` of a job that is not known counts as fulfilled). Of arrays no single element has to
    succeed, as the others do its work: what follows waits for their end, and looks.
    """
    waiting = [entry for entry in before if entry.ids and _needs(job, entry.job)]
    words = [f"{'afterany' if entry.scripts[0].array else 'afterok'}:{':'.join(entry.ids)}" for entry in waiting]
    return {"dependency": ",".join(words), "kill-on-invalid-dep": "yes"} if words else {}


def _needs(job: Job, other: Job) -> bool:
    """Whether a job needs what another makes, of the same data set."""
    return any(
        pack.share_data(one, two) and _stage_needs(one.stage, two.stage)
        for one in job.parts or (job,)
        for two in other.parts or (other,)
    )


def _stage_needs(stage: str, other: str) -> bool:
    """Drawing and judging need what the main line made; any other stage needs all that come before it."""
    if stage in ("generate", "evaluate"):
        return other in (*MAIN_LINE, *UPSTREAMS)
    return True


def already_done(job: Job) -> bool:
    """Whether the job's output is finished, and made from its input as that is now, with these settings.

    In doubt it is not: the stage itself then says what is the matter.
    """
    from pipeline.partitions.dataset import Dataset
    from pipeline.stages import get_stage
    from pipeline.storage import StorageError

    if job.parts:
        return all(map(already_done, job.parts))
    if job.stage not in (*MAIN_LINE[1:-1], *UPSTREAMS) or job.config.overwrite or job.config.retry_failed:
        return False  # the first stage looks at its source again
    try:
        dataset, upstream = Dataset.open(job.output or ""), Dataset.open(job.config.input)
        newest = dataset.plans[-1].header
        return (
            dataset.success is not None
            and upstream.success is not None
            and newest["upstream"]["content_digest"] == upstream.success["content_digest"]
            and dataset.header["stage_version"] == get_stage(job.stage).version_with(job.config)
            and dataset.header["identity"] == identity(job.config)
        )
    except (ConfigError, StorageError, OSError, KeyError, TypeError):
        return False


# ---- talking to SLURM


def require_slurm() -> None:
    """Raises SlurmError where there is no SLURM."""
    missing = [name for name in ("sbatch", "squeue", "srun") if shutil.which(name) is None]
    if missing:
        raise SlurmError(
            f"cluster=slurm: no {missing[0]} on this machine: submit from a login node of the cluster, or cluster=local"
        )


@contextlib.contextmanager
def outer_job_forgotten() -> Iterator[None]:
    """Context without what a job around this program has set: sbatch and srun would take it for options.

    Outside of a job these variables are the user's own (SBATCH_ACCOUNT, SQUEUE_FORMAT) and stay.
    """
    before = dict(os.environ)
    if "SLURM_JOB_ID" in os.environ:
        for name in before:
            if name.startswith(("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_")) and name not in _KEPT:
                del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class _Executor(submitit.SlurmExecutor):
    """submitit's way to submit, with a script of ours. Nothing is pickled: the script holds the whole command."""

    def __init__(self, script: Script) -> None:
        super().__init__(script.logs)
        self._script = script

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self._script.text

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        submission_file_path.chmod(0o600)  # settings may hold secrets, in URLs for example
        return super()._make_submission_command(submission_file_path)

    def submit_script(self) -> str:
        """The job's id."""
        return str(self._submit_command("").job_id)


def _sbatch_once(script: Script) -> tuple[str, ...]:
    """Submit, and try again while SLURM is away: unless a try that seemed to fail had got through after all."""
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
        raise SlurmError(_one_line(str(error) or said.getvalue())) from None
    except OSError as error:
        raise ConfigError(f"{script.logs} cannot be written: {error.strerror}") from None


def test_only(script: Script) -> tuple[bool, str]:
    """What ``sbatch --test-only`` says of the script, and if it would be accepted."""
    with outer_job_forgotten():
        done = subprocess.run(
            ["sbatch", "--test-only"], input=script.text, capture_output=True, text=True, check=False, timeout=120
        )
    return done.returncode == 0, _one_line(done.stderr + done.stdout)


def find(name: str) -> tuple[str, ...]:
    """Ids of this user's jobs of that name that wait or run. Jobs that are just ending are waited for, up to a minute:
    they may be about to be queued again."""
    command = ("squeue", "--noheader", "--me", f"--name={name}", "--format=%F %T")
    deadline = time.monotonic() + _ENDING
    while True:
        lines = persistently(lambda: ask(*command)).splitlines()
        states = [line.split() for line in lines if line.strip()]
        if any(state != "COMPLETING" for _, state in states) or not states or time.monotonic() > deadline:
            return tuple(dict.fromkeys(number for number, state in states if state != "COMPLETING"))
        print(f"{name}: job {states[0][0]} is about to end: waiting for it", file=sys.stderr, flush=True)
        time.sleep(2)


def max_array_size() -> int:
    """How many elements SLURM allows in an array."""
    config = persistently(lambda: ask("scontrol", "show", "config"))
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", config, re.MULTILINE)
    return max(1, int(found[1])) if found else 1000


def ask(*command: str, seconds: float = 120) -> str:
    """What a command of SLURM prints.

    Raises:
        SlurmError: it failed, or did not answer in time.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]}: socket timed out") from None
    if done.returncode:
        raise SlurmError(_one_line(done.stderr or done.stdout) or f"{command[0]} failed with code {done.returncode}")
    return done.stdout


def persistently(do: Callable[[], T]) -> T:
    """``do()``, again and again for some minutes while SLURM's controller is away."""
    for pause in _PAUSES:
        try:
            return do()
        except SlurmError as error:
            if not error.passing:
                raise
            print(f"SLURM does not answer ({error}): trying again in {pause} s", file=sys.stderr, flush=True)
            time.sleep(pause)
    return do()


def _one_line(text: str) -> str:
    """What SLURM said, without the prefixes of its lines and without repetitions."""
    lines = (re.sub(r"^(sbatch|squeue|scontrol)(: error)?: ", "", line.strip()) for line in text.splitlines())
    words = "; ".join(dict.fromkeys(line for line in lines if line))
    return words[:600]
