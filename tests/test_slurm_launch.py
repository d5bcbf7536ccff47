"""launch/submit.py and the shipped scripts on a real SLURM: the same bytes, chains, nothing twice, clear refusals."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from slurm_cluster.cluster import Cluster

from pipeline.partitions.dataset import Dataset
from pipeline.partitions.verify import verify
from pipeline.telemetry.events import last_events

ROOT = Path(__file__).resolve().parents[1]
SUBMIT = [sys.executable, ROOT / "launch/submit.py"]
SHAPES = ["dataset=shapes", "count=120", "partition_size=20", "min_image_size=16"]
TEMPLATE = {"LATENTMILL_HOME": str(ROOT), "OMP_NUM_THREADS": "1", "LOOK": "1"}


def await_end(cluster: Cluster, *jobs: str, seconds: float = 300) -> list[str]:
    """Wait until SLURM has done with the jobs; their states."""
    end = time.monotonic() + seconds
    while cluster.run("squeue", "--noheader", f"--jobs={','.join(jobs)}", check=False).stdout.strip():
        assert time.monotonic() < end, cluster.run("squeue").stdout
        time.sleep(0.2)
    return [field(cluster, job, "JobState") for job in jobs]


def field(cluster: Cluster, job: str, name: str) -> str:
    said = cluster.run("scontrol", "show", "job", "--oneliner", job).stdout
    found = re.search(rf"\b{name}=(\S*)", said)
    assert found, said
    return found[1]


def numbers(text: str) -> list[str]:
    """The job ids that the launcher says."""
    return re.findall(r"submitted(?: before)?: (\d+)", text)


def logs_below(folder: Path) -> str:
    files = sorted([*folder.rglob("*.out"), *folder.rglob("*.log")])
    return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in files)


def content(dataset: Path) -> dict[str, bytes]:
    """Data files and ledgers by name."""
    names = [path for path in dataset.glob("data/*/[0-9]*/*") if path.name != "record.json"]
    return {str(path.relative_to(dataset)): path.read_bytes() for path in names}


def make_image_net(folder: Path) -> None:
    """Three classes of JPEGs in the sizes that such folders have, small; one file is broken."""
    dice = np.random.default_rng(0)
    for name in ("n01440764", "n01443537", "n01484850"):
        (folder / name).mkdir(parents=True)
        for number in range(25):
            width, height = (int(edge) for edge in dice.integers(60, 200, 2))
            pixels = dice.integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
            Image.fromarray(pixels).resize((width, height)).save(folder / name / f"{name}_{number}.JPEG", quality=90)
    (folder / "n01440764/n01440764_99.JPEG").write_bytes(b"no image")


# ---- the same bytes


def test_a_converted_folder_is_the_same_on_two_nodes_and_in_one_process(slurm_cluster: Cluster, tmp_path: Path) -> None:
    make_image_net(tmp_path / "images")
    sizes = "min_image_size=64 max_image_size=100"
    places = {"INPUT": str(tmp_path / "images"), "OUTPUT": str(tmp_path / "out"), "LOGS": str(tmp_path / "logs")}
    environment = {**TEMPLATE, **places, "PARTITION_SIZE": "7", "FORMAT": "mds", "FILTER": sizes}
    options = ["--nodes=2", "--ntasks-per-node=3", "--mem=1G", f"--chdir={tmp_path}"]
    command = ["sbatch", "--parsable", *options, ROOT / "slurm/convert_imagenet.sbatch", "partition_size=10"]
    job = slurm_cluster.run(*command, environment=environment).stdout.strip()

    def here(stage: str, source: str, output: str, *arguments: str) -> None:
        command = [sys.executable, "-m", f"pipeline.stages.{stage}", *arguments]
        command += [f"input={tmp_path / source}", f"output={tmp_path / output}"]
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)

    here("download", "images", "1", "source=image_folder", "captions=none", "partition_size=7")
    here("filter", "1", "2", *sizes.split())
    here("shard", "2", "3", "format=mds", "partition_size=10")
    assert await_end(slurm_cluster, job) == ["COMPLETED"], logs_below(tmp_path)
    assert content(tmp_path / "out") == content(tmp_path / "3")
    there, local = Dataset.open(tmp_path / "out"), Dataset.open(tmp_path / "3")
    assert there.require_success()["content_digest"] == local.require_success()["content_digest"]
    assert list(verify(there)) == []
    assert len(list((tmp_path / "logs").glob(f"convert_imagenet-{job}-[0-5].log"))) == 6


# ---- chains


def test_a_chain_runs_in_order_and_is_not_submitted_twice(slurm_cluster: Cluster, tmp_path: Path) -> None:
    arguments = ["stage=download,filter,shard", *SHAPES, f"data_dir={tmp_path}", "cluster=slurm", "nodes=2"]
    first = slurm_cluster.run(*SUBMIT, *arguments, "tasks_per_node=2", "download.slurm_hold=true").stdout
    jobs = numbers(first)
    assert len(jobs) == 3
    again = slurm_cluster.run(*SUBMIT, *arguments, "tasks_per_node=2").stdout
    assert numbers(again) == jobs
    assert again.count("submitted before") == 3
    dependencies = [
        slurm_cluster.run("squeue", "--noheader", f"--jobs={job}", "--format=%E").stdout for job in jobs[1:]
    ]
    assert all("afterok" in text for text in dependencies)
    slurm_cluster.run("scontrol", "release", jobs[0])
    assert await_end(slurm_cluster, *jobs) == ["COMPLETED"] * 3, logs_below(tmp_path)
    assert Dataset.open(tmp_path / "shapes/train/shard-mds").require_success()["counts"]["kept"] == 120

    once_more = slurm_cluster.run(*SUBMIT, *arguments).stdout
    assert [line.split()[2] for line in once_more.splitlines() if "finished already" in line] == ["filter", "shard"]
    (job,) = numbers(once_more)  # the first stage looks at its source again
    assert await_end(slurm_cluster, job) == ["COMPLETED"]


def test_the_chain_by_scripts_alone(slurm_cluster: Cluster, tmp_path: Path) -> None:
    environment = {**TEMPLATE, "DATASET": "shapes", "DATA_DIR": str(tmp_path), "LOGS": str(tmp_path / "logs")}
    environment |= {"SBATCH_MEM_PER_NODE": "1G", "DOWNLOAD_OPTIONS": "--ntasks-per-node=2 --mem=1G --hold"}
    environment |= {
        "FILTER_OPTIONS": "--ntasks-per-node=2 --nodes=2 --mem=1G",
        "SHARD_OPTIONS": "--mem=1G --ntasks-per-node=1",
    }
    environment |= {"MIN_IMAGE_SIZE": "16", "SBATCH_OUTPUT": str(tmp_path / "%x-%j.out")}
    yaml = tmp_path / "tiny.yaml"
    yaml.write_text("source: shapes\ncount: 60\nimage_size: 32\npartition_size: 20\n")
    environment["DATASET"] = str(yaml)
    environment["FORMAT"] = "tar"
    command = [ROOT / "slurm/pipeline.sh", "download", "filter", "shard"]
    first = slurm_cluster.run(*command, environment=environment).stdout
    second = slurm_cluster.run(*command, environment=environment).stdout
    jobs = re.findall(r"job (\d+)", first)
    assert re.findall(r"job (\d+), submitted before", second) == jobs
    slurm_cluster.run("scontrol", "release", jobs[0])
    assert await_end(slurm_cluster, *jobs) == ["COMPLETED"] * 3, logs_below(tmp_path)
    assert Dataset.open(tmp_path / "tiny/train/shard-tar").require_success()["counts"]["kept"] == 60
    third = slurm_cluster.run(*command[:1], "filter", "shard", environment=environment).stdout
    assert third.splitlines()[:2] == ["filter: finished already", "shard: finished already"]


def test_other_data_and_splits_of_the_same_name_are_other_work(slurm_cluster: Cluster, tmp_path: Path) -> None:
    held = {**TEMPLATE, "DATASET": "shapes", "DOWNLOAD_OPTIONS": "--hold --output=/dev/null"}
    pipeline = [ROOT / "slurm/pipeline.sh", "download"]
    said = [
        slurm_cluster.run(*pipeline, environment={**held, "DATA_DIR": str(tmp_path / place), **more}).stdout
        for place, more in (("a", {}), ("b", {}), ("b", {"SPLIT": "valid"}), ("a", {}))
    ]
    jobs = [re.findall(r"download: job (\d+)", text)[0] for text in said]
    assert len(set(jobs)) == 3 and jobs[3] == jobs[0] and "submitted before" in said[3]


def test_after_a_failed_stage_the_next_does_not_run(slurm_cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(b"no image")
    arguments = ["stage=download,filter,shard", "dataset=image_folder", f"input={tmp_path / 'images'}"]
    arguments += [f"data_dir={tmp_path}", "cluster=slurm", "max_failed_fraction=0", "lives=1"]
    jobs = numbers(slurm_cluster.run(*SUBMIT, *arguments).stdout)
    states = await_end(slurm_cluster, *jobs)
    assert states[1:] == ["FAILED", "CANCELLED"], logs_below(tmp_path)
    assert "Giving up: nothing got done in 1 lives in a row (LIVES=1)" in logs_below(tmp_path)
    assert not (tmp_path / "image_folder/train/shard-mds").exists()


def test_a_stage_that_slurm_starts_all_the_same_says_what_it_waits_for(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """``afterok`` of a job that was never there, or that SLURM has forgotten, counts as fulfilled."""
    environment = {**TEMPLATE, "INPUT": str(tmp_path / "filter"), "OUTPUT": str(tmp_path / "shards")}
    options = ["--dependency=afterok:999999", "--kill-on-invalid-dep=yes", "--ntasks-per-node=2", "--mem=1G"]
    command = ["sbatch", "--parsable", *options, f"--chdir={tmp_path}", ROOT / "slurm/shard.sbatch"]
    job = slurm_cluster.run(*command, environment=environment).stdout.strip()
    assert await_end(slurm_cluster, job) == ["FAILED"]
    assert field(slurm_cluster, job, "ExitCode") == "2:0"
    assert field(slurm_cluster, job, "Restarts") == "0"
    said = logs_below(tmp_path)
    assert re.search(r"stage shard cannot start: \S+/filter", said), said
    assert "Not started again: a setting is wrong or something is missing" in said


# ---- submitting


def test_what_sbatch_refuses_is_one_line(slurm_cluster: Cluster, tmp_path: Path) -> None:
    arguments = ["stage=download", *SHAPES[:2], f"data_dir={tmp_path}", "cluster=slurm", "partition=nowhere"]
    done = slurm_cluster.run(*SUBMIT, *arguments, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: download: invalid partition specified: nowhere; "
        "Batch job submission failed: Invalid partition name specified"
    )
    rehearsed = slurm_cluster.run(*SUBMIT, *arguments, "dry_run=true", check=False)
    assert rehearsed.returncode == 1
    assert "refused: invalid partition specified: nowhere" in rehearsed.stdout


def test_a_job_that_waits_is_told_with_its_own_size_and_settings(slurm_cluster: Cluster, tmp_path: Path) -> None:
    arguments = ["stage=download", "dataset=shapes", f"data_dir={tmp_path / 'new'}", "cluster=slurm", "slurm_hold=true"]
    first = slurm_cluster.run(*SUBMIT, *arguments, "count=20").stdout
    (job,) = numbers(first)
    again = slurm_cluster.run(*SUBMIT, *arguments, "count=20", "nodes=2", "tasks_per_node=3", "hang_timeout=99").stdout
    assert re.search(rf"submitted before: {job} +download +1 node x 1 rank ", again)
    assert "it has 1 node x 1 rank, 2 nodes x 3 ranks is asked for now" in again
    assert "it has hang_timeout=unset, now 99" in again
    other = slurm_cluster.run(*SUBMIT, *arguments, "count=40", check=False)
    assert (other.returncode, other.stdout) == (2, "")
    assert f"download: job {job} is in the queue for {tmp_path}/new/shapes/train/download with count=20, now 40" in (
        other.stderr
    )
    # the line that it advises to watch by works before anything is there
    (watch,) = re.findall(r"watch: python (.*)", first)
    shown = slurm_cluster.run(sys.executable, ROOT / watch.split()[0], *watch.split()[1:]).stdout
    assert "held by its user" in shown


def test_what_cannot_work_is_said_before_anything_is_submitted(slurm_cluster: Cluster, tmp_path: Path) -> None:
    plan = ["stage=download", "dataset=shapes", "count=20", f"data_dir={tmp_path}"]
    subprocess.run([*SUBMIT, *plan], check=True, capture_output=True)
    (tmp_path / "begun").mkdir()
    for arguments, message in (
        (["stage=download", "dataset=image_folder", "input=/nope"], "input=/nope: there is no such file or folder"),
        (["stage=download", "dataset=shapes", "count=30"], "was made with count=20, now count=30 is requested"),
        (["stage=filter,shard", "dataset=shapes", "input=/nope"], "input=/nope: there is no such file or folder"),
        (["stage=download", "dataset=shapes", "count=20", "after=999999"], "SLURM does not know job 999999"),
        (["stage=download", "dataset=shapes", "count=20", "notify=mailto:me"], "notify=: expected a URL"),
    ):
        done = slurm_cluster.run(*SUBMIT, *arguments, f"data_dir={tmp_path}", "cluster=slurm", check=False)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert slurm_cluster.run("squeue", "--noheader").stdout == ""


def test_a_finished_first_stage_is_looked_at_by_one_process(slurm_cluster: Cluster, tmp_path: Path) -> None:
    plan = ["stage=download", "dataset=shapes", "count=20", f"data_dir={tmp_path}"]
    subprocess.run([*SUBMIT, *plan], check=True, capture_output=True)
    said = slurm_cluster.run(*SUBMIT, *plan, "cluster=slurm", "array=5", "tasks_per_node=4").stdout
    (job,) = numbers(said)
    assert "1 node x 1 rank" in said
    assert await_end(slurm_cluster, job) == ["COMPLETED"]


OPTIONS = [
    "nodes=2",
    "gpus=h100:4",
    "gres=gpu:h100:2",
    "gpu_bind=closest",
    "cpu_bind=ldoms",
    "mem_bind=local",
    "licenses=matlab:2",
    "nice=100",
    "comment=for the paper",
    "begin=now+1hour",
    "mail_user=me@example.org",
    "mail_type=ALL",
    "slurm_dependency=singleton",
    "slurm_exclusive=true",
]


def test_slurm_understands_every_option(slurm_cluster: Cluster, tmp_path: Path) -> None:
    plan = ["stage=precompute", "dataset=shapes", f"data_dir={tmp_path}", f"input={tmp_path}", "cluster=slurm"]
    options = [option for option in OPTIONS if not option.startswith("gres=")]
    said = slurm_cluster.run(*SUBMIT, *plan, *options, "dry_run=true").stdout
    assert re.search(r"# ==== precompute: Job \d+ to start at", said), said
    assert "#SBATCH --gpus-per-node=h100:2" in said and "--gpu-bind=closest" in said
    other = [option for option in OPTIONS if not option.startswith("gpus=")]
    assert "#SBATCH --gpus-per-node=h100:2" in slurm_cluster.run(*SUBMIT, *plan, *other, "dry_run=true").stdout
    slurm_cluster.run("srun", "--cpu-bind=ldoms", "--mem-bind=local", "true")  # which sbatch knows nothing of
    for wrong in ("gpus_per_node=a100:1", "licenses=matlab:99", "begin=teatime2"):
        done = slurm_cluster.run(*SUBMIT, *plan, wrong, "dry_run=true", check=False)
        assert done.returncode == 1 and "refused: " in done.stdout, wrong


def test_slurm_takes_every_line_of_the_scripts(slurm_cluster: Cluster) -> None:
    """Those that are recorded and those that come with the checkout. Only their sizes are too much for these nodes."""
    small = ["--partition=main", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--mem=100M"]
    scripts = [*(ROOT / "tests/data").glob("*.sbatch"), *(ROOT / "slurm").glob("*.sbatch")]
    assert len(scripts) >= 10
    for script in scripts:
        gpus = ["--gpus-per-node=h100:1"] if "--gpus-per-node" in script.read_text() else []
        done = slurm_cluster.run("sbatch", "--test-only", *small, *gpus, script, check=False)
        assert done.returncode == 0 and re.search(r"Job \d+ to start at", done.stderr), f"{script}: {done.stderr}"


def test_of_several_partitions_the_first_that_has_room_is_taken(slurm_cluster: Cluster, tmp_path: Path) -> None:
    plan = ["stage=download", "dataset=shapes", "count=20", "cluster=slurm", "slurm_hold=true", "notify=http://x.org/"]
    said = slurm_cluster.run(*SUBMIT, *plan, f"data_dir={tmp_path / 'a'}", "partition=nowhere,main,high").stdout
    assert "not in partition nowhere: " in said and "partition main: the first that can start it now" in said
    (job,) = numbers(said)
    assert field(slurm_cluster, job, "Partition") == "main"
    last = [*plan, f"data_dir={tmp_path / 'b'}", f"after={job}", "partition=high,main", "mail_user=me@example.org"]
    (second,) = numbers(slurm_cluster.run(*SUBMIT, *last).stdout)
    assert f"afterok:{job}" in field(slurm_cluster, second, "Dependency")
    slurm_cluster.run("scancel", second, job)
    end = time.monotonic() + 20
    mails = slurm_cluster.root / "log/mail"
    while not (mails.exists() and f"Job_id={second}" in mails.read_text()):
        assert time.monotonic() < end, mails.read_text() if mails.exists() else "no mail"
        time.sleep(0.2)
    assert "me@example.org" in mails.read_text()


def test_a_chain_is_submitted_whole_though_nobody_reads_what_is_printed(slurm_cluster: Cluster, tmp_path: Path) -> None:
    plan = ["stage=download,filter,shard", *SHAPES, f"data_dir={tmp_path}", "cluster=slurm", "slurm_hold=true"]
    words = " ".join(str(word) for word in [*SUBMIT, *plan])
    done = slurm_cluster.run("bash", "-c", f"set -o pipefail; {words} | true", check=False)
    assert done.stderr == ""
    assert len(slurm_cluster.run("squeue", "--noheader").stdout.splitlines()) == 3


def test_a_dry_run_asks_slurm_and_submits_nothing(slurm_cluster: Cluster, tmp_path: Path) -> None:
    arguments = ["stage=download", "dataset=shapes", f"data_dir={tmp_path}", "cluster=slurm", "nodes=2", "dry_run=true"]
    said = slurm_cluster.run(*SUBMIT, *arguments).stdout
    assert "#SBATCH --nodes=2" in said
    assert re.search(r"Job \d+ to start at \S+ using 2 processors on nodes \S+", said)
    assert slurm_cluster.run("squeue", "--noheader").stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_from_inside_of_a_job_the_new_one_gets_what_was_asked_for(slurm_cluster: Cluster, tmp_path: Path) -> None:
    arguments = ["stage=download", "dataset=shapes", "count=20", f"data_dir={tmp_path}", "cluster=slurm", "nodes=1"]
    said = slurm_cluster.run("srun", "--nodes=2", "--ntasks=2", "--kill-on-bad-exit=0", "bash", "-c",
                             '[ "$SLURM_PROCID" = 1 ] || exec "$@"', "bash", *SUBMIT, *arguments).stdout  # fmt: skip
    (job,) = numbers(said)
    assert await_end(slurm_cluster, job) == ["COMPLETED"], logs_below(tmp_path)
    assert (field(slurm_cluster, job, "NumNodes"), field(slurm_cluster, job, "NumTasks")) == ("1", "1")


def test_a_submission_waits_for_a_controller_that_is_away(slurm_cluster: Cluster, tmp_path: Path) -> None:
    arguments = ["stage=download", "dataset=shapes", "count=20", f"data_dir={tmp_path}", "cluster=slurm"]
    slurm_cluster.controller("kill")
    with ThreadPoolExecutor() as pool:
        future = pool.submit(slurm_cluster.run, *SUBMIT, *arguments)
        time.sleep(2)
        slurm_cluster.controller("start")
        done = future.result()
    assert await_end(slurm_cluster, *numbers(done.stdout)) == ["COMPLETED"], logs_below(tmp_path)


def test_the_elements_of_an_array_share_the_work(slurm_cluster: Cluster, tmp_path: Path) -> None:
    arguments = [
        "stage=download,filter",
        *SHAPES,
        f"data_dir={tmp_path}",
        "cluster=slurm",
        "array=3",
        "tasks_per_node=2",
    ]
    jobs = numbers(slurm_cluster.run(*SUBMIT, *arguments, "array_parallelism=2").stdout)
    assert "afterany" in slurm_cluster.run("squeue", "--noheader", f"--jobs={jobs[1]}", "--format=%E").stdout
    await_end(slurm_cluster, *jobs)
    said = list(last_events(tmp_path / "shapes/train/download"))
    assert len(said) >= 2 and {event["world_size"] for event in said} == {6}
    assert len({event["rank"] for event in said}) == len(said) and {event["rank"] for event in said} <= {*range(6)}
    logs = tmp_path / "shapes/train/logs/download.slurm"
    assert len(list(logs.glob("download-*-[01].log"))) == 6
    assert Dataset.open(tmp_path / "shapes/train/filter").require_success()["counts"]["kept"] == 120


def test_the_largest_array_that_is_asked_for_is_one_that_slurm_takes(slurm_cluster: Cluster) -> None:
    from launch import slurm

    before = dict(os.environ)
    os.environ.update(slurm_cluster.environment)
    try:
        size = slurm.max_array_size()
    finally:
        os.environ.clear()
        os.environ.update(before)
    for number, accepted in ((size, True), (size + 1, False)):
        command = ("sbatch", "--test-only", f"--array=0-{number - 1}", "--wrap", "true")
        assert (slurm_cluster.run(*command, check=False).returncode == 0) is accepted
