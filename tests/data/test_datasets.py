from __future__ import annotations

import os
import pickle

import pytest

from dinov2_fast.data.datasets import FolderSource, ListSource, open_images
from dinov2_fast.data.decoding import UnreadableImage, decode_image
from dinov2_fast.data.image_source import number_labels, printable
from dinov2_fast.data.tar_index import TarSource
from dinov2_fast.errors import DataError
from tests.data.pictures import encoded, picture, write_folder, write_tar

PNG = encoded(picture(), "PNG")


def names(source, root):
    return [os.path.relpath(source.name(i), root) for i in range(len(source))]


def test_a_folder_is_searched_recursively_in_byte_order(tmp_path):
    for name in ("b/x/2.png", "b/1.JPG", "a/3.webp", "a.png", "B/0.Tiff", "a/10.gif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(PNG)
    for name in ("notes.txt", "b/.hidden.png", "._a.png", "b/model.pth"):
        (tmp_path / name).write_bytes(PNG)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "thumbnail.png").write_bytes(PNG)
    (tmp_path / "folder.png").mkdir()
    source = open_images(tmp_path)
    expected = ["B/0.Tiff", "a.png", "a/10.gif", "a/3.webp", "b/1.JPG", "b/x/2.png"]
    assert names(source, tmp_path) == expected
    assert source.class_names == ["B", "a", "b"]
    assert [source.label(i) for i in range(6)] == [0, None, 1, 1, 2, 2]
    assert source.read(0) == PNG
    assert source.offset(0) is None


def test_a_flat_folder_has_no_labels(tmp_path):
    source = open_images(write_folder(tmp_path, 3))
    assert source.class_names == []
    assert [source.label(i) for i in range(3)] == [None] * 3


def test_symlink_loops_end_and_a_linked_folder_is_read_once(tmp_path):
    write_folder(tmp_path / "data" / "real", 2)
    write_folder(tmp_path / "elsewhere", 1)
    root = tmp_path / "data"
    (root / "a_loop").symlink_to(root)
    (root / "real" / "up").symlink_to(root / "real")
    (root / "again").symlink_to(root / "real")
    (root / "other").symlink_to(tmp_path / "elsewhere")
    (root / "other2").symlink_to(tmp_path / "elsewhere")
    (root / "one.png").symlink_to(tmp_path / "elsewhere" / "000.png")
    (root / "itself.png").symlink_to(root / "itself.png")
    (root / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    source = open_images(root)
    expected = ["one.png", "other/000.png", "real/000.png", "real/001.png"]
    assert names(source, root) == expected


def test_a_pipe_among_the_images_is_passed_over(tmp_path):
    write_folder(tmp_path, 1)
    os.mkfifo(tmp_path / "pipe.png")
    assert len(open_images(tmp_path)) == 1


def test_a_listed_pipe_or_folder_is_unreadable_and_does_not_block(tmp_path):
    write_folder(tmp_path, 1)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "list.txt").write_text("000.png\npipe.png\n.\nmissing.png\n/dev/zero\n")
    source = open_images(tmp_path / "list.txt")
    assert len(source) == 5
    for index in range(1, 5):
        with pytest.raises(UnreadableImage):
            source.read(index)


def test_a_list_takes_relative_and_absolute_paths_and_labels(tmp_path):
    images = write_folder(tmp_path / "images", 3)
    (tmp_path / "list.txt").write_bytes(
        b"\xef\xbb\xbfimages/000.png\tdog\r\n\r\n"
        + os.fsencode(images / "001.png")
        + b"\tcat\nimages/002.png\n"
    )
    source = open_images(tmp_path / "list.txt")
    assert names(source, images) == ["000.png", "001.png", "002.png"]
    assert source.class_names == ["cat", "dog"]
    assert [source.label(i) for i in range(3)] == [1, 0, None]
    assert decode_image(source.read(2)).size == (40, 40)


def test_numeric_labels_are_numbered_by_value():
    labels, class_names = number_labels(["10", "9", None, "-1", "9"])
    assert class_names == ["-1", "9", "10"]
    assert labels.tolist() == [2, 1, -1, 0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "names no images"),
        (b"\n \n", "names no images"),
        (b"gone.png\nalso gone.png\n", "none of the first 2 files"),
        (encoded(picture(), "PNG"), "neither a tar file nor a text file"),
        (b"\x1f\x8b" + bytes(600), "compressed"),
        (b"BZh9" + bytes(600), "compressed"),
    ],
)
def test_files_that_are_no_source_say_why(tmp_path, content, message):
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        open_images(tmp_path / "data")
    assert error.value.exit_code == 3


