"""stage=recaption: new captions next to the old ones, the same for any number of ranks, each answer paid once."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from captioning.server import KEY, Server, serving
from fake_stage import assert_sound, leftovers, make, outcomes, run_ranks
from PIL import Image
from stages.conftest import digests, run_stage

from pipeline.config.cli import load
from pipeline.config.schema import ConfigError
from pipeline.distributed import Rank
from pipeline.partitions import engine
from pipeline.partitions.dataset import Dataset, Stored
from pipeline.partitions.finalize import records
from pipeline.stages.recaption import Recaption
from pipeline.stages.takedown import takedown
from pipeline.stages.trace import stations
from pipeline.stages.verify import findings_of
from pipeline.storage import StorageError

COUNT = 14
BROKEN = "005-png"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of different sizes with one or two captions, downloaded: the file of number 5 is cut."""
    folder = tmp_path_factory.mktemp("recaption")
    (folder / "images").mkdir()
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 256, (40 + number, 64, 3), np.uint8)
        path = folder / "images" / f"{number:03d}.png"
        Image.fromarray(pixels).save(path)
        path.with_suffix(".txt").write_text(f"image {number}")
        if number == 5:
            path.write_bytes(path.read_bytes()[:500])
    run_stage(
        "download",
        source="image_folder",
        input=str(folder / "images"),
        output=str(folder / "download"),
        partition_size=4,
        captions="txt",
        copy=True,
    )
    return folder


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving() as running:
        yield running


def asked(server: Server, **settings: Any) -> dict[str, Any]:
    """Settings that ask ``server`` with prompts that begin with the sample's key."""
    common = {
        "captioner": f"openai:{server.url}",
        "served_model": "tiny-vl",
        "caption_prompt": ("{key} what is it?",),
        "workers": 0,
    }
    return {**common, "max_failed_fraction": 1.0, **settings}


def recaption(place: Path, output: Path, **settings: Any) -> dict[str, Any]:
    return run_stage("recaption", input=str(place / "download"), output=str(output), **settings)


def samples(place: Path) -> Iterator[Stored]:
    dataset = Dataset.open(place)
    return (stored for index in range(dataset.partitions) for stored in dataset.samples(index) if stored.file)


def rows(place: Path) -> dict[str, dict[str, Any]]:
    return {stored.key: stored.read() for stored in samples(place)}


def noted(place: Path) -> Counter[str]:
    total: Counter[str] = Counter()
    for record in records(Dataset.open(place)):
        total.update(record["notes"].get("noted", {}))
    return total


def totals(place: Path) -> Counter[str]:
    total: Counter[str] = Counter()
    for record in records(Dataset.open(place)):
        total.update({name: record["notes"]["captioning"][name] for name in ("captions", "requests", "prompt_tokens")})
    return total


def assert_nothing_left(output: Path) -> None:
    """No journal, and nothing else that counts for nothing."""
    assert leftovers(output) == ["partial"] and not any(path.is_file() for path in (output / "partial").rglob("*"))


# ---- a server


def test_new_captions_stand_beside_the_old_ones(place: Path, server: Server, tmp_path: Path) -> None:
    recaption(place, tmp_path / "out", **asked(server))
    assert_sound(tmp_path / "out")
    found, before = rows(tmp_path / "out"), rows(place / "download")
    assert len(found) == COUNT - 1
    for key, row in found.items():
        new, old = row["captions"]
        assert row["caption"] == new and new.endswith(f"asked about {key}.")
        assert [old] == before[key]["captions"]
        assert row["caption_sources"] == ["recaption", "original"]
        assert row["recaptions"] == [
            {"source": "recaption", "caption": new, "model": "tiny-vl", "prompt": f"{key} what is it?"}
        ]
        assert row["jpg"] == before[key]["jpg"]
    assert outcomes(tmp_path / "out")[BROKEN].startswith("failed:")
    assert totals(tmp_path / "out") == {"captions": 13, "requests": 13, "prompt_tokens": 1300}
    assert_nothing_left(tmp_path / "out")


