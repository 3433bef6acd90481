"""What is put in place below the data root, and what is said of it: on a disk, in memory and on S3."""

import hashlib
import io
import random
import subprocess
import tarfile

import fsspec
import pytest

from configs.schema import DataConfig
from tasks.data import fetch as transfer
from tasks.data import inventory, text
from tasks.data.catalogue import CATALOGUE, Entry, RemoteFile
from tasks.data.files import DataRoot
from tasks.data.inventory import fetch, verify
from tasks.errors import DataError
from tests.file_server import file_server
from tests.image_files import food101_set, idx_set, imagenet_set, tar_gz
from tests.text_files import lm1b_members, sentences, table, write

TEXT = " ".join(sentences(200)).encode()


@pytest.fixture(autouse=True)
def wait_little(monkeypatch):
    monkeypatch.setattr(transfer, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    text._tokenized.cache_clear()


@pytest.fixture
def server():
    with file_server() as running:
        yield running


def place(tmp_path, **config):
    return DataRoot(DataConfig(**{"root": str(tmp_path / "root"), "cache": str(tmp_path / "cache"), **config}))


def published(server, name, contents, checksums=True, **changes):
    """An entry like that of ``name`` whose files (path -> content) the server has."""
    server.files |= {f"/{path}": content for path, content in contents.items()}
    known = CATALOGUE[name]
    files = tuple(
        RemoteFile(
            path,
            f"{server.url}/{path}",
            len(content) if checksums else None,
            hashlib.sha256(content).hexdigest() if checksums else None,
            archive=changes.get("archive", False),
        )
        for path, content in contents.items()
    )
    return Entry(name, known.kind, known.title, known.licence, known.homepage, files, by_hand=known.by_hand)


def bring(entry, files, source=None, only="*"):
    return list(fetch(entry, files, source, only, lambda file: lambda done, total: None))


def messages(entry, files):
    return [(finding.ok, finding.message) for finding in verify(entry, files)]


def mnist():
    return {f"mnist/{name}": content for name, content in idx_set().items()}


# Fetching


def test_files_are_in_place_with_their_checksums_and_a_second_time_nothing_moves(tmp_path, server):
    contents = mnist()
    entry, files = published(server, "mnist", contents), place(tmp_path)
    first = bring(entry, files)
    assert [found.transferred for found in first] == [len(content) for content in contents.values()]
    folder = tmp_path / "root" / "mnist"
    assert {path.name for path in folder.iterdir()} == {"SHA256SUMS", *(path[6:] for path in contents)}
    for path, content in contents.items():
        assert (tmp_path / "root" / path).read_bytes() == content
    checked = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert len(checked.stdout.splitlines()) == 4
    requests = len(server.log)
    again = bring(entry, files)
    assert [found.transferred for found in again] == [0] * 4
    assert [found.sha256 for found in again] == [found.sha256 for found in first]
    assert len(server.log) == requests
    assert all(ok for ok, _ in messages(entry, files))


def test_nothing_is_where_readers_look_before_it_is_whole(tmp_path, server):
    entry, files = published(server, "shakespeare", {"shakespeare/input.txt": TEXT}), place(tmp_path)
    server.cuts = [100] * transfer.TRIES
    with pytest.raises(DataError, match="run the command again"):
        bring(entry, files)
    assert {path.name for path in (tmp_path / "root/shakespeare").iterdir()} == {
        "input.txt.part",
        "input.txt.part.json",
    }
    (found,) = bring(entry, files)
    assert found.transferred == len(TEXT) - 100 * transfer.TRIES
    assert {path.name for path in (tmp_path / "root/shakespeare").iterdir()} == {"input.txt", "SHA256SUMS"}


def test_a_file_of_another_size_is_replaced_and_what_is_thrown_away_counts(tmp_path, server):
    entry, files = published(server, "shakespeare", {"shakespeare/input.txt": TEXT}), place(tmp_path)
    write(tmp_path / "root", {"shakespeare/input.txt": TEXT[:-5]})
    server.ranges, server.cuts = False, [500]
    (found,) = bring(entry, files)
    assert found.transferred == len(TEXT) + 500
    assert (tmp_path / "root/shakespeare/input.txt").read_bytes() == TEXT


def test_another_place_than_the_published_one(tmp_path, server):
    entry = published(server, "shakespeare", {"shakespeare/input.txt": TEXT})
    fsspec.filesystem("memory").pipe_file("/mirror/shakespeare/input.txt", TEXT)
    (found,) = bring(entry, place(tmp_path), source="memory://mirror/")
    assert found.transferred == len(TEXT)
    assert not server.log
    bring(entry, place(tmp_path / "second"), source=str(tmp_path / "root"))
    assert (tmp_path / "second/root/shakespeare/input.txt").read_bytes() == TEXT


def test_some_of_the_files(tmp_path, server):
    contents = {f"wikipedia/train-{index:05d}-of-00041.parquet": table(["x"] * 9) for index in range(3)}
    entry, files = published(server, "wikipedia", contents), place(tmp_path)
    assert [found.path for found in bring(entry, files, only="*-0000[02]-*")] == sorted(contents)[::2]
    with pytest.raises(DataError, match=r"wikipedia: expected a pattern that matches some of train-00000.*'\*\.gz'"):
        bring(entry, files, only="*.gz")


def test_terms_that_a_person_must_accept(tmp_path):
    files = place(tmp_path)
    for name in ("imagenet16", "imagenet32", "imagenet64"):
        with pytest.raises(
            DataError, match=rf"{name}: ImageNet terms.*log in at .*image-net.*root/{name}/, .*verify {name}"
        ):
            bring(CATALOGUE[name], files)
    assert not (tmp_path / "root").exists()


def test_from_a_place_of_ones_own_terms_are_ones_own_affair(tmp_path, server):
    contents = {f"imagenet16/{name}": content for name, content in imagenet_set()[0].items()}
    entry, files = published(server, "imagenet16", contents), place(tmp_path)
    assert len(bring(entry, files, source=server.url)) == 2
    assert messages(entry, files)[-1] == (True, "120 training and 12 test images")


def test_without_a_root(tmp_path):
    with pytest.raises(DataError, match=r"data\.root = None: expected the folder or URL to put shakespeare into"):
        bring(CATALOGUE["shakespeare"], place(tmp_path, root=None))


def test_a_recorded_checksum_is_expected_from_then_on(tmp_path, server):
    path = "wikipedia/train-00000-of-00041.parquet"
    entry, files = published(server, "wikipedia", {path: table(["x"] * 30)}, checksums=False), place(tmp_path)
    (first,) = bring(entry, files)
    (tmp_path / "root" / path).unlink()
    server.files[f"/{path}"] = table(["y"] * 30)
    with pytest.raises(DataError, match=f"expected SHA-256 {first.sha256}"):
        bring(entry, files)
    (tmp_path / "root/wikipedia/SHA256SUMS").unlink()
    assert bring(entry, files)[0].sha256 != first.sha256


# Archives


def test_an_archive_is_unpacked_before_it_is_in_place(tmp_path, server, monkeypatch):
    packed = tar_gz(food101_set())
    entry = published(server, "food101", {"food101/food-101.tar.gz": packed}, archive=True)
    files = place(tmp_path)
    unpack = inventory._unpack

    def killed(*args):
        unpack(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(inventory, "_unpack", killed)
    with pytest.raises(KeyboardInterrupt):
        bring(entry, files)
    folder = tmp_path / "root/food101"
    assert {path.name for path in folder.iterdir()} == {"food-101", "food-101.tar.gz.part", "food-101.tar.gz.part.json"}
    monkeypatch.setattr(inventory, "_unpack", unpack)
    (found,) = bring(entry, files)
    assert found.transferred == 0  # the part was whole
    assert {path.name for path in folder.iterdir()} == {"food-101", "food-101.tar.gz", "SHA256SUMS"}
    assert messages(entry, files) == [
        (True, f"{len(packed):,} bytes, SHA-256 as published"),
        (True, "18 training and 6 test images"),
    ]


def outside():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        member = tarfile.TarInfo("food-101/../../../evil")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"evil"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (outside(), "OutsideDestinationError"),
        (tar_gz({"other/file": b"x"}), r"expected the folder food-101 in it, found \['other'\]"),
        (tar_gz(food101_set())[:-200], "expected a .tar.gz, EOFError"),
        (b"no archive", "expected a .tar.gz, ReadError"),
    ],
)
def test_archives_that_are_not_what_they_should_be(tmp_path, server, packed, message):
    entry = published(server, "food101", {"food101/food-101.tar.gz": packed}, archive=True)
    with pytest.raises(DataError, match=rf"food-101\.tar\.gz.*{message}"):
        bring(entry, place(tmp_path))
    assert not list(tmp_path.rglob("evil"))
    assert not (tmp_path / "root/food101/food-101.tar.gz").exists()