def test_nothing_found_names_what_was_looked_for(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"found no images in .*\.jpeg.*\.tar"):
        open_images(tmp_path)
    with pytest.raises(DataError, match="cannot open"):
        open_images(tmp_path / "absent")
    with pytest.raises(DataError, match="cannot open"):
        open_images("nul\0byte")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a folder nor a regular file"):
        open_images(tmp_path / "pipe")


def test_a_folder_of_tars_is_shards_and_images_come_before_tars(tmp_path, caplog):
    (tmp_path / "deep").mkdir()
    write_tar(tmp_path / "deep" / "b.tar", {"1.png": PNG})
    write_tar(tmp_path / "a.TAR", {"0.png": PNG, "2.png": PNG})
    source = open_images(tmp_path)
    assert isinstance(source, TarSource)
    assert names(source, tmp_path) == ["a.TAR::0.png", "a.TAR::2.png", "deep/b.tar::1.png"]
    (tmp_path / "image.png").write_bytes(PNG)
    assert isinstance(open_images(tmp_path), FolderSource)
    assert "2 tar files; the tar files are not read" in caplog.text


def test_sources_survive_pickling_and_a_change_of_directory(tmp_path, monkeypatch):
    write_folder(tmp_path / "images", 2)
    (tmp_path / "list.txt").write_text("images/000.png\n")
    write_tar(tmp_path / "one.tar", {"a/0.png": PNG})
    monkeypatch.chdir(tmp_path)
    sources = [open_images(name) for name in ("images", "list.txt", "one.tar")]
    for source in sources:
        source.read(0)
    monkeypatch.chdir("/")
    for source in sources:
        copy = pickle.loads(pickle.dumps(source))
        assert type(copy) is type(source)
        assert (copy.read(0), copy.name(0)) == (source.read(0), source.name(0))
        assert copy.class_names == source.class_names


def test_files_that_vanish_or_are_empty_are_unreadable_not_fatal(tmp_path):
    source = open_images(write_folder(tmp_path, 2))
    (tmp_path / "000.png").unlink()
    with pytest.raises(UnreadableImage, match="No such file"):
        source.read(0)
    (tmp_path / "001.png").write_bytes(b"")
    with pytest.raises(UnreadableImage, match="empty"):
        decode_image(source.read(1))


def test_files_above_the_size_cap_are_not_read(tmp_path, monkeypatch):
    source = open_images(write_folder(tmp_path, 1))
    monkeypatch.setattr("dinov2_fast.data.datasets.MAX_FILE_BYTES", 10)
    with pytest.raises(UnreadableImage, match="more than 10"):
        source.read(0)


def test_an_unreadable_folder_is_skipped_with_a_warning(tmp_path, caplog, monkeypatch):
    write_folder(tmp_path / "good", 1)
    write_folder(tmp_path / "locked", 1)
    scandir = os.scandir

    def refuse(path):
        if os.fsdecode(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)  # root may read everything
    assert len(open_images(tmp_path)) == 1
    assert "skipped folder" in caplog.text


HOSTILE = [
    b"new\nline.png",
    b"\x1b[31mred\x1b[0m.png",
    b"bell\x07.png",
    b"not utf-8 \xff\xfe.png",
    b"c1 \xc2\x9b31m.png",
    b"<script>.png",
    b"l" * 251 + b".png",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_read_and_printed_without_control_bytes(tmp_path, name):
    with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
        file.write(PNG)
    source = open_images(tmp_path)
    assert source.read(0) == PNG
    shown = printable(source.name(0))
    assert all(character.isprintable() for character in shown)
    shown.encode("utf-8")  # no lone surrogate is left


def test_indices_outside_are_refused(tmp_path):
    source = open_images(write_folder(tmp_path, 2))
    for index in (-1, 2):
        with pytest.raises(IndexError, match=r"0\.\.1"):
            source.read(index)


def test_a_long_list_probes_only_its_beginning(tmp_path):
    write_folder(tmp_path, 1)
    (tmp_path / "list.txt").write_text("000.png\n" + "gone.png\n" * 5000)
    source = open_images(tmp_path / "list.txt")
    assert isinstance(source, ListSource)
    assert len(source) == 5001
