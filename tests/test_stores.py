"""Object stores: whole objects, conditional writes, versions, faults, errors that say what to do, and no secrets."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from object_stores import Proxy, random_faults

from pipeline import stores
from pipeline.config.schema import ConfigError
from pipeline.storage import StorageError
from pipeline.stores import PART, Cache, Object, Store, StoreError, StoreFolder, open_folder
from pipeline.stores.bucket_client import forget_clients

MANY = (12 << 20) + 7  # bytes: two parts


@pytest.fixture
def store(any_place: str) -> Store:
    return Store(any_place)


def pieces(size: int = MANY) -> Iterator[bytes]:
    while size:
        piece = bytes([size % 251]) * min(size, 1 << 20)
        yield piece
        size -= len(piece)


def test_objects_are_stored_listed_and_read(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.stores.store._RANGE", PART)
    etag = store.upload("a/large", pieces, MANY, "abc")
    store.put("a/small", b"one", hashed="def")
    store.put("ab", b"beside")
    assert {o.path: o.size for o in store.objects("a")} == {"a/large": MANY, "a/small": 3}
    folders, objects = store.children()
    assert (folders, [o.path for o in objects]) == (["a"], ["ab"])
    found, digest = store.described("a/large")
    assert (found.size, found.etag, digest) == (MANY, etag, "abc")
    whole = b"".join(pieces())
    assert b"".join(store.chunks("a/large", etag=etag)) == whole
    assert b"".join(store.chunks("a/large", start=MANY - 9)) == whole[-9:]
    some = Object("a/large", MANY, etag)
    (tmp_path / "copy").touch()
    store.download(some, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == whole
    store.delete(["a/large", "a/small", "never"])
    assert [o.path for o in store.objects()] == ["ab"]


def test_listings_of_several_pages_are_whole(store: Store) -> None:
    names = [f"a/{number:02d}" for number in range(20)]
    for name in (*names, "b/c", "top"):
        store.put(name, b"x")
    assert [o.path for o in store.objects("a")] == names
    folders, objects = store.children()
    assert (folders, [o.path for o in objects]) == (["a", "b"], ["top"])


def test_one_writer_creates_and_a_version_is_replaced_once(store: Store) -> None:
    assert store.put_new("record", b"mine")
    assert not store.put_new("record", b"yours")
    assert store.put_new("record", b"mine")  # as after an answer that was lost
    etag = store.head("record").etag
    assert store.replace("record", b"second", etag)
    assert not store.replace("record", b"third", etag)
    assert store.replace("record", b"second", etag)  # as after an answer that was lost
    assert store.read("record") == b"second"


def test_an_upload_that_fails_midway_leaves_nothing(store: Store) -> None:
    def broken() -> Iterator[bytes]:
        yield from pieces(9 << 20)
        raise ValueError("its bytes have changed")

    with pytest.raises(ValueError, match="bytes have changed"):
        store.upload("large", broken, MANY, "")
    assert not list(store.objects())


def test_a_changed_object_is_noticed(store: Store) -> None:
    store.put("file", b"one")
    etag = store.head("file").etag
    store.put("file", b"two")
    with pytest.raises(StoreError, match="not the version") as caught:
        list(store.chunks("file", etag=etag))
    assert caught.value.kind == "changed"
    with pytest.raises(StoreError, match="not there") as caught:
        store.read("nothing")
    assert caught.value.kind == "missing"


@pytest.mark.parametrize("kind", ["busy", "reset", "lost", "truncated"])
def test_passing_faults_are_survived(s3: Proxy, place: str, kind: str) -> None:
    s3.fault = random_faults(1, 0.25, (kind,))
    store = Store(place)
    for number in range(6):
        assert store.put_new(f"new/{number}", b"%d" % number)
    store.upload("large", pieces, MANY, "abc")
    assert b"".join(store.chunks("large")) == b"".join(pieces())
    assert len(list(store.objects("new"))) == 6
    assert s3.broken[kind] > 0


def test_a_truncated_body_goes_on_where_it_ended(s3: Proxy, place: str) -> None:
    store = Store(place)
    store.upload("large", pieces, MANY, "")
    faults = iter(["truncated", "truncated"])
    s3.fault = lambda method, path: next(faults, "")
    assert b"".join(store.chunks("large")) == b"".join(pieces())
    assert s3.broken["truncated"] == 2


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("denied", "do not allow this"),
        ("expired", "have expired: renew them"),
        ("skewed", "the clock of this machine is wrong"),
        ("digest", "received other bytes than were sent"),
    ],
)
def test_errors_say_what_to_do_and_hold_no_secret(s3: Proxy, place: str, kind: str, said: str) -> None:
    s3.fault = lambda method, path: kind
    with pytest.raises(StoreError, match=said) as caught:
        Store(place).put("object", b"bytes")
    assert place in str(caught.value)
    assert not any(secret in str(caught.value) for secret in ("hush-hush", "AKIAEXAMPLE"))


@pytest.mark.parametrize("status", [400, 403, 500])
def test_what_a_store_sends_back_of_keys_and_tokens_is_not_shown(
    s3: Proxy, place: str, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """S3 sends the token of an expired session, the access key and what was signed."""
    monkeypatch.setenv("AWS_SESSION_TOKEN", "FwoG/token+of==session")
    monkeypatch.setattr("pipeline.stores.bucket_client._RETRIES", 0)
    forget_clients()
    s3.answers["told"] = (
        status,
        "<?xml version='1.0'?>\n<Error><Code>SomethingElse</Code><Message>the token FwoG/token+of==session of "
        "AKIAEXAMPLE</Message><Token-0>FwoG/token+of==session</Token-0><AWSAccessKeyId>AKIAEXAMPLE</AWSAccessKeyId>"
        "<StringToSign>AWS4 FwoG%2Ftoken%2Bof%3D%3Dsession hush-hush</StringToSign></Error>",
    )
    s3.fault = lambda method, path: "told"
    with pytest.raises(StoreError, match=r"SomethingElse: the token \.\.\. of \.\.\.") as caught:
        Store(place).put("object", b"bytes")
    assert not any(word in str(caught.value) for word in ("FwoG", "hush-hush", "AKIAEXAMPLE"))


@pytest.mark.parametrize("variable", ["GOOGLE_BASE_URL", "STORAGE_EMULATOR_HOST"])
def test_google_is_asked_where_its_own_tools_would_ask(
    gcs_port: int, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """It refuses who comes without the right token."""
    monkeypatch.setenv(variable, f"http://127.0.0.1:{gcs_port}".removeprefix("http://" if "EMU" in variable else ""))
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "ya29.another")
    forget_clients()
    with pytest.raises(StoreError, match=r"the credentials are wrong: check AWS_\*, GOOGLE_\*") as caught:
        Store("gs://latents/x").read("object")
    assert "ya29.another" not in str(caught.value)
    forget_clients()


def test_the_signature_of_an_azure_address_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_SAS_KEY", "sv=2022&sp=rl&sig=HushHush%2Fabc%3D")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", "http://127.0.0.1:9/account")
    monkeypatch.setattr("pipeline.stores.bucket_client._RETRIES", 0)
    forget_clients()
    with pytest.raises(StoreError, match="cannot be read") as caught:
        Store("az://container/x").read("object")
    assert "Hush" not in str(caught.value)


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "amid requests"])
def test_forked_processes_ask_the_store_themselves(s3: Proxy, place: str, busy: bool) -> None:
    """The client's threads do not survive a fork."""
    store = Store(place)
    store.upload("large", pieces, MANY, "")
    ended = threading.Event()

    def read_on() -> None:
        while not ended.is_set():
            store.read("large")

    thread = threading.Thread(target=read_on, daemon=True)
    if busy:
        thread.start()
    workers = [multiprocessing.get_context("fork").Process(target=_forked, args=(store, n, 2)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    ended.set()
    hung = [worker for worker in workers if worker.is_alive()]
    for worker in hung:
        worker.kill()
    assert not hung and [worker.exitcode for worker in workers] == [0, 0, 0]
    assert sorted(o.path for o in store.objects("forked")) == [f"forked/{d}.{n}" for d in (1, 2) for n in range(3)]


def _forked(store: Store, number: int, depth: int) -> None:
    assert b"".join(store.chunks("large")) == b"".join(pieces())
    with pytest.raises(StoreError, match="not there"):
        store.read("nothing")
    store.upload(f"forked/{depth}.{number}", pieces, MANY, "")
    if depth > 1:
        inner = multiprocessing.get_context("fork").Process(target=_forked, args=(store, number, depth - 1))
        inner.start()
        inner.join(60)
        assert inner.exitcode == 0


def test_a_missing_bucket_is_named(s3: Proxy) -> None:
    with pytest.raises(StoreError, match="no such bucket"):
        Store("s3://nowhere-at-all/x").put("a", b"")


def test_keys_and_endpoint_come_from_the_files_of_the_aws_tools(
    s3: Proxy, place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name)
    (tmp_path / "config").write_text(f"[profile lab]\nregion = eu-west-1\nendpoint_url = {endpoint}\n")
    (tmp_path / "credentials").write_text("[lab]\naws_access_key_id = FROMFILE\naws_secret_access_key = hush\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    forget_clients()
    Store(place).put("object", b"bytes")
    assert s3.seen["PUT"] == 1
    monkeypatch.setenv("AWS_PROFILE", "other")
    forget_clients()
    with pytest.raises(ConfigError, match="AWS_PROFILE=other: there is no such profile"):
        Store(place)


def test_addresses(s3: Proxy, place: str) -> None:
    assert stores.canonical(Path("s3://bucket/a/b/")) == "s3://bucket/a/b"
    assert (
        stores.is_url(Path("s3://bucket/a")) and not stores.is_url("/data/s3:/x") and not stores.is_url("https://a/b")
    )
    with pytest.raises(ConfigError, match="expected s3://bucket/prefix"):
        stores.canonical("s3://bucket/a?b")
    for name in ("a/1.tar", "a/2.tar", "a/3.txt", "a/b/4.tar"):
        Store(place).put(name, b"x")
    matching: Callable[..., list[str]] = lambda *given: [  # noqa: E731
        o.path.removeprefix(f"{place}/a/") for o in stores.matching([f"{place}/a/{name}" for name in given])
    ]
    assert matching("*.tar") == ["1.tar", "2.tar"]
    assert matching("") == ["1.tar", "2.tar", "3.txt", "b/4.tar"]
    assert matching("**.tar") == matching("**/?.tar") == ["1.tar", "2.tar", "b/4.tar"]
    assert matching("3.txt", "b/*", "1.tar") == ["3.txt", "b/4.tar", "1.tar"]
    with pytest.raises(ConfigError, match="no objects match"):
        matching("*.zip")
    with pytest.raises(StoreError, match="nothing: not there"):
        matching("nothing")
    with pytest.raises(ConfigError, match="s3://b/a: an address holds no credentials"):
        stores.canonical("s3://me:hush@b/a")


def test_a_folder_in_a_store_reads_as_a_local_one(s3: Proxy, place: str, tmp_path: Path) -> None:
    store = Store(place)
    store.put("a/b/file", b"bytes")
    store.put("top", b"{}")
    folder = open_folder(place)
    assert folder.listdir() == ["a", "top"]
    assert folder.exists("a/b") and folder.exists("a/b/file") and not folder.exists("a/c/file")
    assert folder.read("a/b/file") == b"bytes"
    with folder.folder("a/b") as inner:
        assert inner.listdir() == ["file"]
        assert inner.read("file") == b"bytes"
    gets = sum(line.startswith("GET") and line.endswith("file") for line in s3.paths)
    assert gets == 1  # the second came from the cache
    with pytest.raises(FileNotFoundError):
        folder.read("a/nothing")
    with pytest.raises(FileNotFoundError):
        open_folder(f"{place}/nothing")
    with pytest.raises(StorageError, match="can only be read"):
        folder.mkdir("new")


def test_the_cache_stays_within_its_bound_and_open_copies_are_read_to_their_end(
    s3: Proxy, place: str, tmp_path: Path
) -> None:
    store = Store(place)
    for number in range(8):
        store.put(f"{number}", bytes([number]) * 1000)
    folder = StoreFolder(store, Cache(tmp_path / "small", 3000))
    first = folder.open_file("0")
    for number in range(8):
        assert folder.read(f"{number}") == bytes([number]) * 1000
        held = sum(p.stat().st_size for p in (tmp_path / "small").rglob("*") if p.is_file())
        assert held <= 3000
    with os.fdopen(first, "rb") as file:
        assert file.read() == bytes(1000)


def test_a_file_that_is_finished_while_others_are_counted_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listed under the name that it had on its way, and looked for after it was renamed, it would be missed."""
    cache = Cache(tmp_path, 30)
    started, listed = threading.Event(), threading.Event()
    count = cache._files

    def bring(path: Path) -> None:
        path.write_bytes(bytes(10))
        started.set()
        assert listed.wait(60)

    def counted() -> list[Path]:
        paths = list(count())
        listed.set()
        time.sleep(0.5)  # time enough for the other thread
        return paths

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.file, "first", 10, bring)
        assert started.wait(60)
        monkeypatch.setattr(cache, "_files", counted)
        with pytest.raises(StoreError, match="no room for a file of 25 bytes"):
            cache.file("second", 25, lambda path: None)
        assert first.result().stat().st_size == 10