def test_the_body_of_a_request_is_that_of_a_chat(place: Path, server: Server, tmp_path: Path) -> None:
    recaption(place, tmp_path / "out", **asked(server, system="Be brief.", max_tokens=77, image_edge=32))
    _, _, body = server.asked[0]
    system, user = body["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    assert [part["type"] for part in user["content"]] == ["text", "image_url"]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("tiny-vl", 77, 0.0)
    assert all("of 32 by" in row["caption"] for row in rows(tmp_path / "out").values())
    assert server.authorization == {f"Bearer {KEY}"}


def test_the_key_is_nowhere_in_the_output(
    place: Path, server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recaption(place, tmp_path / "out", **asked(server))
    assert server.authorization == {f"Bearer {KEY}"}
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 10 and not any(KEY.encode() in path.read_bytes() for path in files)
    server.always = "401"
    with pytest.raises(ConfigError, match="OPENAI_API_KEY") as raised:
        recaption(place, tmp_path / "again", **asked(server))
    assert KEY not in str(raised.value) and "Incorrect API key provided: ..." in str(raised.value)
    assert KEY not in "".join(capfd.readouterr())


GOOD = ("500", "503", "429", "no_json", "no_choices", "list", "nested", "number", "huge", "hang_up", "redirect")


@pytest.mark.parametrize("behaviour", [b for b in GOOD if b != "redirect"])
def test_what_may_pass_is_tried_again(place: Path, server: Server, tmp_path: Path, behaviour: str) -> None:
    server.script["000-png"] = [behaviour]
    recaption(place, tmp_path / "out", **asked(server))
    assert outcomes(tmp_path / "out")["000-png"] == "kept:"
    first, second = server.times("000-png")
    assert second - first > (1.0 if behaviour == "429" else 0.2)
    assert totals(tmp_path / "out")["requests"] == COUNT


def test_a_server_that_stalls_is_asked_again(place: Path, server: Server, tmp_path: Path) -> None:
    server.script["000-png"] = ["stall"]
    recaption(place, tmp_path / "out", **asked(server, timeout=0.5))
    assert outcomes(tmp_path / "out")["000-png"] == "kept:"


@pytest.mark.parametrize(
    ("behaviour", "reason", "requests"),
    [
        ("refuse", "refusal", 3),
        ("refusal_field", "refusal", 3),
        ("filtered", "refusal", 3),
        ("loop", "loop", 3),
        ("cut_at_once", "cut_off", 3),
        ("empty", "empty", 3),
        ("null", "empty", 3),
        ("500", "http_500", 2),
        ("400", "http_400", 1),
        ("redirect", "http_307", 1),
        ("no_json", "bad_answer", 2),
        ("hang_up", "server_unreachable", 2),
    ],
)
def test_what_does_not_pass_is_a_failure_with_its_reason(
    place: Path, server: Server, tmp_path: Path, behaviour: str, reason: str, requests: int
) -> None:
    server.script["000-png"] = [behaviour] * 20
    recaption(place, tmp_path / "out", **asked(server, retries=1))
    said = outcomes(tmp_path / "out")
    assert said["000-png"] == f"failed:{reason}"
    assert sum(what == "kept:" for what in said.values()) == COUNT - 2
    assert len(server.times("000-png")) == requests
    server.script.clear()
    recaption(place, tmp_path / "out", **asked(server, retries=1), retry_failed=True)
    assert outcomes(tmp_path / "out")["000-png"] == "kept:"
    assert server.answered["000-png"] == 1 and max(server.answered.values()) == 1, "others are not asked again"
    assert_sound(tmp_path / "out")


def test_an_answer_that_is_no_caption_is_asked_for_again_at_another_temperature(
    place: Path, server: Server, tmp_path: Path
) -> None:
    server.script["000-png"] = ["refuse", "loop"]
    server.script["001-png"] = ["cut"]
    server.script["002-png"] = ["parts"]
    server.script["003-png"] = ["bad_usage"]
    recaption(place, tmp_path / "out", **asked(server, retry_temperature=0.9))
    bodies = [body for _, name, body in server.asked if name == "000-png"]
    assert [body["temperature"] for body in bodies] == [0.0, 0.9, 0.9]
    assert len({body["seed"] for body in bodies}) == 3
    assert rows(tmp_path / "out")["001-png"]["caption"] == "A dog runs over a lawn."
    assert rows(tmp_path / "out")["002-png"]["caption"] == "A dog in parts."
    assert noted(tmp_path / "out") == {
        "caption_refusal": 1,
        "caption_loop": 1,
        "caption_shortened": 1,
        "tokens_not_counted": 1,
    }


def test_samples_without_a_new_caption_may_keep_theirs(place: Path, server: Server, tmp_path: Path) -> None:
    server.script["000-png"] = ["refuse"] * 3
    server.script["001-png"] = ["500"] * 9
    recaption(place, tmp_path / "out", **asked(server, without_caption="keep", retries=1))
    row = rows(tmp_path / "out")["000-png"]
    assert row["captions"] == ["image 0"] and row["caption_sources"] == ["original"] and row["recaptions"] == []
    assert outcomes(tmp_path / "out")["001-png"] == "failed:http_500", "it can be had when the server works again"


def test_several_captions_by_several_prompts(place: Path, server: Server, tmp_path: Path) -> None:
    settings = asked(
        server, caption_prompt=("{key} short", "{key} long {caption}"), captions_per_prompt=2, first="original"
    )
    recaption(place, tmp_path / "out", **settings)
    row = rows(tmp_path / "out")["007-png"]
    assert row["caption"] == "image 7" and len(row["captions"]) == 5
    assert row["caption_sources"] == ["original"] + ["recaption"] * 4
    prompts = [entry["prompt"] for entry in row["recaptions"]]
    assert prompts == ["007-png short"] * 2 + ["007-png long image 7"] * 2
    assert len({body["seed"] for _, name, body in server.asked if name == "007-png"}) == 4


def test_no_more_requests_at_a_time_than_asked_for(place: Path, server: Server, tmp_path: Path) -> None:
    server.delay = 0.05
    recaption(place, tmp_path / "out", **asked(server, connections=3))
    assert server.most_at_once == 3


def test_requests_keep_their_distance(place: Path, server: Server, tmp_path: Path) -> None:
    recaption(place, tmp_path / "out", **asked(server, requests_per_minute=1200))
    times = sorted(when for when, _, _ in server.asked)
    assert times[-1] - times[0] >= 0.9 * 0.05 * (len(times) - 1)


def test_tokens_keep_to_their_limit(place: Path, server: Server, tmp_path: Path) -> None:
    recaption(place, tmp_path / "out", **asked(server, tokens_per_minute=110 * 60 * 10, connections=1))
    times = sorted(when for when, _, _ in server.asked)
    assert times[-1] - times[0] >= 0.9 * 0.1 * (len(times) - 1)


def test_a_busy_server_is_left_alone_by_all_connections(place: Path, server: Server, tmp_path: Path) -> None:
    server.script["000-png"] = ["429"]
    recaption(place, tmp_path / "out", **asked(server, connections=1))
    times = sorted(when for when, _, _ in server.asked)
    assert times[1] - times[0] >= 1.0


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [("401", "api_key_env=OPENAI_API_KEY"), ("404", "does not exist"), ("no_money", "no credit or quota left")],
)
def test_what_a_person_must_mend_ends_the_run(
    place: Path, server: Server, tmp_path: Path, behaviour: str, message: str
) -> None:
    server.always = behaviour
    with pytest.raises(ConfigError, match=message):
        recaption(place, tmp_path / "out", **asked(server, connections=1))
    assert len(server.asked) == 1
    server.always = ""
    recaption(place, tmp_path / "out", **asked(server))
    assert_sound(tmp_path / "out")


def test_a_server_that_is_down_fails_the_run_not_the_samples(
    place: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.captioning.openai._SILENT", 3)
    server.always = "hang_up"
    with pytest.raises(StorageError, match="none of the first 3 requests was answered"):
        recaption(place, tmp_path / "out", **asked(server, retries=0))
    server.always = ""
    recaption(place, tmp_path / "out", **asked(server))
    assert sum(what == "kept:" for what in outcomes(tmp_path / "out").values()) == COUNT - 1


def test_a_budget_of_tokens_ends_the_run_and_a_larger_one_goes_on(place: Path, server: Server, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="token_budget=500 is spent"):
        recaption(place, tmp_path / "out", **asked(server, token_budget=500, connections=1))
    assert 5 <= len(server.asked) <= 6
    recaption(place, tmp_path / "out", **asked(server, token_budget=13 * 110 + 1, connections=1))
    assert_sound(tmp_path / "out")
    assert max(server.answered.values()) == 1 and sum(server.answered.values()) == COUNT - 1
    assert totals(tmp_path / "out")["prompt_tokens"] == 1300


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"captioner": ""}, "expected transformers"),
        ({"captioner": "gpt:x"}, "captioner=gpt"),
        ({"captioner": "openai:nowhere"}, "expected a base URL"),
        ({"captioner": "openai:http://me:secret@host/v1"}, "leave secrets"),
        ({"served_model": ""}, "served_model=<name of the model on the server>; the server has tiny-vl, other"),
        ({"caption_prompt": ("{nothing}",)}, "no column nothing"),
        ({"caption_prompt": ("{",)}, "alone; write"),
        ({"caption_source": "original"}, "has captions of this name"),
        ({"captioner": "transformers:/nowhere/at/all"}, "cannot be loaded"),
        ({"captioner": "checkpoint:/nowhere/at/all"}, "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_asked(
    place: Path, server: Server, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        recaption(place, tmp_path / "out", **(asked(server) | settings))
    assert "secret" not in str(raised.value).replace("leave secrets", "")
    assert not server.asked


def test_settings_of_another_captioner_are_refused() -> None:
    with pytest.raises(ConfigError, match="captioner=openai"):
        load("recaption", ["captioner=transformers:x", "token_budget=5"])
    with pytest.raises(ConfigError, match="captioner=transformers"):
        load("recaption", ["captioner=openai:http://host/v1", "batch_size=5"])


def test_the_same_model_elsewhere_is_the_same(place: Path, server: Server, tmp_path: Path) -> None:
    recaption(place, tmp_path / "out", **asked(server))
    moved = asked(server) | {"captioner": "openai:http://other.example/v1"}
    assert recaption(place, tmp_path / "out", **moved)["counts"]["kept"] == COUNT - 1
    with pytest.raises(ConfigError, match="served_model=tiny-vl"):
        recaption(place, tmp_path / "out", **moved | {"served_model": "other"})


# ---- kills


def command(place: Path, output: Path, server: Server) -> list[str]:
    given = asked(server, connections=2) | {"input": str(place / "download"), "output": str(output), "lease": 1}
    given["caption_prompt"] = '["{key} what is it?"]'
    return [sys.executable, "-m", "pipeline.stages.recaption", *(f"{name}={value}" for name, value in given.items())]


@pytest.mark.parametrize("delay", [0.6, 1.1])
def test_no_answer_is_paid_twice_when_a_rank_is_killed(
    place: Path, server: Server, tmp_path: Path, delay: float
) -> None:
    server.delay = 0.15
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    lives = 0
    while not (tmp_path / "out/_SUCCESS").exists() and lives < 20:
        process = subprocess.Popen(command(place, tmp_path / "out", server), env=environment)
        before, lives = len(server.asked), lives + 1
        while process.poll() is None and len(server.asked) == before:
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 1 < lives < 20
    assert_sound(tmp_path / "out")
    assert len(server.answered) == COUNT - 1
    lost = sum(server.answered.values()) - len(server.answered)
    assert lost <= 2 * (lives - 1), "only what was under way when a rank died is asked again"
    list_of_times: dict[str, list[float]] = {key: server.times(key) for key in server.answered}
    assert all(len(times) <= lives for times in list_of_times.values())
    assert_nothing_left(tmp_path / "out")


def test_of_a_committed_partition_nothing_is_asked_again(place: Path, server: Server, tmp_path: Path) -> None:
    output = tmp_path / "out"
    stage = make(output, Recaption, input=str(place / "download"), **asked(server))
    engine.run(stage)
    first = Counter(name for _, name, _ in server.asked)
    for name in ("_SUCCESS", "manifest.parquet", "manifest.json"):
        (output / name).unlink()
    shutil.rmtree(output / "data/000/00002")
    shutil.rmtree(output / "claims")
    (output / "claims").mkdir()
    recaption(place, output, **asked(server))
    again = Counter(name for _, name, _ in server.asked) - first
    assert set(again) == {f"{number:03d}-png" for number in range(8, 12)}


def test_a_damaged_journal_is_no_answer(place: Path, server: Server, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is spent"):
        recaption(place, tmp_path / "out", **asked(server, token_budget=300, connections=1))
    (file,) = (tmp_path / "out/partial/answers").iterdir()
    lines = file.read_text().splitlines()
    assert len(lines) >= 3 and KEY not in file.read_text()
    lines[0] = lines[0].replace("A scene", "A crime")
    file.write_text("\n".join([*lines[:2], lines[2][:50]]))
    asked_before = len(server.asked)
    recaption(place, tmp_path / "out", **asked(server))
    assert len(server.asked) - asked_before == COUNT - 1 - 1, "one line of three can be believed"
    assert not any("crime" in row["caption"] for row in rows(tmp_path / "out").values())


# ---- models that run here


@pytest.fixture(scope="module", params=["llava", "qwen"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_networks import save_vision_language_model

    return save_vision_language_model(tmp_path_factory.mktemp(request.param), request.param)


def here(model: Path, **settings: Any) -> dict[str, Any]:
    common = {
        "captioner": f"transformers:{model}",
        "caption_prompt": ("describe this image", "what is it"),
        "max_tokens": 12,
    }
    common |= {"batch_size": 3, "workers": 0, "without_caption": "keep", "max_failed_fraction": 1.0}
    return {**common, **settings}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_any_number_of_ranks_writes_the_same_captions(
    place: Path, model: Path, tmp_path: Path, temperature: float
) -> None:
    for world in (1, 2, 3):
        settings = here(model, temperature=temperature, input=str(place / "download"))
        run_ranks(tmp_path / str(world), Recaption, world, **settings)
        assert_sound(tmp_path / str(world))
    assert digests(tmp_path / "1") == digests(tmp_path / "2") == digests(tmp_path / "3") != {}
    written = [entry["caption"] for row in rows(tmp_path / "1").values() for entry in row["recaptions"]]
    assert len(set(written)) > (8 if temperature else 0)


@pytest.mark.filterwarnings("ignore")
def test_drawn_captions_depend_on_the_seed_and_not_on_the_batch(place: Path, model: Path, tmp_path: Path) -> None:
    for name, settings in {"a": {}, "b": {"batch_size": 7}, "c": {"seed": 1}}.items():
        recaption(place, tmp_path / name, **here(model, temperature=1.0, attempts=1, **settings))
    captions = {name: {key: row["captions"] for key, row in rows(tmp_path / name).items()} for name in "abc"}
    assert captions["a"] == captions["b"] != captions["c"]


@pytest.mark.filterwarnings("ignore")
def test_captions_go_on_to_shards_and_latents(place: Path, model: Path, tmp_path: Path) -> None:
    recaption(place, tmp_path / "one", **here(model, temperature=1.0))
    run_stage(
        "recaption",
        input=str(tmp_path / "one"),
        output=str(tmp_path / "two"),
        **here(model, temperature=1.0, seed=5, caption_source="second"),
    )
    found = rows(tmp_path / "two")
    assert any({"second", "recaption", "original"} == set(row["caption_sources"]) for row in found.values())
    run_stage("shard", input=str(tmp_path / "two"), output=str(tmp_path / "shard"), partition_size=5)
    shards = rows(tmp_path / "shard")
    columns = ("caption", "captions", "caption_sources", "recaptions", "jpg")
    assert {key: [row[name] for name in columns] for key, row in shards.items()} == {
        key: [row[name] for name in columns] for key, row in found.items()
    }
    run_stage(
        "precompute",
        input=str(tmp_path / "shard"),
        output=str(tmp_path / "latents"),
        image_resolutions=(32,),
        workers=0,
    )
    assert {key: row["caption"] for key, row in rows(tmp_path / "latents").items()} == {
        key: row["caption"] for key, row in found.items()
    }


# ---- the tools around it


@pytest.fixture
def line(place: Path, server: Server, tmp_path: Path) -> Path:
    """<line>/{download,recaption,shard}."""
    shutil.copytree(place / "download", tmp_path / "line/download")
    run_stage(
        "recaption", input=str(tmp_path / "line/download"), output=str(tmp_path / "line/recaption"), **asked(server)
    )
    run_stage("shard", input=str(tmp_path / "line/recaption"), output=str(tmp_path / "line/shard"), partition_size=5)
    return tmp_path / "line"


def test_trace_tells_of_each_caption_and_its_source(line: Path) -> None:
    way = stations([Dataset.open(line / name) for name in ("download", "recaption", "shard")], "007-png")
    assert [station.dataset.stage for station in way] == ["download", "recaption", "shard"]
    new, old = way[1].facts()["captions"]
    assert new.startswith("recaption: A scene of") and old == "original: image 7"


def test_a_takedown_removes_captions_as_well(line: Path, server: Server) -> None:
    before = len(server.asked)
    (line / "keys.txt").write_text("007-png\n")
    takedown(line, line / "keys.txt", Rank())
    assert len(server.asked) == before, "nothing is asked again"
    for name in ("recaption", "shard"):
        assert_sound(line / name)
        assert outcomes(line / name)["007-png"].startswith("dropped:takedown")
        files = [path for path in (line / name).rglob("*") if path.is_file() and path.name != "plan.json"]
        assert not any(b"asked about 007-png" in path.read_bytes() for path in files)
    assert len(rows(line / "recaption")) == COUNT - 2


def test_verify_finds_captions_of_a_neighbour(line: Path) -> None:
    assert list(findings_of(line / "recaption", deep=True)[1]) == []
    from pipeline.formats import pointer

    plain = pointer.PointerWriter.write
    swapped = {"001-png": "002-png", "002-png": "001-png"}
    originals = {key: row["captions"][1] for key, row in rows(line / "recaption").items()}

    def write(self: Any, row: dict[str, Any]) -> None:
        if other := swapped.get(row["key"]):
            row = {**row, "captions": [row["captions"][0], originals[other]]}
        plain(self, row)

    shutil.rmtree(line / "recaption")
    pointer.PointerWriter.write = write  # type: ignore[method-assign]
    try:
        with serving() as other:
            recaption(line, line / "recaption", **asked(other))
    finally:
        pointer.PointerWriter.write = plain  # type: ignore[method-assign]
    found = list(findings_of(line / "recaption", deep=True)[1])
    assert [(finding.key, finding.what) for finding in found] == [
        (key, "its original captions have changed") for key in ("001-png", "002-png")
    ]
