"""Files and folders appear whole or not at all, whatever the file system answers."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.storage import BLOCK, Folder, StorageError, commit, probe, seal

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    with Folder.open(tmp_path / "root", create=True) as opened:
        yield opened


@pytest.fixture
def interposed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Sets an interposer for the rest of the test."""
    return lambda function: monkeypatch.setattr(storage, "interpose", function)


def names(folder: Folder) -> list[str]:
    return sorted(os.listdir(folder.path))


def failing(operation: str, code: int, *, after: bool = False, times: int = 1) -> Callable[..., Any]:
    """An interposer that makes the first ``operation`` fail with ``code``, before it is done or after."""
    left = [times]

    def interpose(what: str, path: str, do: Callable[[], Any]) -> Any:
        if what != operation or not left[0]:
            return do()
        left[0] -= 1
        if after:
            do()
        raise OSError(code, os.strerror(code), path)

    return interpose


# ---- files and their hashes


def blocks_of(data: bytes) -> list[str]:
    return [xxhash.xxh3_128_hexdigest(data[at : at + BLOCK]) for at in range(0, max(len(data), 1), BLOCK)]


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, MIB + 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 7])
@pytest.mark.parametrize("piece", [65_537, MIB - 1, MIB, MIB + 1, BLOCK, 3 * BLOCK])
def test_a_file_is_hashed_as_it_is_written(folder: Folder, size: int, piece: int) -> None:
    data = bytes(range(251)) * (size // 251 + 1)
    data = data[:size]
    with folder.create("file") as file:
        for at in range(0, size, piece):
            file.write(data[at : at + piece])
    assert folder.read("file") == data
    assert (file.bytes, file.digest) == (size, xxhash.xxh3_128_hexdigest(data))
    assert file.blocks == blocks_of(data)
    assert folder.digest_of("file") == file.digest


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.sampled_from([0, 1, 3, 100, 4096, 65_536, MIB - 7, MIB, MIB + 1, BLOCK]), max_size=12))
def test_how_the_writes_are_split_changes_nothing(tmp_path_factory: pytest.TempPathFactory, sizes: list[int]) -> None:
    parts = [bytes([number % 256]) * size for number, size in enumerate(sizes, 1)]
    data = b"".join(parts)
    with Folder.open(tmp_path_factory.mktemp("split")) as folder:
        with folder.create("file") as file:
            for part in parts:
                file.write(memoryview(part))
                assert file.tell() <= len(data)
        assert folder.read("file") == data
        assert (file.digest, file.blocks) == (xxhash.xxh3_128_hexdigest(data), blocks_of(data))
        os.unlink(folder.path / "file")


def test_a_short_write_is_continued(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[:1000]))
    with folder.create("file") as file:
        file.write(b"x" * 3500)
    assert folder.read("file") == b"x" * 3500


def test_a_file_is_on_disk_before_close_returns(folder: Folder, interposed: Callable[..., None]) -> None:
    done: list[str] = []
    interposed(lambda operation, path, do: (done.append(operation), do())[1])
    with folder.create("file") as file:
        file.write(b"data")
    assert done == ["create", "write", "fsync"]


def test_a_file_that_fails_to_reach_the_disk_is_an_error(folder: Folder, interposed: Callable[..., None]) -> None:
    interposed(failing("fsync", errno.EIO))
    with pytest.raises(OSError, match="Input/output"), folder.create("file") as file:
        file.write(b"data")
    assert file.closed


# ---- replacing a file


def test_write_atomic_replaces_as_a_whole(folder: Folder) -> None:
    folder.write_atomic("file", b"old")
    folder.write_atomic("file", b"new and longer")
    assert folder.read("file") == b"new and longer"
    assert names(folder) == ["file"]