# Elsewhere than on a disk


def check_remote(tmp_path, server, root, options):
    files = DataRoot(DataConfig(root=root, cache=str(tmp_path / "cache"), options=options))
    contents = {"shakespeare/input.txt": TEXT}
    entry = published(server, "shakespeare", contents)
    server.cuts = [1000] * transfer.TRIES
    with pytest.raises(DataError, match="run the command again"):
        bring(entry, files)
    assert files.get("shakespeare/input.txt") is None
    (found,) = bring(entry, files)
    assert found.transferred == len(TEXT) - 1000 * transfer.TRIES
    assert files.get("shakespeare/input.txt").read() == TEXT
    assert list((tmp_path / "cache/downloads").iterdir()) == []
    assert bring(entry, files)[0].transferred == 0
    assert [ok for ok, _ in messages(entry, files)] == [True, True]
    archive = tar_gz(food101_set())
    food = published(server, "food101", {"food101/food-101.tar.gz": archive}, archive=True)
    bring(food, files)
    assert messages(food, files)[-1] == (True, "18 training and 6 test images")
    system, target = files.resolve("shakespeare/input.txt")
    system.pipe_file(target, TEXT[:-1] + b"?")
    text._tokenized.cache_clear()
    assert [ok for ok, _ in messages(entry, files)] == [False, True]


