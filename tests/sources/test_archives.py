"""Archives of other programs are read as those read them; broken and hostile ones are told from whole ones."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import struct
import subprocess
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sources.packing import END, PACKED, TAR, entry, header, padded, tar_of, tar_of_entries, zip_of

from pipeline.samples import SampleError
from pipeline.sources import archives
from pipeline.sources.archives import Member, check, members
from pipeline.sources.archives.tar import BLOCK

FILES = {
    "a/one.jpg": b"first image" * 50,
    "a/one.txt": "a caption, größer".encode(),
    "empty.jpg": b"",
    "exactly.jpg": bytes(BLOCK),
    "long/" * 30 + "name.png": b"second" * 1000,
    "l" * 130 + "/" + "n" * 120 + ".png": b"third",
    "日本/ж é.jpg": b"fourth",
}


def everything(name: str, size: int) -> int:
    return size


def read(data: bytes, most: int = 1000, wants: archives.Wants = everything) -> list[Member]:
    """Check the archive and read all its members; what passes the check must not fail afterwards."""
    file = io.BytesIO(data)
    check(file, most, lambda: None)
    return list(members(file, most, wants))


def contents(data: bytes) -> dict[str, bytes]:
    found = read(data)
    assert [member.error for member in found if member.error] == []
    return {member.name: member.data for member in found}


def reason_of(data: bytes, most: int = 1000) -> tuple[str, bool]:
    with pytest.raises(SampleError) as caught:
        read(data, most)
    return caught.value.reason, caught.value.retryable


# ---- what others write


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("kind", TAR)
def test_tars_are_read_as_they_were_written(kind: str, packed: str) -> None:
    files = {name: data for name, data in FILES.items() if kind != "ustar" or len(name) < 200}
    data = tar_of(files, kind)
    assert contents(PACKED[packed](data)) == files
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        offsets = [info.offset_data for info in archive]
    assert [member.offset for member in read(PACKED[packed](data))] == offsets


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_zips_are_read_as_they_were_written(method: int) -> None:
    data = zip_of(FILES, method)
    assert contents(data) == FILES
    stored = zip_of(FILES, zipfile.ZIP_STORED)
    for member in read(stored):
        assert stored[member.offset : member.offset + member.size] == member.data


@pytest.mark.parametrize("options", [["--format=gnu"], ["--format=posix"], ["--format=v7"], ["--format=oldgnu", "-z"]])
def test_tars_of_gnu_tar(options: list[str], tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(b"x" * 700 * number)
    (tmp_path / "folder").mkdir()
    subprocess.run(["tar", "-cf", "all.tar", *options, "0.jpg", "1.jpg", "folder", "2.jpg"], cwd=tmp_path, check=True)
    data = (tmp_path / "all.tar").read_bytes()
    assert contents(data) == {f"{number}.jpg": b"x" * 700 * number for number in range(3)}


def test_zips_with_zip64_and_with_sizes_after_the_data() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive, archive.open("a.jpg", "w", force_zip64=True) as member:
        member.write(b"data")
    assert contents(file.getvalue()) == {"a.jpg": b"data"}

    class Unseekable(io.RawIOBase):
        def __init__(self) -> None:
            self.data = b""

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.data += bytes(data)
            return len(data)

    stream = Unseekable()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:  # type: ignore[call-overload]
        archive.writestr("b.jpg", b"more data" * 100)
    assert contents(stream.data) == {"b.jpg": b"more data" * 100}


def test_zip64_numbers_are_found_where_they_are() -> None:
    """A hand-made zip64 end and entry: 32-bit fields all ones, the numbers in the extra field and the zip64 record."""
    data, name = b"picture", b"a.jpg"
    crc = zlib.crc32(data)
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 45, 0, 0, 0, 0, crc, 0xFFFFFFFF, 0xFFFFFFFF, len(name), 20)
    local += name + struct.pack("<2H2Q", 1, 16, len(data), len(data)) + data
    extra = struct.pack("<2H", 0xCAFE, 2) + b"??" + struct.pack("<2H3Q", 1, 24, len(data), len(data), 0)
    ones = 0xFFFFFFFF
    central = struct.pack(
        "<4s6H3L5H2L", b"PK\1\2", 45, 45, 0, 0, 0, 0, crc, ones, ones, len(name), len(extra), 0, 0, 0, 0, ones
    )
    central += name + extra
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, len(central), len(local))
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(local) + len(central), 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", ones & 0xFFFF, ones & 0xFFFF, 0xFFFF, 0xFFFF, ones, ones, 0)
    assert contents(local + central + end64 + locator + end) == {"a.jpg": data}
    assert reason_of(local + central[: -len(extra)].replace(struct.pack("<H", len(extra)), b"\0\0") + end64) != ""


def test_empty_archives_have_no_members() -> None:
    assert read(tar_of({})) == read(zip_of({})) == read(gzip.compress(tar_of({}))) == []


def test_what_nobody_wants_is_not_read() -> None:
    def wants(name: str, size: int) -> int | None:
        return {"a/one.jpg": size, "a/one.txt": 4}.get(name)

    for data in (tar_of(FILES), gzip.compress(tar_of(FILES)), zip_of(FILES), zip_of(FILES, zipfile.ZIP_STORED)):
        found = read(data, wants=wants)
        assert [(member.name, member.data) for member in found] == [
            ("a/one.jpg", FILES["a/one.jpg"]),
            ("a/one.txt", FILES["a/one.txt"][:4]),
        ]
        assert [member.size for member in found] == [len(FILES["a/one.jpg"]), len(FILES["a/one.txt"])]


def test_archives_after_one_another_are_read_as_one() -> None:
    first, second = tar_of({"a.jpg": b"1"}), tar_of({"b.jpg": b"2"})
    both = {"a.jpg": b"1", "b.jpg": b"2"}
    assert contents(first + second) == both
    assert contents(gzip.compress(first) + gzip.compress(second)) == both
    assert contents(gzip.compress(first + second)) == both
    assert contents(bz2.compress(first) + bz2.compress(second)) == both


@pytest.mark.parametrize("packed", ["gz", "bz2", "xz"])
def test_a_stream_in_several_parts(packed: str) -> None:
    data = tar_of(FILES)
    parts = [data[at : at + 1000] for at in range(0, len(data), 1000)]
    assert contents(b"".join(map(PACKED[packed], parts))) == FILES


@pytest.mark.parametrize("garbage", [b"\0" * 100, b"\0" * 100_000, b"garbage", b"x" * 100_000, b"\x1f", b"\0garbage"])
@pytest.mark.parametrize("packed", [*PACKED, "zip"])
def test_garbage_after_the_end_does_no_harm(packed: str, garbage: bytes) -> None:
    files = {"a.jpg": b"1" * 10_000}
    if packed == "zip":
        if len(garbage) < 65_000:  # beyond, the end would not be found
            assert contents(zip_of(files) + garbage) == files
    else:
        assert contents(PACKED[packed](tar_of(files)) + garbage) == files


def test_nested_archives_are_members_like_others() -> None:
    inner = tar_of({"inner.jpg": b"x"})
    for data in (tar_of({"inner.tar": inner}), zip_of({"inner.tar": inner})):
        assert contents(data) == {"inner.tar": inner}


# ---- truncated


def cuts(size: int) -> list[int]:
    """Places to cut at: every one where there are few, else many with all near the ends."""
    return list(range(size)) if size < 3000 else sorted({*range(0, size, 37), *range(600), *range(size - 600, size)})


@pytest.mark.parametrize("kind", TAR)
def test_a_tar_cut_anywhere_before_its_end_marker_is_not_complete(kind: str) -> None:
    data = tar_of(
        {"a.jpg": b"1" * 700, "ä" * 40 + ".jpg" * (1 if kind == "ustar" else 9): b"2" * 512, "c.jpg": b""}, kind
    )
    end = len(data.rstrip(b"\0"))
    end += -end % BLOCK + BLOCK  # the first block of zeros
    for cut in cuts(end):
        assert reason_of(data[:cut]) in (("truncated_archive", True), ("not_an_archive", True)), cut
        assert cut < BLOCK or reason_of(data[:cut])[0] == "truncated_archive"
    assert len(read(data[:end])) == 3


@pytest.mark.parametrize("packed", ["gz", "bz2", "xz"])
def test_a_compressed_tar_cut_anywhere_is_not_complete(packed: str) -> None:
    noise = random.Random(0).randbytes(2000)
    data = PACKED[packed](tar_of({"a.jpg": noise, "b.jpg": noise}))
    for cut in cuts(len(data)):
        reason, retryable = reason_of(data[:cut])
        assert retryable and reason in ("truncated_archive", "not_an_archive", "damaged_archive"), cut
        assert cut < 20 or reason == "truncated_archive"


def test_a_zip_cut_anywhere_is_not_complete() -> None:
    inner = zip_of({"inner.jpg": b"2"})
    data = zip_of({"a.jpg": b"1" * 700, "b.zip": inner, "c.jpg": b"3" * 300}, zipfile.ZIP_STORED)
    for cut in cuts(len(data)):
        reason, retryable = reason_of(data[:cut])
        assert retryable and reason in ("truncated_archive", "not_an_archive", "damaged_archive"), cut
    assert reason_of(data[:600]) == ("truncated_archive", True)
    after_inner = data.index(inner) + len(inner)
    assert reason_of(data[:after_inner]) == ("damaged_archive", True)  # the directory of the inner one is none of ours


@pytest.mark.parametrize(
    "data", [b"", b"x", b"<html>captive portal</html>" * 100, b"PK", b"\x1f\x8b\x08", b"GIF89a" * 500, bytes(100)]
)
def test_what_is_no_archive(data: bytes) -> None:
    reason, retryable = reason_of(data)
    assert retryable and reason in ("not_an_archive", "truncated_archive")


def test_compressed_data_that_are_no_tar() -> None:
    assert reason_of(gzip.compress(b"hello" * 1000)) == ("not_an_archive", True)


# ---- damaged


def test_a_damaged_header_is_not_taken_for_the_end() -> None:
    data = bytearray(tar_of({"a.jpg": b"1" * 512, "b.jpg": b"2" * 512, "c.jpg": b"3" * 512}, "ustar"))
    data[2 * BLOCK + 10] ^= 1
    assert reason_of(bytes(data)) == ("damaged_archive", True)


@pytest.mark.parametrize("packed", ["gz", "bz2", "xz"])
def test_a_flipped_byte_in_compressed_data_is_seen(packed: str) -> None:
    noise = random.Random(0).randbytes(3000)
    data = PACKED[packed](tar_of({"a.jpg": noise}))
    for at in range(20, len(data), 97):
        broken = data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
        reason, retryable = reason_of(broken)
        assert retryable and reason in ("damaged_archive", "truncated_archive"), at


def test_a_flipped_byte_in_a_zip_costs_one_member() -> None:
    data = zip_of({"a.jpg": b"1" * 700, "b.jpg": b"2" * 700}, zipfile.ZIP_STORED)
    broken = bytearray(data)
    broken[100] ^= 1
    first, second = read(bytes(broken))
    assert first.error is not None and first.error.reason == "damaged_member" and not first.error.retryable
    assert (second.data, second.error) == (b"2" * 700, None)


def test_any_damage_is_survived() -> None:
    """Whatever bytes are changed, archives are read or refused; what passed the check is read to its end."""
    rng = random.Random(1)
    originals = [tar_of(FILES, "pax"), tar_of(FILES, "gnu"), zip_of(FILES), gzip.compress(tar_of(FILES))]
    for number in range(1200):
        data = bytearray(originals[number % len(originals)])
        for _ in range(rng.choice((1, 1, 2, 10))):
            at = rng.choice((rng.randrange(len(data)), rng.randrange(min(len(data), 2000)), -rng.randrange(1, 300)))
            data[at] = rng.randrange(256)
        file = io.BytesIO(bytes(data))
        try:
            check(file, 100, lambda: None)
        except SampleError:
            continue
        for member in members(file, 100, everything):
            member.name.encode("utf-8", "surrogateescape")


# ---- hostile tars


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE], ids=str
)
def test_members_that_are_no_files_have_no_data(kind: bytes) -> None:
    link = entry("a.jpg", type=kind, linkname="/etc/passwd")
    link[0].size = 5000  # no data follow such a header, whatever it says
    data = tar_of_entries([link, entry("b.jpg", b"real")])
    first, second = read(data)
    assert first.error is not None and first.error.reason == "not_regular" and first.data == b""
    assert (second.name, second.data, second.error) == ("b.jpg", b"real", None)


@pytest.mark.parametrize(
    "options",
    [["--format=gnu"], ["--format=posix", "--sparse-version=1.0"], ["--format=posix", "--sparse-version=0.1"]],
)
def test_sparse_members_are_refused_and_those_after_them_read(options: list[str], tmp_path: Path) -> None:
    with (tmp_path / "hole.jpg").open("wb") as file:
        for number in range(60):  # enough for a map that does not fit into the header
            file.seek(number * 1_000_000)
            file.write(b"x")
        file.truncate(2**40)
    (tmp_path / "real.jpg").write_bytes(b"real")
    subprocess.run(["tar", "-S", "-cf", "s.tar", *options, "hole.jpg", "real.jpg"], cwd=tmp_path, check=True)
    hole, real = read((tmp_path / "s.tar").read_bytes())
    assert hole.error is not None and (hole.name, hole.error.reason, hole.data) == ("hole.jpg", "not_regular", b"")
    assert (real.name, real.data, real.error) == ("real.jpg", b"real", None)


@pytest.mark.parametrize(
    "size",
    [
        b"77777777777\0",
        b"\x80" + b"\x7f" + b"\xff" * 10,
        b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7,
        b"\xff" * 12,
        b"-0000000001\0",
        b"0x000000fff\0",
        b"12345678   9",
    ],
)
def test_sizes_that_make_no_sense_end_it_without_being_believed(size: bytes) -> None:
    broken = header("a.jpg", size) + b"data" * 128 + END
    for packed in (broken, gzip.compress(broken)):
        reason, retryable = reason_of(packed)
        assert retryable and reason in ("truncated_archive", "damaged_archive", "not_an_archive")


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_huge_extension_headers_are_not_read(kind: bytes) -> None:
    data = header("bomb", 2**31, kind) + bytes(BLOCK) * 10
    assert reason_of(data) == ("archive_bomb", False)
    assert reason_of(gzip.compress(data)) == ("archive_bomb", False)


def test_endless_extension_headers_are_given_up() -> None:
    long = header("././@LongLink", 10, b"L") + padded(b"name.jpg\0\0")
    assert contents(long * 3 + header("short", 4) + padded(b"data") + END) == {"name.jpg": b"data"}
    assert reason_of(long * 5000 + header("short", 4) + padded(b"data") + END) == ("archive_bomb", False)


@pytest.mark.parametrize(
    "records",
    [
        b"no records",
        b"9999999 path=x\n",
        b"0 path=x\n",
        b"5 a=b",
        b"-8 a=bc\n",
        b"7 a=bc\n7 a",
        b"99999999999999999999 a=b\n",
    ],
)
def test_pax_headers_that_make_no_sense(records: bytes) -> None:
    data = header("pax", len(records), b"x") + padded(records) + header("a.jpg", 4) + padded(b"data") + END
    assert reason_of(data) == ("damaged_archive", True)


def test_pax_headers_say_name_and_size() -> None:
    records = b"18 path=other.jpg\n9 size=4\n30 mtime=1700000000.123456789\n"
    data = header("pax", len(records), b"x") + padded(records) + header("a.jpg", 0) + padded(b"data") + END
    assert contents(data) == {"other.jpg": b"data"}
    lying = records.replace(b"size=4", b"size=x")
    assert reason_of(data.replace(records, lying)) == ("damaged_archive", True)


def test_an_extension_of_nothing() -> None:
    assert reason_of(header("pax", 8, b"x") + padded(b"8 a=bcd\n") + END)[0] == "damaged_archive"
    assert reason_of(header("pax", 8, b"x") + padded(b"8 a=bcd\n"))[0] == "truncated_archive"


@pytest.mark.parametrize("kind", TAR)
def test_names_that_are_no_utf8(kind: str) -> None:
    name = b"caf\xe9/\xff\xfe.jpg".decode("utf-8", "surrogateescape")
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=TAR[kind], encoding="utf-8", errors="surrogateescape") as archive:
        archive.addfile(*entry(name))
    assert list(contents(file.getvalue())) == [name]


def test_directories_are_no_members() -> None:
    folder = entry("folder.jpg", type=tarfile.DIRTYPE)
    old = header("old.jpg/", 0, b"\0")
    assert list(contents(tar_of_entries([folder])[:BLOCK] + old + header("a.jpg") + END)) == ["a.jpg"]
    assert list(contents(zip_of({"folder.jpg/": b"", "a.jpg": b""}))) == ["a.jpg"]


def test_vendor_headers_are_no_files() -> None:
    data = header("odd.jpg", 4, b"V") + padded(b"data") + header("a.jpg", 4) + padded(b"data") + END
    first, second = read(data)
    assert first.error is not None and first.error.reason == "not_regular"
    assert (second.data, second.error) == (b"data", None)


def test_old_check_sums_of_signed_bytes() -> None:
    block = bytearray(header(b"caf\xe9\xe8.jpg"))
    block[148:156] = b" " * 8
    signed = sum(byte - 256 if byte > 127 else byte for byte in block)
    block[148:156] = b"%06o\0 " % signed
    assert len(read(bytes(block) + END)) == 1


# ---- numbers and bombs


@pytest.mark.parametrize("make", [tar_of, zip_of, lambda files: gzip.compress(tar_of(files))], ids=["tar", "zip", "gz"])
def test_an_archive_with_more_members_than_allowed_is_refused(make: Callable[[dict[str, bytes]], bytes]) -> None:
    data = make({f"{number}.bin": b"" for number in range(11)})
    assert reason_of(data, most=10) == ("too_many_members", True)
    assert len(read(data, most=11)) == 11


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_memory_does_not_grow_with_the_members(kind: str) -> None:
    def peak(count: int) -> int:
        if kind == "tar":
            data = b"".join(header(f"{number}.jpg") for number in range(count)) + END
        else:
            data = zip_of({f"{number}.jpg": b"" for number in range(count)}, zipfile.ZIP_STORED)
        file = io.BytesIO(data)
        tracemalloc.start()
        check(file, 10**6, lambda: None)
        for _ in members(file, 10**6, everything):
            pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(10)
    assert peak(4000) < peak(2000) + 20_000


def test_a_flood_of_empty_members_is_gone_through() -> None:
    data = header("same.jpg") * 100_000 + END
    assert sum(1 for _ in members(io.BytesIO(data), 100_000, lambda name, size: 0)) == 100_000
    assert reason_of(data, most=99_999) == ("too_many_members", True)


@pytest.mark.parametrize("packed", ["gz", "bz2", "xz"])
def test_a_stream_that_unpacks_to_too_much_is_a_bomb(packed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_HONEST", 1 << 20)
    monkeypatch.setattr(archives, "_RATIO", 10)
    data = tar_of({"a.bin": bytes(3 << 20)})
    assert reason_of(PACKED[packed](data)) == ("archive_bomb", False)
    monkeypatch.setattr(archives, "_HONEST", 4 << 20)
    assert len(read(PACKED[packed](data))) == 1


def test_a_bomb_after_the_end_marker_is_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_HONEST", 1 << 20)
    monkeypatch.setattr(archives, "_RATIO", 10)
    assert reason_of(gzip.compress(tar_of({"a.jpg": b""}) + bytes(3 << 20))) == ("archive_bomb", False)


def test_xz_that_asks_for_much_memory_is_refused() -> None:
    compressor = lzma.LZMACompressor(lzma.FORMAT_XZ, filters=[{"id": lzma.FILTER_LZMA2, "preset": 0}])
    data = bytearray(compressor.compress(tar_of(FILES)) + compressor.flush())
    at = data.index(b"\x21\x01") + 2  # the size of the dictionary in the block's header, with its check sum
    data[at] = 38  # 2 GiB
    start = 12
    length = (data[start] + 1) * 4
    data[start + length - 4 : start + length] = struct.pack("<L", zlib.crc32(data[start : start + length - 4]))
    assert reason_of(bytes(data)) == ("damaged_archive", True)


# ---- hostile zips


def patched(data: bytes, name: bytes, field: int, value: bytes) -> bytes:
    """A zip whose central entry of ``name`` has other bytes at ``field``."""
    out = bytearray(data)
    at = data.index(name, data.index(b"PK\1\2")) - 46
    out[at + field : at + field + len(value)] = value
    return bytes(out)


def test_a_zip_that_unpacks_to_too_much_is_a_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_HONEST", 1 << 20)
    data = zip_of({f"{number}.jpg": bytes(1 << 18) for number in range(12)})
    assert len(data) * 200 < 12 << 18
    assert reason_of(data) == ("archive_bomb", False)


def test_a_zip_whose_members_overlap_is_a_bomb() -> None:
    """One kernel that many entries share (the 42 kB that become petabytes)."""
    kernel = zlib.compress(bytes(100_000))[2:-4]
    crc = zlib.crc32(bytes(100_000))
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 8, 0, 0, crc, len(kernel), 100_000, 5, 0) + b"a.jpg" + kernel
    central = b""
    for number in range(100):
        fields = (b"PK\1\2", 20, 20, 0, 8, 0, 0, crc, len(kernel), 100_000, 5, 0, 0, 0, 0, 0, 0)
        central += struct.pack("<4s6H3L5H2L", *fields) + b"%04dj" % number
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 100, 100, len(central), len(local), 0)
    assert reason_of(local + central + end) == ("archive_bomb", False)


def test_an_encrypted_member_is_refused() -> None:
    data = patched(zip_of({"a.jpg": b"1", "b.jpg": b"2"}), b"a.jpg", 8, b"\1\0")
    first, second = read(data)
    assert first.error is not None and first.error.reason == "encrypted"
    assert second.data == b"2"


def test_a_link_in_a_zip_is_refused() -> None:
    for mode in (0o120777, 0o020666, 0o010666):
        link = zipfile.ZipInfo("a.jpg")
        link.create_system, link.external_attr = 3, mode << 16
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(link, "/etc/passwd")
            archive.writestr("b.jpg", b"2")
        first, second = read(file.getvalue())
        assert first.error is not None and (first.error.reason, first.data) == ("not_regular", b"")
        assert second.data == b"2"


def test_a_method_that_we_do_not_know() -> None:
    first, second = read(patched(zip_of({"a.jpg": b"1", "b.jpg": b"2"}), b"a.jpg", 10, struct.pack("<H", 99)))
    assert first.error is not None and first.error.reason == "unsupported_compression"
    assert second.data == b"2"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("size", [0, 10, 699, 701, 2**29])
def test_a_size_that_lies_costs_the_member(size: int, method: int) -> None:
    """``file_size`` of the central directory; what is read is never more."""
    data = patched(zip_of({"a.jpg": b"1" * 700, "b.jpg": b"2"}, method), b"a.jpg", 24, struct.pack("<L", size))
    first, second = read(data)
    assert first.error is not None and first.error.reason == "damaged_member"
    assert second.data == b"2"


@pytest.mark.parametrize("field", [20, 42], ids=["packed size", "place"])
def test_a_member_beyond_the_archive_costs_itself_or_all(field: int) -> None:
    data = patched(zip_of({"a.jpg": b"1" * 700, "b.jpg": b"2"}), b"a.jpg", field, struct.pack("<L", 2**31 + 7))
    if field == 20:
        assert reason_of(data) == ("archive_bomb", False)
    else:
        first, second = read(data)
        assert first.error is not None and first.error.reason == "damaged_member"
        assert second.data == b"2"


@pytest.mark.parametrize("entries", [0, 1, 3, 65535])
def test_a_directory_with_another_number_of_entries_than_it_says_is_damaged(entries: int) -> None:
    data = bytearray(zip_of({"a.jpg": b"1", "b.jpg": b"2"}))
    data[-12:-10] = struct.pack("<H", entries)
    assert reason_of(bytes(data)) == ("damaged_archive", True)


def test_one_part_of_a_split_zip_is_refused() -> None:
    data = bytearray(zip_of({"a.jpg": b"1"}))
    data[-18:-16] = b"\3\0"
    assert reason_of(bytes(data)) == ("damaged_archive", True)


def test_names_in_zips_are_utf8_or_of_dos() -> None:
    data = zip_of({"xxxx.jpg": b"1"})
    for raw, name in ((b"\xc3\xa9\xc3\xa8.jpg", "éè.jpg"), (b"caf\x82.jpg", "café.jpg"), (b"a\0b\0.jpg", "a\0b\0.jpg")):
        assert list(contents(data.replace(b"xxxx.jpg", raw))) == [name]
    broken = patched(data, b"xxxx.jpg", 8, struct.pack("<H", 0x800)).replace(b"xxxx.jpg", b"caf\xe9.jpg")
    assert list(contents(broken)) == ["caf\udce9.jpg"]


def test_a_read_error_of_the_disk_is_no_damage() -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 600:
                raise OSError(5, "Input/output error")
            return super().read(size)

    noise = tar_of({"noise.bin": random.Random(0).randbytes(200_000)})
    for data in (tar_of(FILES), gzip.compress(noise), zip_of(FILES)):
        with pytest.raises(OSError, match="Input/output"):
            check(Broken(data), 1000, lambda: None)


def test_the_check_can_be_stopped() -> None:
    class Stop(Exception):
        pass

    def step() -> None:
        raise Stop

    for data in (tar_of(FILES), zip_of(FILES)):
        with pytest.raises(Stop):
            check(io.BytesIO(data), 1000, step)