@pytest.mark.parametrize("operation", ["create", "write", "fsync", "rename"])
def test_write_atomic_that_fails_leaves_the_old_file_alone(
    folder: Folder, interposed: Callable[..., None], operation: str
) -> None:
    folder.write_atomic("file", b"old")
    interposed(failing(operation, errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        folder.write_atomic("file", b"new")
    assert folder.read("file") == b"old"
    assert names(folder) == ["file"]


def test_a_rename_that_succeeded_but_reports_enoent_counts(folder: Folder, interposed: Callable[..., None]) -> None:
    folder.write_atomic("file", b"old")
    interposed(failing("rename", errno.ENOENT, after=True))
    folder.write_atomic("file", b"new")
    assert folder.read("file") == b"new"


def test_a_replacement_that_somebody_took_away_is_an_error(folder: Folder, interposed: Callable[..., None]) -> None:
    folder.write_atomic("file", b"old")

    def interpose(operation: str, path: str, do: Callable[[], Any]) -> Any:
        if operation == "rename":
            for name in names(folder):
                if name.startswith("."):
                    os.unlink(folder.path / name)
        return do()

    interposed(interpose)
    with pytest.raises(FileNotFoundError):
        folder.write_atomic("file", b"new")
    assert folder.read("file") == b"old"


# ---- sealed objects


def test_a_sealed_object_comes_back(folder: Folder) -> None:
    value = {"b": [1, 2.5, None], "a": "äöü", "c": {"x": True}}
    folder.write_atomic("file", seal(value))
    assert folder.read_sealed("file") == value
    assert folder.read_sealed("nothing") is None


def test_any_changed_byte_of_a_sealed_object_is_noticed(folder: Folder) -> None:
    text = seal({"counts": {"kept": 12, "failed": 0}, "names": ["a", "b"]})
    for at in range(len(text)):
        for change in (1, 0x20, 0xFF):
            changed = bytearray(text)
            changed[at] ^= change
            (folder.path / "file").write_bytes(changed)
            with pytest.raises(StorageError, match="damaged"):
                folder.read_sealed("file")


@pytest.mark.parametrize("keep", [0, 1, 20, -1])
def test_a_torn_sealed_object_is_noticed(folder: Folder, keep: int) -> None:
    (folder.path / "file").write_bytes(seal({"a": 1, "b": [1, 2, 3]})[:keep])
    with pytest.raises(StorageError, match="damaged"):
        folder.read_sealed("file")


# ---- commit


def attempt(folder: Folder, name: str, text: str) -> None:
    folder.mkdir(name)
    with folder.folder(name) as inside:
        inside.write_atomic("proof", text.encode())
        inside.write_atomic("data", b"content of " + text.encode())


def test_the_first_of_two_attempts_wins_and_stays(folder: Folder) -> None:
    attempt(folder, ".a", "a")
    attempt(folder, ".b", "b")
    assert commit(folder, ".a", "final", "proof")
    assert not commit(folder, ".b", "final", "proof")
    assert folder.read("final/data") == b"content of a"


def test_of_many_racing_attempts_one_wins(folder: Folder) -> None:
    won: list[int] = []
    ready = threading.Barrier(8)

    def race(number: int, final: int) -> None:
        attempt(folder, f".{final}.{number}", str(number))
        ready.wait()
        if commit(folder, f".{final}.{number}", str(final), "proof"):
            won.append(final)
            assert folder.read(f"{final}/proof") == str(number).encode()

    for final in range(20):
        threads = [threading.Thread(target=race, args=(number, final)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert won == list(range(20))


def test_a_commit_that_succeeded_but_reports_enoent_is_won(folder: Folder, interposed: Callable[..., None]) -> None:
    attempt(folder, ".a", "a")
    interposed(failing("rename", errno.ENOENT, after=True))
    assert commit(folder, ".a", "final", "proof")


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ESTALE, errno.EEXIST, errno.ENOTEMPTY])
def test_a_commit_that_is_refused_while_another_counts_is_lost(
    folder: Folder, interposed: Callable[..., None], code: int
) -> None:
    attempt(folder, ".a", "a")
    attempt(folder, ".b", "b")
    assert commit(folder, ".a", "final", "proof")
    interposed(failing("rename", code))
    assert not commit(folder, ".b", "final", "proof")


def test_an_attempt_that_was_removed_is_lost(folder: Folder) -> None:
    attempt(folder, ".a", "a")
    folder.trash(".a")
    assert not commit(folder, ".a", "final", "proof")


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_a_commit_that_the_disk_refuses_is_an_error(folder: Folder, interposed: Callable[..., None], code: int) -> None:
    attempt(folder, ".a", "a")
    interposed(failing("rename", code))
    with pytest.raises(OSError, match=os.strerror(code)):
        commit(folder, ".a", "final", "proof")


def test_names_are_synced_before_and_after_the_rename(folder: Folder, interposed: Callable[..., None]) -> None:
    attempt(folder, ".a", "a")
    done: list[tuple[str, str]] = []
    interposed(lambda operation, path, do: (done.append((operation, os.path.basename(path))), do())[1])
    commit(folder, ".a", "final", "proof")
    changes = [what for what in done if what[0] in ("fsync", "rename")]
    assert changes == [("fsync", ".a"), ("rename", "final"), ("fsync", "root")]


# ---- taking away


def test_trash_takes_files_and_trees_away(folder: Folder) -> None:
    attempt(folder, "tree", "a")
    folder.write_atomic("file", b"data")
    assert folder.trash("tree")
    assert folder.trash("file")
    assert not folder.trash("file")
    assert names(folder) == []


def test_what_is_trashed_has_lost_its_name_before_anything_in_it_is_deleted(
    folder: Folder, interposed: Callable[..., None]
) -> None:
    attempt(folder, "tree", "a")
    seen: list[list[str]] = []

    def interpose(operation: str, path: str, do: Callable[[], Any]) -> Any:
        if operation == "delete":
            seen.append(names(folder))
        return do()

    interposed(interpose)
    folder.trash("tree")
    ((name,),) = seen
    assert name.startswith(storage.TRASH)


def test_a_folder_that_was_moved_aside_takes_its_writers_with_it(tmp_path: Path) -> None:
    with Folder.open(tmp_path / "output", create=True) as old:
        os.rename(tmp_path / "output", tmp_path / "aside")
        assert not old.in_place()
        with Folder.open(tmp_path / "output", create=True) as new:
            old.write_atomic("file", b"of the old one")
            assert names(new) == []
            assert new.in_place()


def test_a_removed_folder_cannot_be_brought_back(tmp_path: Path) -> None:
    with Folder.open(tmp_path / "output", create=True) as old:
        os.rmdir(tmp_path / "output")
        for write in (lambda: old.mkdir("data"), lambda: old.write_atomic("file", b""), lambda: old.create("x")):
            with pytest.raises(FileNotFoundError):
                write()
        assert not (tmp_path / "output").exists()


# ---- probing the file system


def test_a_posix_file_system_passes_the_probe(folder: Folder) -> None:
    probe(folder)
    assert names(folder) == []


def onto_full_folders(operation: str, path: str, do: Callable[[], Any]) -> Any:
    """A file system that lets a folder be renamed onto a full one, as a flat object store does."""
    if operation == "rename" and path.endswith("/b"):
        for name in os.listdir(path):
            os.unlink(os.path.join(path, name))
    return do()


def to_nowhere(operation: str, path: str, do: Callable[[], Any]) -> Any:
    """A file system whose renames are not seen."""
    return None if operation == "rename" and path.endswith("/c") else do()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (onto_full_folders, "does not keep folder renames exclusive.*choose an output on a POSIX file system"),
        (to_nowhere, "cannot rename and sync folders"),
        (failing("rename", errno.ENOSYS, times=9), "does not keep folder renames exclusive|cannot rename"),
        (failing("fsync", errno.EINVAL), r"cannot rename and sync folders \(Invalid argument\)"),
    ],
)
def test_a_file_system_that_cannot_keep_our_promises_is_refused(
    folder: Folder, interposed: Callable[..., None], broken: Callable[..., Any], message: str
) -> None:
    interposed(broken)
    with pytest.raises(StorageError, match=message):
        probe(folder)
    assert names(folder) == []


def test_a_full_disk_is_not_taken_for_a_bad_file_system(folder: Folder, interposed: Callable[..., None]) -> None:
    interposed(failing("write", errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        probe(folder)


def test_what_waits_to_be_written_is_not_what_its_owner_makes_of_it_later(tmp_path: Path) -> None:
    memory = bytearray(b"first")
    with Folder.open(tmp_path) as folder:
        with folder.create("file") as file:
            file.write(memory)
            file.write(memoryview(memory).toreadonly())
            memory[:] = b"later"
            for number in range(1500):
                file.write(b"%04d" % number)
        assert folder.read("file") == b"firstfirst" + b"".join(b"%04d" % number for number in range(1500))
        assert folder.digest_of("file") == file.digest
