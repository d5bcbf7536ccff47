"""Checks Python, packages, CPUs, memory and limits of the machine that this process runs on."""

from __future__ import annotations

import configparser
import importlib.metadata
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import xxhash

from pipeline.doctor.finding import Finding
from pipeline.imaging.worker_pool import available_cpus

ROOT = Path(__file__).parents[2]
_FILES = 4096  # open files that a rank with many workers and connections may need
_SHARED_MEMORY = 2**30  # bytes of /dev/shm for decoded images
_SCRATCH = 2**30


def look(cpus_per_task: int) -> Iterator[Finding]:
    yield python()
    yield packages()
    yield cpus(cpus_per_task)
    yield memory()
    yield from limits()


_EXTRAS = ("latents", "train")


def python() -> Finding:
    version = platform.python_version()
    return Finding("python", "ok", f"Python {version} at {sys.executable}", values={"python": version})


def packages() -> Finding:
    """Compare installed packages with the minimum versions in setup.cfg and the versions in constraints.txt."""
    floors, pins = _floors(), _pins()
    missing, old, other, installed = [], [], [], {}
    for name, floor in floors.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        installed[name] = version
        if _numbers(version) < _numbers(floor):
            old.append(f"{name} {version} (at least {floor})")
        elif name in pins and version.partition("+")[0] != pins[name]:
            other.append(f"{name} {version} ({pins[name]})")
    digest = xxhash.xxh3_64_hexdigest(repr(sorted(installed.items())))
    values = {"packages": digest, "versions": installed}
    if missing or old:
        words = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"too old: {', '.join(old)}"] * bool(old)
        return Finding("packages", "fail", "; ".join(words), f"make setup, or {_install()}", values)
    if other:
        text = f"{len(other)} in other versions than those tested together: {', '.join(other[:6])}"
        return Finding("packages", "warn", text + (", …" if len(other) > 6 else ""), _install(), values)
    return Finding("packages", "ok", f"{len(installed)} packages as in constraints.txt", values=values)


def _install() -> str:
    return f"{sys.executable} -m pip install -r {ROOT / 'constraints.txt'}"


def _floors() -> dict[str, str]:
    """Minimum versions of required packages, and of installed packages of the extras."""
    parser = configparser.ConfigParser()
    if parser.read(ROOT / "setup.cfg"):
        required = parser["options"]["install_requires"].split()
        optional = " ".join(parser["options.extras_require"].get(extra, "") for extra in _EXTRAS).split()
    else:
        lines = importlib.metadata.requires("latentmill") or []
        required = [line for line in lines if ";" not in line]
        optional = [line.split(";")[0].strip() for line in lines if any(f"'{extra}'" in line for extra in _EXTRAS)]
    floors = dict(line.split(">=", 1) for line in required if ">=" in line)
    extra = dict(line.split(">=", 1) for line in optional if ">=" in line)
    return floors | {name: floor for name, floor in extra.items() if _installed(name)}


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def _pins() -> dict[str, str]:
    path = ROOT / "constraints.txt"
    lines = path.read_text().split() if path.is_file() else []
    return dict(line.split("==", 1) for line in lines if "==" in line)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in version.partition("+")[0].split("."))


def cpus(per_task: int) -> Finding:
    """Compare the CPUs that this process may use with those requested."""
    usable = available_cpus()
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    text = f"{usable} CPUs for this process of {os.cpu_count()} in the machine; OMP_NUM_THREADS {threads}"
    values = {"cpus": usable}
    if per_task and usable < per_task:
        advice = "tasks are bound to fewer CPUs than requested: check SLURM_CPU_BIND, --cpu-bind or a cgroup limit"
        return Finding("cpus", "warn", f"{text}; cpus_per_task={per_task}", advice, values)
    return Finding("cpus", "ok", text, values=values)


def memory() -> Finding:
    total = psutil.virtual_memory().total
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(name)
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            total = min(total, int(text))
    text = f"{total / 2**30:.0f} GiB of memory"
    if total < 2**31:
        return Finding(
            "memory", "warn", text, "a rank needs about 1 GiB, and more with networks: request more memory (mem=)"
        )
    return Finding("memory", "ok", text, values={"memory": total})


def limits() -> Iterator[Finding]:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= files < _FILES:
        advice = f"ulimit -n {_FILES} in slurm/env.sh, or setup="
        yield Finding("open files", "warn", f"at most {files} open files for each process", advice)
    else:
        yield Finding("open files", "ok", f"at most {files if files >= 0 else 'any number of'} open files")
    for check, folder, least, advice in (
        (
            "shared memory",
            "/dev/shm",
            _SHARED_MEMORY,
            "decoded images are stored there: a container needs --shm-size or --ipc",
        ),
        ("scratch", os.environ.get("TMPDIR", "/tmp"), _SCRATCH, "set TMPDIR to a folder with enough space"),
    ):
        try:
            free = shutil.disk_usage(folder).free
        except OSError as error:
            yield Finding(check, "warn", f"{folder}: {error.strerror}", advice)
            continue
        text = f"{folder}: {free / 2**30:.1f} GiB free"
        yield Finding(check, "ok" if free >= least else "warn", text, "" if free >= least else advice)
