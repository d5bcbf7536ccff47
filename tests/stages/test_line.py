"""The main line on small data: any number of ranks, any number of deaths, the same bytes; and readable by others."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from stages.conftest import digests, run_stage

from pipeline.distributed import Rank
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.verify import verify
from pipeline.stages.repair import repair

LINE = ("download", "filter", "shard", "precompute")
SETTINGS = ["dataset=shapes", "count=90", "download.partition_size=20", "shard.partition_size=25"]
SETTINGS += ["image_size=64", "batch_size=10"]


def launch(data: Path, stages: str, ranks: int, *more: str) -> subprocess.CompletedProcess[str]:
    keys = [key for key in SETTINGS if stages != "shard" or "download" not in key]
    command = [
        sys.executable,
        "launch/submit.py",
        f"stage={stages}",
        f"data_dir={data}",
        f"ranks={ranks}",
        *keys,
        *more,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def outputs(data: Path) -> dict[str, Path]:
    place = data / "shapes" / "train"
    names = {"shard": "shard-mds", "precompute": "precompute-embedded16"}
    return {stage: place / names.get(stage, stage) for stage in LINE}


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The main line up to the latents, by one rank."""
    data = tmp_path_factory.mktemp("one")
    done = launch(data, ",".join(LINE), 1)
    assert done.returncode == 0, done.stdout + done.stderr
    return data


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_gives_the_same_bytes(line: Path, tmp_path: Path, ranks: int) -> None:
    done = launch(tmp_path, ",".join(LINE), ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    for stage, output in outputs(tmp_path).items():
        assert digests(output) == digests(outputs(line)[stage]), stage
        assert Dataset.open(output).require_success()["counts"]["kept"] == 90


def test_killed_ranks_lose_and_double_nothing(line: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments, then the same command again, until it goes through."""
    moments = random.Random(5)
    output = tmp_path / "filter"
    arguments = [f"input={outputs(line)['download']}", f"output={output}", "min_image_size=64", "lease=1"]
    for _ in range(6):
        ranks = [_rank("filter", arguments, rank, 2) for rank in range(2)]
        time.sleep(0.4 + moments.random() * 1.2)
        for process in ranks:
            process.send_signal(signal.SIGKILL)
            process.wait()
    for process in [_rank("filter", arguments, rank, 2) for rank in range(2)]:
        assert process.wait(timeout=120) == 0
    assert digests(output) == digests(outputs(line)["filter"])
    assert list(verify(Dataset.open(output))) == []


def _rank(stage: str, arguments: list[str], rank: int, world_size: int) -> subprocess.Popen[bytes]:
    env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    command = [sys.executable, "-m", f"pipeline.stages.{stage}", *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_two_runs_at_once_on_one_output_give_one_result(line: Path, tmp_path: Path) -> None:
    arguments = [f"input={outputs(line)['download']}", f"output={tmp_path / 'filter'}", "min_image_size=64"]
    runs = [_rank("filter", arguments, 0, 1) for _ in range(3)]
    assert [process.wait(timeout=120) for process in runs] == [0, 0, 0]
    assert digests(tmp_path / "filter") == digests(outputs(line)["filter"])


def test_streaming_reads_shards_and_latents_as_they_are(line: Path) -> None:
    np = pytest.importorskip("numpy")
    streaming = pytest.importorskip("streaming")
    for stage in ("shard", "precompute"):
        place = str(outputs(line)[stage])
        dataset = streaming.StreamingDataset(local=place, shuffle=False, batch_size=1, validate_hash="xxh3_128")
        samples = [dataset[i] for i in range(len(dataset))]
        assert len({sample["key"] for sample in samples}) == 90
    assert set(samples[0]) == {"key", "caption", "caption_latents", "latents_64", "min_side"}
    extra = json.loads((outputs(line)["precompute"] / "manifest.json").read_text())
    latents = np.frombuffer(samples[0]["latents_64"], extra["dtype"]).reshape(extra["shapes"]["latents_64"])
    assert latents.shape == (16, 8, 8)
    assert np.isfinite(latents).all()


def test_webdataset_and_tar_read_the_filtered_samples(line: Path) -> None:
    files = sorted(outputs(line)["filter"].glob("data/*/*/*.tar"))
    with tarfile.open(files[0]) as archive:
        names = archive.getnames()
    assert names[:3] == ["shapes/00000000.png", "shapes/00000000.txt", "shapes/00000000.json"]
    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset([str(f) for f in files], shardshuffle=False, empty_check=False))
    assert len(samples) == 90
    assert samples[0]["txt"].decode().startswith("a ")


def test_shuffling_is_of_the_whole_data_set_and_keyed_by_the_seed(line: Path, run, tmp_path: Path) -> None:
    def keys(name: str, **settings: object) -> list[str]:
        output = tmp_path / name
        run("shard", input=str(outputs(line)["filter"]), output=str(output), partition_size=25, **settings)
        dataset = Dataset.open(output)
        return [stored.key for index in range(dataset.partitions) for stored in dataset.samples(index)]

    plain, one, again, other = (
        keys("plain"),
        keys("one", shuffle=True, seed=1),
        keys("again", shuffle=True, seed=1),
        keys("other", shuffle=True, seed=2),
    )
    assert plain == sorted(plain)
    assert one == again != other
    assert sorted(one) == sorted(other) == plain
    assert len({key for key in one[:23] if key > plain[44]}) > 5  # the first partition holds samples of the second half


@pytest.mark.parametrize("stage", LINE)
def test_a_flipped_byte_or_a_lost_file_anywhere_is_found_and_mended(line: Path, tmp_path: Path, stage: str) -> None:
    """Of every kind of file there is."""
    source = outputs(line)[stage]
    before = Dataset.open(source).require_success()["content_digest"]
    output = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(source), str(output)], check=True)
    place = random.Random(stage)
    kinds = [
        "data/000/00001/record.json",
        "data/000/00001/ledger.parquet",
        "manifest.parquet",
        "manifest.json",
        "_SUCCESS",
    ]
    kinds += [str(p.relative_to(output)) for p in output.glob("data/000/00002/*") if p.suffix in (".tar", ".mds")][:1]
    kinds += ["index.json"] if (output / "index.json").exists() else []
    for kind in kinds:
        path = output / kind
        data = bytearray(path.read_bytes())
        data[place.randrange(len(data))] ^= 1 << place.randrange(8)
        path.write_bytes(data)
    (output / "data/000/00003/ledger.parquet").unlink()
    findings = list(verify(Dataset.open(output)))
    assert {1, 2, 3} <= {finding.partition for finding in findings}
    assert any(finding.partition == -1 for finding in findings)
    after = repair(output, Rank())
    assert after is not None
    assert after["content_digest"] == before
    assert list(verify(Dataset.open(output))) == []


def test_memory_does_not_grow_with_the_data_set(tmp_path: Path) -> None:
    """Peak memory of filter and shard on 1,000 and on 20,000 samples."""
    peaks: dict[str, list[int]] = {"filter": [], "shard": []}
    for count in (1000, 20_000):
        data = tmp_path / str(count)
        settings = {"source": "shapes", "count": count, "image_size": 16, "partition_size": 500}
        run_stage("download", output=str(data / "download"), **settings)
        for stage, upstream, more in (
            ("filter", "download", ["min_image_size=8"]),
            ("shard", "filter", ["partition_size=500", "shuffle=true"]),
        ):
            command = [sys.executable, "-m", f"pipeline.stages.{stage}", *more]
            command += [f"input={data / upstream}", f"output={data / stage}"]
            peaks[stage].append(_peak(command))
    for stage, (small, large) in peaks.items():
        assert large < small * 1.25 + 16 * 2**20, f"{stage}: {small >> 20} MiB, then {large >> 20} MiB"


def _peak(command: list[str]) -> int:
    """Peak resident memory of a command in bytes."""
    program = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stderr=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    )
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, check=True)
    return int(done.stdout)
