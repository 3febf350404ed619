"""Random access to the images inside tar files, without unpacking and without trusting them.

Only headers are read to build the index. A member's name is a text to show, never a path: nothing
is created on disk, links and devices are skipped, and sizes are checked against the file.
"""

from __future__ import annotations

import logging
import os
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinov2_fast.data.decoding import IMAGE_SUFFIXES, MAX_FILE_BYTES, UnreadableImage
from dinov2_fast.data.image_source import ImageSource, number_labels, printable
from dinov2_fast.errors import DataError

logger = logging.getLogger(__name__)

_BLOCK = 512
_MAX_EXTENSION_BYTES = 1 << 20
"""Long names and PAX records above this size are an attack, not a name."""
_MAX_LABEL_BYTES = 256
_MAX_OPEN_SHARDS = 64

_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes


class TarDamaged(Exception):
    """A header that cannot be read on from; the message says where and why."""


class Member(NamedTuple):
    """A regular file inside a tar."""

    name: str
    header_offset: int
    """First header block that belongs to the member, extension headers included."""
    data_offset: int
    size: int
    """Bytes."""


def looks_like_tar(head: bytes) -> bool:
    """Whether a file that begins with these bytes (at least 512) is an uncompressed tar."""
    try:
        return (
            len(head) >= _BLOCK
            and any(head[:_BLOCK])
            and _checked_header(head[:_BLOCK], 0) is not None
        )
    except TarDamaged:
        return False


def _number(field: bytes, offset: int) -> int:
    """A numeric header field: octal digits, or base 256 when the first bit is set."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        return -1 if field[0] & 0x40 else value
    try:
        return int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError as error:
        raise TarDamaged(f"header at byte {offset} holds a damaged number") from error


def _checked_header(block: bytes, offset: int) -> bytes | None:
    """The block if its checksum is right, `None` for the zero block that ends an archive."""
    if len(block) < _BLOCK:
        raise TarDamaged(f"ends inside the header at byte {offset}")
    if not any(block):
        return None
    stored = _number(block[148:156], offset)
    unsigned = sum(block) - sum(block[148:156]) + 8 * 32
    if stored == unsigned:
        return block
    # Some old programs summed signed bytes.
    if stored != unsigned - 256 * sum(byte > 127 for byte in block):
        raise TarDamaged(f"header at byte {offset} has a wrong checksum")
    return block


def _text(field: bytes) -> str:
    return os.fsdecode(field.split(b"\0", 1)[0])


def _pax_records(data: bytes, offset: int) -> dict[bytes, bytes]:
    """The records of an extended header: length, space, key, "=", value, newline."""
    records, position = {}, 0
    while position < len(data) and data[position] != 0:
        digits, space, _ = data[position : position + 20].partition(b" ")
        end = position + int(digits) if space and digits.isdigit() else 0
        key, equals, value = data[position + len(digits) + 1 : end].partition(b"=")
        if end > len(data) or not equals or not value.endswith(b"\n"):
            raise TarDamaged(f"extended header at byte {offset} is damaged")
        records[key] = value[:-1]
        position = end
    return records


def members(descriptor: int, *, start: int = 0) -> Iterator[Member]:
    """The regular files of an open tar, in their order; members with equal names are all given.

    Args:
        descriptor: of the tar file, opened for reading; its position is not used.
        start: byte offset of a header.

    Raises:
        TarDamaged: after the last member that could be read.
    """
    file_size = os.fstat(descriptor).st_size
    offset, first_header = start, start
    name: str | None = None
    pax: dict[bytes, bytes] = {}
    while True:
        header = (
            _checked_header(os.pread(descriptor, _BLOCK, offset), offset)
            if offset < file_size
            else None
        )
        if header is None:
            return
        kind = header[156:157]
        size = 0 if kind in _WITHOUT_DATA else _number(header[124:136], offset)
        if b"size" in pax and kind not in _WITHOUT_DATA and kind not in b"xgLK":
            if not pax[b"size"].isdigit():
                raise TarDamaged(f"extended header before byte {offset} holds a damaged size")
            size = int(pax[b"size"][:24])
        data_offset = offset + _BLOCK
        if size < 0 or data_offset + size > file_size:
            raise TarDamaged(
                f"member at byte {offset} announces {size} bytes, but the file ends at {file_size}"
            )
        next_offset = data_offset + -(-size // _BLOCK) * _BLOCK
        if kind in b"xgLK":
            if size > _MAX_EXTENSION_BYTES:
                raise TarDamaged(f"extended header at byte {offset} has {size} bytes")
            if kind == b"L":
                name = _text(os.pread(descriptor, size, data_offset))
            elif kind == b"x":
                pax = _pax_records(os.pread(descriptor, size, data_offset), offset)
            offset = next_offset
            continue
        sparse = any(key.startswith(b"GNU.sparse") for key in pax)
        if kind in _REGULAR and not sparse:
            if b"path" in pax:
                name = _text(pax[b"path"])
            elif name is None:
                name = _text(header[:100])
                if header[257:263] == b"ustar\0" and header[345]:
                    name = f"{_text(header[345:500])}/{name}"
            if not name.endswith("/"):
                yield Member(name, first_header, data_offset, size)
        name, pax = None, {}
        offset = first_header = next_offset


def _parts(name: str) -> list[str]:
    """A member's name as folder levels and file name, without "", "." and ".."."""
    return [part for part in name.split("/") if part not in ("", ".", "..")]


