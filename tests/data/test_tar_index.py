from __future__ import annotations

import contextlib
import io
import os
import tarfile
import threading

import numpy as np
import pytest

from dinov2_fast.data import tar_index
from dinov2_fast.data.datasets import open_images
from dinov2_fast.data.decoding import UnreadableImage
from dinov2_fast.data.tar_index import TarDamaged, TarSource, looks_like_tar, members
from dinov2_fast.errors import DataError
from tests.data.pictures import encoded, picture, write_tar

LAYOUTS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def listed(path):
    """(name, bytes) of the regular files, as our index sees them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return [
            (member.name, os.pread(descriptor, member.size, member.data_offset))
            for member in members(descriptor)
        ]
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_members_equal_those_of_the_standard_library(tmp_path, layout):
    rng = np.random.default_rng(0)
    names = ["a.png", "deep/" * 20 + "b.png", "x" * 95 + ".png", "ü.png"]
    if layout != tarfile.USTAR_FORMAT:  # which cannot hold such names
        names += ["long/" * 60 + "c.png", "n" * 3000 + ".png"]
    content = {name: rng.bytes(int(rng.integers(0, 2000))) for name in names}
    path = write_tar(tmp_path / "t.tar", content, layout=layout)
    assert listed(path) == list(content.items())
    source = TarSource([path])
    assert [source.read(i) for i in range(len(names))] == list(content.values())
    assert [source.name(i) for i in range(len(names))] == [f"{path}::{name}" for name in names]
    assert [source.offset(i) % 512 for i in range(len(names))] == [0] * len(names)


def test_a_tar_of_the_command_line_program_is_read(tmp_path):
    (tmp_path / "in").mkdir()
    for index in range(3):
        (tmp_path / "in" / f"{index}.png").write_bytes(encoded(picture(seed=index), "PNG"))
    assert os.system(f"tar -C {tmp_path} -cf {tmp_path}/t.tar ./in") == 0
    source = open_images(tmp_path / "t.tar")
    found = {source.name(i)[-5:]: source.read(i) for i in range(len(source))}
    assert found == {f"{i}.png": encoded(picture(seed=i), "PNG") for i in range(3)}


def test_nothing_is_unpacked_and_the_index_is_not_written(tmp_path):
    path = write_tar(tmp_path / "t.tar", {"a.png": b"1", "../evil.png": b"2"})
    source = open_images(path)
    assert [source.read(i) for i in range(2)] == [b"1", b"2"]
    assert os.listdir(tmp_path) == ["t.tar"]


def evil_tar(path, *entries):
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, kind, data in entries:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.size = kind, "/etc/passwd", len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def test_only_regular_files_count_whatever_their_names(tmp_path):
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
    odd = [(f"odd{i}.png", kind, b"") for i, kind in enumerate((*kinds, tarfile.DIRTYPE))]
    names = ["../../evil.png", "/abs.png", "a/../../b.png", "C:\\c.png", "twice.png", "twice.png"]
    files = [(name, tarfile.REGTYPE, name.encode() + b"%d" % i) for i, name in enumerate(names)]
    source = TarSource([evil_tar(tmp_path / "t.tar", *odd, *files, *odd)])
    assert [source.read(i) for i in range(len(source))] == [data for _, _, data in files]
    assert os.listdir(tmp_path) == ["t.tar"]


def header(name, size_field, *, kind=b"0"):
    """One header block with a right checksum, whatever the size field says."""
    block = bytearray(512)
    block[: len(name)] = name
    block[124:136] = size_field
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def octal(size):
    return b"%011o\0" % size


def base256(size):
    return b"\x80" + size.to_bytes(11, "big")


GOOD = header(b"good.png", octal(3)) + b"abc" + bytes(509)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (header(b"huge.png", base256(2**60)), "announces 1152921504606846976 bytes"),
        (header(b"huge.png", octal(8**11 - 1)), "announces"),
        (header(b"minus.png", b"\xff" * 12), "announces -1"),
        (header(b"words.png", b"not a number"), "damaged number"),
        (header(b"sum.png", octal(1))[:-1] + b"x", "wrong checksum"),
        (header(b"cut.png", octal(1))[:300], "ends inside the header"),
        (header(b"x", octal(2**21), kind=b"x") + bytes(2**21), "extended header at byte"),
        (header(b"x", octal(2**21), kind=b"L") + bytes(2**21), "extended header at byte"),
        (header(b"x", octal(20), kind=b"x") + b"999 path=a\n".ljust(512, b"\0"), "is damaged"),
        (header(b"x", octal(20), kind=b"x") + b"99999999999999999999999".ljust(512), "is damaged"),
        (
            header(b"x", octal(12), kind=b"x")
            + b"12 size=-99\n".ljust(512, b"\0")
            + header(b"y.png", octal(1)),
            "damaged size",
        ),
        (
            header(b"x", octal(30), kind=b"x")
            + b"30 size=1152921504606846976000\n"[-30:].ljust(512, b"\0")
            + header(b"y.png", octal(1)),
            "header",
        ),
    ],
)
def test_damage_ends_the_index_and_keeps_what_came_before(tmp_path, caplog, bad, reason):
    path = tmp_path / "t.tar"
    path.write_bytes(GOOD + bad + (bytes(1024) if len(bad) >= 512 else b""))
    source = TarSource([path])
    assert [source.read(i) for i in range(len(source))] == [b"abc"]
    assert "is damaged, what follows is not used" in caplog.text
    assert reason in caplog.text


def test_checksums_of_signed_bytes_are_accepted(tmp_path):
    block = bytearray(header("ä.png".encode(), octal(3)))
    signed = sum(block) - sum(block[148:156]) + 8 * 32 - 256 * sum(byte > 127 for byte in block)
    block[148:156] = b"%06o\0 " % signed
    path = tmp_path / "t.tar"
    path.write_bytes(bytes(block) + b"abc" + bytes(509))
    assert listed(path) == [("ä.png", b"abc")]


def test_a_truncated_tar_gives_its_whole_members(tmp_path):
    data = {f"{i}.png": bytes([i]) * 700 for i in range(5)}
    path = write_tar(tmp_path / "t.tar", data, layout=tarfile.USTAR_FORMAT)
    whole = path.read_bytes()
    for end in range(1, 5 * 1536, 97):
        path.write_bytes(whole[:end])
        complete = sum(end >= 1536 * i + 512 + 700 for i in range(5))
        descriptor = os.open(path, os.O_RDONLY)
        found = []
        with contextlib.suppress(TarDamaged):
            found.extend(member.name for member in members(descriptor))
        os.close(descriptor)
        assert found == list(data)[:complete]


def test_a_thousand_mutated_tars_never_crash(tmp_path):
    rng = np.random.default_rng(0)
    long_name = "d/" * 200
    content = {f"{long_name}{i}.png": bytes([i]) * 300 for i in range(3)}
    path = tmp_path / "t.tar"
    seeds = [write_tar(path, content, layout=layout).read_bytes() for layout in LAYOUTS[1:]]
    damaged = 0
    for trial in range(1000):
        data = bytearray(seeds[trial % 2][:6144])
        for _ in range(int(rng.integers(1, 6))):
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
        path.write_bytes(data)
        try:
            assert all(len(data) <= len(seeds[0]) for _, data in listed(path))
        except TarDamaged:
            damaged += 1
    assert damaged > 100


@pytest.mark.parametrize("size", [0, 100, 511])
def test_short_files_and_zeros_are_no_tar(size):
    assert not looks_like_tar(b"a" * size)
    assert not looks_like_tar(bytes(2048))
    assert not looks_like_tar(encoded(picture(100, 100), "BMP"))


def test_labels_come_from_cls_members_else_from_the_first_differing_folder(tmp_path):
    beside = {
        "a/1.png": b"1",
        "a/1.cls": b"7\n",
        "a/2.jpg": b"2",
        "b/1.cls": b"10",
        "b/1.png": b"3",
    }
    source = TarSource([write_tar(tmp_path / "cls.tar", beside)])
    assert source.class_names == ["7", "10"]
    assert [source.label(i) for i in range(3)] == [0, None, 1]
    folders = {"./set/dog/1.png": b"1", "./set/cat/x/2.png": b"2", "./set/3.png": b"3"}
    source = TarSource([write_tar(tmp_path / "folders.tar", folders)])
    assert source.class_names == ["cat", "dog"]
    assert [source.label(i) for i in range(3)] == [1, 0, None]
    source = TarSource([write_tar(tmp_path / "flat.tar", {"set/1.png": b"1", "set/2.png": b"2"})])
    assert (source.class_names, source.label(0)) == ([], None)


def test_other_members_and_hidden_names_are_not_images(tmp_path):
    content = {"a.png": b"1", "a.txt": b"2", "._a.png": b"3", "b.pickle": b"4", ".png": b"5"}
    assert len(TarSource([write_tar(tmp_path / "t.tar", content)])) == 1


def test_no_image_in_any_shard_is_an_error(tmp_path):
    path = write_tar(tmp_path / "t.tar", {"a.txt": b"1"})
    with pytest.raises(DataError, match=r"found no images in 1 tar file.*\.png"):
        TarSource([path])
    with pytest.raises(DataError, match="cannot read"):
        TarSource([tmp_path / "absent.tar"])


def test_a_shard_that_changed_or_vanished_is_unreadable_not_fatal(tmp_path):
    path = write_tar(tmp_path / "t.tar", {"a.png": b"1"})
    source = TarSource([path])
    path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(UnreadableImage, match="changed after it was indexed"):
        source.read(0)
    path.unlink()
    with pytest.raises(UnreadableImage, match="No such file"):
        source.read(0)
    assert source.name(0) == f"{path}::byte {source.offset(0)}"


def test_members_above_the_size_cap_are_not_read(tmp_path, monkeypatch):
    source = TarSource([write_tar(tmp_path / "t.tar", {"a.png": b"12345"})])
    monkeypatch.setattr(tar_index, "MAX_FILE_BYTES", 4)
    with pytest.raises(UnreadableImage, match="more than 4"):
        source.read(0)


def test_threads_read_the_right_bytes_while_shards_are_closed_and_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_index, "_MAX_OPEN_SHARDS", 2)
    shards = [
        write_tar(tmp_path / f"{i:02}.tar", {f"{i}.png": b"%02d" % i * 500}) for i in range(12)
    ]
    source = TarSource(shards)
    wrong = []

    def work(seed):
        indices = np.random.default_rng(seed).integers(0, 12, 400).tolist()
        wrong.extend(i for i in indices if source.read(i) != b"%02d" % i * 500)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(source._open_shards) == 2
    open_files = os.listdir("/proc/self/fd")
    source._open_shards.clear()
    assert len(os.listdir("/proc/self/fd")) == len(open_files) - 2
