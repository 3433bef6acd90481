"""Where data files are read from: roots, a user's own paths, what is missing, and the cache of what is remote."""

import time

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from configs.schema import DataConfig
from tasks.data import Library
from tasks.data.files import DataRoot
from tasks.errors import DataError
from tests.image_files import config, food101_set, idx_set, imagenet_set, load, svhn_file, write


def root_at(tmp_path, url):
    return DataRoot(config(tmp_path, url))


# ---- roots


def test_without_a_root_the_error_names_what_is_looked_for_and_the_embedded_data_sets():
    with pytest.raises(DataError, match=r"data\.root = None: .*holds mnist/.*digits, glyphs and pydoc need none"):
        Library(DataConfig()).images("mnist", 8)


def test_a_missing_root_or_file_is_named_with_what_was_looked_for(tmp_path):
    with pytest.raises(
        DataError, match=r"mnist/train-images-idx3-ubyte\.gz or mnist/train-images-idx3-ubyte: .*nowhere"
    ):
        Library(config(tmp_path, tmp_path / "nowhere")).images("mnist", 8)
    files = idx_set()
    del files["t10k-labels-idx1-ubyte"]
    write(tmp_path / "mnist", files)
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte"):
        load(tmp_path, "mnist", 8)


def test_a_folder_where_a_file_should_be_is_a_data_error(tmp_path):
    (tmp_path / "svhn" / "train_32x32.mat").mkdir(parents=True)
    with pytest.raises(DataError, match=r"train_32x32\.mat: expected a file, found a folder"):
        load(tmp_path, "svhn", 8)


def test_an_unreadable_file_is_a_data_error(tmp_path, monkeypatch):
    write(tmp_path / "svhn", {"train_32x32.mat": b"x", "test_32x32.mat": b"x"})

    def refused(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refused)
    with pytest.raises(DataError, match=r"train_32x32\.mat: PermissionError: .*denied"):
        load(tmp_path, "svhn", 8)


def test_an_unknown_protocol_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"data\.root = 'gopher://x', path 'mnist/"):
        Library(config(tmp_path, "gopher://x")).images("mnist", 8)


def test_a_client_option_that_the_filesystem_does_not_know_is_a_data_error(tmp_path):
    unknown = DataConfig(root="reference://x", cache=str(tmp_path), options={"anon": True})
    with pytest.raises(DataError, match=r"data\.root = 'reference://x'"):
        DataRoot(unknown).find(("a",))


@pytest.mark.parametrize("place", ["below", "absolute", "url"])
def test_the_users_own_paths_lie_below_the_root_or_anywhere(tmp_path, place):
    write(tmp_path / "here", {"a": b"below"})
    write(tmp_path / "there", {"a": b"elsewhere"})
    path = {"below": "a", "absolute": f"{tmp_path}/there/a", "url": f"file://{tmp_path}/there/a"}[place]
    for root in (tmp_path / "here", f"file://{tmp_path}/here"):
        wanted = b"below" if place == "below" else b"elsewhere"
        assert root_at(tmp_path, root).find((path,)).read() == wanted
    if place != "below":
        assert DataRoot(DataConfig()).find((path,)).read() == b"elsewhere"


def test_the_roots_options_go_to_its_own_kind_of_filesystem_only(tmp_path, monkeypatch):
    asked = []
    original = fsspec.core.url_to_fs

    def recorded(url, **options):
        asked.append((url, options))
        return original("memory://nothing/here")

    monkeypatch.setattr("tasks.data.files.url_to_fs", recorded)
    root = DataRoot(DataConfig(root="s3://a/b", cache=str(tmp_path), options={"anon": True}))
    for path in ("x", "s3://c/d", "memory://e", "/f"):
        root.get(path)
    assert asked == [
        ("s3://a/b", {"anon": True}),
        ("s3://c/d", {"anon": True}),
        ("memory://e", {}),
        ("/f", {}),
    ]


# ---- what is missing


@pytest.mark.parametrize(
    ("name", "files", "needed"),
    [
        ("mnist", lambda: idx_set(), "t10k-images-idx3-ubyte"),
        ("svhn", lambda: {"train_32x32.mat": svhn_file()[0], "test_32x32.mat": b""}, "test_32x32.mat"),
        ("imagenet64", lambda: imagenet_set(64, 1, parts=2)[0], "Imagenet64_train_part2_npz.zip"),
        ("imagenet64", lambda: imagenet_set(64, 1, parts=2)[0], "Imagenet64_val_npz.zip"),
        ("food101", lambda: food101_set(), "food-101/meta/test.txt"),
    ],
)
def test_what_is_missing_is_told_without_reading(tmp_path, monkeypatch, name, files, needed):
    made = files()
    write(tmp_path / name, made)
    monkeypatch.setattr("pathlib.Path.read_bytes", None)
    monkeypatch.setattr("tasks.data.files.File.open", None)
    library = Library(config(tmp_path))
    assert library.missing(name) is None
    (tmp_path / name / needed).unlink()
    assert needed in library.missing(name)