def test_in_memory(tmp_path, server):
    check_remote(tmp_path, server, "memory://inventory", {})


@pytest.mark.s3
def test_on_s3(tmp_path, server, seaweed):
    check_remote(tmp_path, server, f"{seaweed.root}/inventory", seaweed.options)


# Verifying


def test_what_verify_says_of_a_whole_set(tmp_path):
    entry = Entry("mnist", "image", "", "", "", tuple(RemoteFile(path, "") for path in mnist()))
    files = place(tmp_path)
    write(tmp_path / "root", mnist())
    first, again = messages(entry, files), messages(entry, files)
    assert all(ok for ok, _ in first + again)
    assert all("no checksum is published" in message and "recorded" in message for _, message in first[:4])
    assert [message.split(", ")[1] for _, message in again[:4]] == ["SHA-256 as recorded"] * 4
    assert first[4] == again[4] == (True, "30 training and 10 test images")


def test_a_flipped_byte_a_missing_one_and_a_wrong_label(tmp_path, server):
    contents = mnist()
    entry, files = published(server, "mnist", contents), place(tmp_path)
    images, labels = "mnist/train-images-idx3-ubyte", "mnist/train-labels-idx1-ubyte"
    flipped = bytearray(contents[images])
    flipped[500] ^= 1
    write(tmp_path / "root", contents | {images: bytes(flipped)})
    findings = list(verify(entry, files))
    assert [finding.ok for finding in findings] == [False, True, True, True, True]
    assert findings[0].subject.endswith(images)
    assert findings[0].message.startswith(f"expected SHA-256 {hashlib.sha256(contents[images]).hexdigest()}, found ")
    write(tmp_path / "root", {images: contents[images][:-1]})
    findings = list(verify(entry, files))
    size = len(contents[images])
    assert findings[0].message == f"expected {size} bytes, found {size - 1}"
    assert (findings[-1].ok, findings[-1].subject) == (False, "mnist")
    assert "train-images-idx3-ubyte" in findings[-1].message
    bad = bytearray(contents[labels])
    bad[8 + 3] = 77
    write(tmp_path / "root", {images: contents[images], labels: bytes(bad)})
    assert [finding.ok for finding in verify(entry, files)] == [True, False, True, True, False]
    assert "train-labels-idx1-ubyte: label 77 of example 3 (byte 11)" in list(verify(entry, files))[-1].message


def test_a_changed_file_is_not_as_recorded(tmp_path):
    path = "wikipedia/train-00000-of-00041.parquet"
    entry, files = (
        Entry("wikipedia", "text", "", "", "", (RemoteFile(path, ""), RemoteFile("wikipedia/no", ""))),
        place(tmp_path),
    )
    write(tmp_path / "root", {path: table(["x"] * 30)})
    found = messages(entry, files)
    assert found[-1][1].endswith("(1 of the 2 published files are not there, nor needed)")
    write(tmp_path / "root", {path: table(["y"] * 30)})
    text._tokenized.cache_clear()
    assert [ok for ok, _ in messages(entry, files)] == [False, True]


def test_text_that_is_not_utf8_names_file_and_byte(tmp_path):
    members = lm1b_members([sentences(40)], [sentences(9)])
    name = next(iter(members))
    write(tmp_path / "root", {f"lm1b/{path}": data for path, data in (members | {name: b"fine\n\xff\n"}).items()})
    assert messages(CATALOGUE["lm1b"], place(tmp_path)) == [
        (False, f"{tmp_path}/root/lm1b/{name}: expected UTF-8, found byte 0xff at byte 5")
    ]


def test_what_is_embedded_and_what_is_not_there(tmp_path):
    files = place(tmp_path)
    assert messages(CATALOGUE["digits"], files) == [(True, "1797 images; embedded, needs nothing")]
    ((ok, message),) = messages(CATALOGUE["pydoc"], files)
    assert ok
    assert "as 32k: " in message
    assert message.endswith("ids; embedded, needs nothing")
    for name in ("svhn", "wikipedia", "t5_32k"):
        ((ok, message),) = messages(CATALOGUE[name], files)
        assert not ok
        assert "found none" in message


# The table


def test_the_table_names_files_that_can_be_fetched_and_checked():
    for entry in CATALOGUE.values():
        assert entry.embedded != bool(entry.files)
        for file in entry.files:
            assert file.url.startswith(("https://", "http://"))
            assert file.path.count("/") == 1
            assert (file.sha256 is None) == (file.size is None)
            assert file.sha256 is None or len(bytes.fromhex(file.sha256)) == 32
    without = {entry.name for entry in CATALOGUE.values() if any(file.sha256 is None for file in entry.files)}
    assert without == {"wikipedia"}
    assert len(CATALOGUE["wikipedia"].files) == 41


def test_random_bytes_are_no_vocabulary(tmp_path):
    write(tmp_path / "root", {"vocabulary/t5_32k.model": random.Random(0).randbytes(99)})
    assert [ok for ok, _ in messages(CATALOGUE["t5_32k"], place(tmp_path))] == [False, False]