class _OpenShard:
    """A file descriptor that is closed once no thread holds this object any more."""

    def __init__(self, path: bytes) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class TarSource(ImageSource):
    """Images inside one or more tar files.

    A member counts as an image by its suffix. Labels come from `.cls` members beside the images
    (`dog/0001.jpg`, `dog/0001.cls`), else from the first folder level in which the names differ.
    The index lives in memory, about 28 bytes per image; files are opened per process on first use.
    """

    def __init__(self, shards: list[Path]) -> None:
        """Indexes the shards in the given order.

        Raises:
            DataError: a shard cannot be read, or no shard holds an image.
        """
        self._shards = [os.fsencode(shard.absolute()) for shard in shards]
        self._sizes: list[int] = []
        self._open_shards: dict[int, _OpenShard] = {}
        self._lock = threading.Lock()
        shard_numbers, headers, offsets, sizes = array("i"), array("q"), array("q"), array("q")
        folders: list[tuple[str, ...]] = []
        known: dict[tuple[str, ...], tuple[str, ...]] = {}
        labels: list[str | None] = []
        for number, shard in enumerate(self._shards):
            keys, classes = [], {}
            for member in self._members(shard):
                parts = _parts(member.name)
                stem, suffix = os.path.splitext(parts[-1] if parts else "")
                if stem.startswith(".") or not stem:
                    continue
                key = "/".join([*parts[:-1], stem])
                if suffix == ".cls" and member.size <= _MAX_LABEL_BYTES:
                    classes[key] = self._small_text(shard, member)
                elif suffix.lower() in IMAGE_SUFFIXES:
                    keys.append(key)
                    folder = tuple(parts[:-1])
                    folders.append(known.setdefault(folder, folder))
                    shard_numbers.append(number)
                    headers.append(member.header_offset)
                    offsets.append(member.data_offset)
                    sizes.append(member.size)
            labels.extend(classes.get(key) for key in keys)
        if not offsets:
            raise DataError(
                f"data: found no images in {len(shards)} tar file(s) starting with "
                f"{printable(str(shards[0]))}; looked for members ending in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}"
            )
        self._shard_of = np.array(shard_numbers, dtype=np.int32)
        self._headers = np.array(headers, dtype=np.int64)
        self._offsets = np.array(offsets, dtype=np.int64)
        self._lengths = np.array(sizes, dtype=np.int64)
        if not any(label is not None for label in labels):
            labels = _folder_labels(folders)
        self._labels, self.class_names = number_labels(labels)

    def _members(self, shard: bytes) -> Iterator[Member]:
        """Members up to the first damage, which is logged."""
        shown = printable(os.fsdecode(shard))
        try:
            descriptor = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"data: cannot read {shown}: {error}") from error
        try:
            self._sizes.append(os.fstat(descriptor).st_size)
            yield from members(descriptor)
        except TarDamaged as damage:
            logger.warning("data: %s is damaged, what follows is not used: %s", shown, damage)
        except OSError as error:
            raise DataError(f"data: cannot read {shown}: {error}") from error
        finally:
            os.close(descriptor)

    @staticmethod
    def _small_text(shard: bytes, member: Member) -> str | None:
        with open(shard, "rb") as file:
            file.seek(member.data_offset)
            return os.fsdecode(file.read(member.size)).strip() or None

    def __len__(self) -> int:
        """Number of images."""
        return len(self._offsets)

    def __getstate__(self) -> dict[str, object]:
        """Everything but the open files and their lock."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_open_shards", "_lock")}

    def __setstate__(self, state: dict[str, object]) -> None:
        """A copy that has opened no file yet."""
        for name, value in state.items():
            setattr(self, name, value)
        self._open_shards = {}
        self._lock = threading.Lock()

    def _opened(self, shard: int) -> _OpenShard:
        """The shard opened in this process; at most 64 are kept open."""
        with self._lock:
            opened = self._open_shards.get(shard)
            if opened is None:
                opened = _OpenShard(self._shards[shard])
                if os.fstat(opened.descriptor).st_size != self._sizes[shard]:
                    raise UnreadableImage("the tar file changed after it was indexed")
                if len(self._open_shards) >= _MAX_OPEN_SHARDS:
                    del self._open_shards[next(iter(self._open_shards))]
                self._open_shards[shard] = opened
            return opened

    def read(self, index: int) -> bytes:
        """The member's bytes."""
        size, offset = int(self._lengths[index]), int(self._offsets[index])
        if size > MAX_FILE_BYTES:
            raise UnreadableImage(f"{size} bytes, more than {MAX_FILE_BYTES}")
        try:
            # Positioned reads share no file position: forked copies and threads do not interfere.
            opened = self._opened(int(self._shard_of[index]))
            data = os.pread(opened.descriptor, size, offset)
        except OSError as error:
            raise UnreadableImage(error.strerror or str(error)) from error
        if len(data) != size:
            raise UnreadableImage(f"the tar file gave {len(data)} of {size} bytes")
        return data

    def name(self, index: int) -> str:
        """The shard's path, two colons and the member's name."""
        shard = int(self._shard_of[index])
        shown = os.fsdecode(self._shards[shard])
        try:
            header = int(self._headers[index])
            opened = self._opened(shard)
            return f"{shown}::{next(members(opened.descriptor, start=header)).name}"
        except (
            OSError,
            UnreadableImage,
            TarDamaged,
            StopIteration,
        ):  # the shard is gone or changed
            return f"{shown}::byte {self._offsets[index]}"

    def offset(self, index: int) -> int | None:
        """Byte offset of the member's data in its shard."""
        return int(self._offsets[index])


def _folder_labels(folders: list[tuple[str, ...]]) -> list[str | None]:
    """The first folder level that differs between images; `None` where there is no such level."""
    first, last = min(folders), max(folders)  # what these two share, all share
    depth = 0
    while depth < min(len(first), len(last)) and first[depth] == last[depth]:
        depth += 1
    return [folder[depth] if len(folder) > depth else None for folder in folders]