def test_what_is_embedded_is_never_missing_and_what_has_no_files_always():
    library = Library(DataConfig())
    assert library.missing("digits") is None
    assert library.missing("glyphs") is None
    assert library.missing("pydoc") is None
    for name in ("cifar10", "lm1b", "t5_32k", "folder:a", "npz:a", "parquet:a", "text:a"):
        assert "data.root = None" in library.missing(name)
    for name in ("nothing", "other:a"):
        with pytest.raises(DataError, match=f"{name!r}: expected one of digits"):
            library.missing(name)


# ---- remote files and the cache


@pytest.fixture
def remote(request):
    """An empty folder of fsspec's in-process file system, standing for a remote one."""
    root = f"memory://{request.node.name}"
    system = fsspec.filesystem("memory")
    system.mkdir(f"/{request.node.name}")
    yield root, system
    system.rm(f"/{request.node.name}", recursive=True)


def put(remote, name, data):
    with remote[1].open(f"{remote[0]}/{name}", "wb") as stream:
        stream.write(data)


@pytest.fixture
def downloads(monkeypatch):
    """The paths opened for reading so far."""
    paths = []
    original = MemoryFileSystem._open

    def counted(self, path, mode="rb", **kwargs):
        paths.extend([path] * (mode == "rb"))
        return original(self, path, mode, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "_open", counted)
    return paths


def test_a_remote_root_works_and_is_downloaded_once(tmp_path, remote, downloads):
    for name, data in idx_set().items():
        put(remote, f"mnist/{name}", data)
    downloads.clear()
    assert Library(config(tmp_path, remote[0])).images("mnist", 8).test.num_examples == 10
    assert len(downloads) == 4
    assert Library(config(tmp_path, remote[0])).images("mnist", 12).test.num_examples == 10
    assert len(downloads) == 4
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_a_missing_remote_file_is_named(tmp_path, remote):
    with pytest.raises(DataError, match=r"svhn/train_32x32\.mat: expected such a file below data\.root = 'memory://"):
        Library(config(tmp_path, remote[0])).images("svhn", 8)


def test_a_damaged_cached_file_is_fetched_again(tmp_path, remote, downloads):
    put(remote, "a", b"whole content")
    downloads.clear()
    file = root_at(tmp_path, remote[0]).find(("a",))
    assert file.read() == b"whole content"
    (cached,) = (tmp_path / "cache").iterdir()
    for damaged in (b"whole cont", b"", b"whole c0ntent"):
        cached.write_bytes(damaged)
        assert file.read() == b"whole content"
    assert len(downloads) == 4
    assert file.read() == b"whole content"
    assert len(downloads) == 4


def test_a_download_cut_off_leaves_nothing_and_is_not_taken_for_whole(tmp_path, remote, monkeypatch):
    put(remote, "a", b"whole content")
    file = root_at(tmp_path, remote[0]).find(("a",))
    monkeypatch.setattr(MemoryFile, "read", lambda self, size=-1: b"")
    with pytest.raises(DataError, match=r"/a: expected 13 bytes, the download gave 0"):
        file.read()
    assert not list((tmp_path / "cache").iterdir())

    def broken(self, size=-1):
        raise ConnectionResetError("peer went away")

    monkeypatch.setattr(MemoryFile, "read", broken)
    with pytest.raises(DataError, match=r"memory://.*/a: ConnectionResetError: peer went away"):
        file.read()
    monkeypatch.undo()
    assert file.read() == b"whole content"


def test_a_process_killed_between_write_and_rename_leaves_no_entry(tmp_path, remote):
    put(remote, "a", b"whole content")
    write(tmp_path / "cache", {"writing-killed": b"whole"})
    assert root_at(tmp_path, remote[0]).find(("a",)).read() == b"whole content"


def test_a_replaced_remote_file_is_a_new_entry(tmp_path, remote):
    put(remote, "a", b"first")
    file = root_at(tmp_path, remote[0]).find(("a",))
    assert file.read() == b"first"
    time.sleep(0.01)
    put(remote, "a", b"other")
    assert file.read() == b"other"


def test_a_cache_that_cannot_be_written_costs_a_download_each_time_and_a_warning(tmp_path, remote, caplog):
    put(remote, "a", b"x")
    (tmp_path / "cache").write_bytes(b"")
    assert root_at(tmp_path, remote[0]).find(("a",)).read() == b"x"
    assert "going on without it" in caplog.text
