"""Downloads: cut off, changed, refused and killed half-way, from a real web server and from other filesystems."""

import gzip
import hashlib
import json
import multiprocessing
import random
import signal
import time

import fsspec
import pytest

from tasks.data import fetch
from tasks.data.fetch import TRIES, download
from tasks.errors import DataError
from tests.file_server import file_server

SIZE = 1_000_000
CONTENT = random.Random(0).randbytes(SIZE)
OTHER = random.Random(1).randbytes(SIZE)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def wait_little(monkeypatch):
    monkeypatch.setattr(fetch, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server():
    with file_server({"/set/file.bin": CONTENT}) as running:
        yield running


@pytest.fixture
def part(tmp_path):
    return tmp_path / "file.bin.part"


def get(server, part, size=None, sha256=None, path="/set/file.bin"):
    told = []
    found = download(f"{server.url}{path}", part, size, sha256, lambda done, total: told.append((done, total)))
    return found, told


def test_a_whole_file_in_one_go(server, part):
    found, told = get(server, part, SIZE, SHA256)
    assert found == SHA256
    assert part.read_bytes() == CONTENT
    assert told[0] == (0, SIZE)
    assert told[-1] == (SIZE, SIZE)
    assert told == sorted(told)
    assert [entry["range"] for entry in server.log] == [None]
    assert get(server, part, SIZE, SHA256)[0] == SHA256  # what is whole is not asked for again
    assert len(server.log) == 1


def test_a_connection_that_is_cut_goes_on_where_it_ended(server, part):
    server.cuts = [300_000, 1, 400_000]
    assert get(server, part)[0] == SHA256
    assert [entry["range"] for entry in server.log] == [None, "bytes=300000-", "bytes=300001-", "bytes=700001-"]
    assert {entry["if_range"] for entry in server.log[1:]} == {server.etag("/set/file.bin")}
    assert server.sent == SIZE


def test_after_so_many_tries_what_has_arrived_is_kept_for_the_next_command(server, part):
    server.cuts = [100_000] * TRIES
    with pytest.raises(
        DataError, match=rf"tried {TRIES} times, 500000 bytes are kept in .*file.bin.part, run .* again"
    ):
        get(server, part)
    assert part.read_bytes() == CONTENT[:500_000]
    found, told = get(server, part)
    assert found == SHA256
    assert told[0] == (500_000, SIZE)
    assert server.sent == SIZE


def test_a_file_that_changed_meanwhile_is_fetched_from_its_start(server, part):
    server.cuts = [600_000] + [1] * (TRIES - 1)
    with pytest.raises(DataError):
        get(server, part)
    assert part.stat().st_size == 600_004
    server.files["/set/file.bin"] = OTHER
    assert get(server, part)[0] == hashlib.sha256(OTHER).hexdigest()
    assert part.read_bytes() == OTHER
    assert server.log[-1]["range"] == "bytes=600004-"


def test_without_a_mark_of_its_state_every_try_begins_again(server, part):
    server.etags = False
    server.cuts = [600_000, 600_000]
    assert get(server, part)[0] == SHA256
    assert [entry["range"] for entry in server.log] == [None] * 3


def test_a_server_that_ignores_if_range_is_found_out_by_its_etag(server, part):
    server.cuts = [600_000] + [1] * (TRIES - 1)
    with pytest.raises(DataError):
        get(server, part)
    server.files["/set/file.bin"] = OTHER
    server.check_if_range = False
    server.log.clear()
    assert get(server, part)[0] == hashlib.sha256(OTHER).hexdigest()
    assert [entry["range"] for entry in server.log] == ["bytes=600004-", None]
    server.files["/set/file.bin"] = CONTENT[:10]  # shorter than what is there: 416
    part.write_bytes(OTHER[:600_004])
    assert get(server, part)[0] == hashlib.sha256(CONTENT[:10]).hexdigest()


def test_a_server_without_ranges(server, part):
    server.ranges = False
    server.cuts = [300_000, 999_999]
    assert get(server, part, SIZE, SHA256)[0] == SHA256
    assert server.sent == 2_299_999
    assert part.read_bytes() == CONTENT


def test_a_weak_etag_marks_nothing_but_the_time_of_the_change_does(server, part):
    server.weak, server.changed = True, 1.7e9
    server.cuts = [300_000]
    assert get(server, part)[0] == SHA256
    assert server.log[1]["if_range"] == "Tue, 14 Nov 2023 22:13:20 GMT"
    assert server.sent == SIZE


def test_a_wrong_checksum_throws_everything_away(server, part):
    with pytest.raises(DataError, match=rf"file\.bin: expected SHA-256 {'0' * 64}, found {SHA256}.*thrown away"):
        get(server, part, SIZE, "0" * 64)
    assert not part.exists()
    assert not list(part.parent.iterdir())
    assert get(server, part, SIZE, SHA256)[0] == SHA256
    assert server.log[-1]["range"] is None


def test_a_part_that_was_damaged_on_disk_is_noticed(server, part):
    server.cuts = [500_000] + [1] * (TRIES - 1)
    with pytest.raises(DataError):
        get(server, part, SIZE, SHA256)
    part.write_bytes(b"\0" * part.stat().st_size)
    with pytest.raises(DataError, match="expected SHA-256"):
        get(server, part, SIZE, SHA256)
    assert get(server, part, SIZE, SHA256)[0] == SHA256


@pytest.mark.parametrize("note", [None, "", "{", "[]", '{"url": "x"}', '{"url": "x", "mark": "y", "total": 3}'])
def test_a_part_that_nothing_is_known_of_is_not_used(server, part, note):
    part.write_bytes(b"x" * 1000)
    if note is not None:
        part.with_name(f"{part.name}.json").write_text(note)
    assert get(server, part)[0] == SHA256
    assert server.log[0]["range"] is None


@pytest.mark.parametrize("status", [404, 403, 410, 401])
def test_a_refusal_is_final(server, part, status):
    server.statuses = [status]
    with pytest.raises(DataError, match=rf"{server.url}/set/file.bin: HTTP {status} [A-Z]"):
        get(server, part)
    assert len(server.log) == 1
    assert not list(part.parent.iterdir())


def test_a_passing_failure_is_tried_again_a_few_times(server, part):
    server.statuses = [503, 429, 500]
    assert get(server, part)[0] == SHA256
    server.statuses = [503] * TRIES
    with pytest.raises(DataError, match=rf"HTTP 503 Service Unavailable; tried {TRIES} times, 0 bytes are kept"):
        get(server, part.with_name("again"))
    assert len(server.log) == 4 + TRIES


def test_nobody_there(part):
    with file_server() as gone:
        pass
    with pytest.raises(DataError, match=rf"{gone.url}/set/file.bin: ClientConnectorError.*tried {TRIES} times"):
        get(gone, part)


def test_another_size_than_published_is_refused_before_it_is_transferred(server, part):
    server.pause = 0.1
    with pytest.raises(DataError, match=rf"file\.bin: expected {SIZE + 1} bytes, the server has {SIZE}"):
        get(server, part, SIZE + 1)
    assert server.sent < SIZE / 2


def test_a_server_that_does_not_say_how_long_it_is(server, part):
    server.length = False
    found, told = get(server, part, SIZE)
    assert found == SHA256
    assert told[-1] == (SIZE, None)
    server.cuts = [500_000]
    with pytest.raises(DataError, match=rf"expected {SIZE} bytes, found 500000.*thrown away"):
        get(server, part.with_name("again"), SIZE)


def test_what_is_packed_stays_packed(server, part):
    packed = gzip.compress(CONTENT[:1000])
    server.files["/set/file.bin"] = packed
    server.headers = {"Content-Encoding": "gzip", "Content-Type": "application/x-gzip"}  # as many servers send .gz
    get(server, part, len(packed), hashlib.sha256(packed).hexdigest())
    assert part.read_bytes() == packed


@pytest.mark.parametrize("stated", [SHA256, "0" * 64])
def test_the_checksum_that_a_hub_states_is_compared(server, part, stated):
    server.redirects = {"/resolve/file": ("/set/file.bin", {"X-Linked-ETag": f'"{stated}"'})}
    server.cuts = [500_000]
    if stated == SHA256:
        assert get(server, part, path="/resolve/file")[0] == SHA256
        assert server.sent == SIZE
    else:
        with pytest.raises(DataError, match="expected SHA-256 0000"):
            get(server, part, path="/resolve/file")


def test_two_at_once(server, part):
    holder = fetch._Part(part)
    with pytest.raises(DataError, match=r"file\.bin\.part: another process is fetching it"):
        get(server, part)
    holder.close()
    assert get(server, part)[0] == SHA256


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_other_filesystems(tmp_path, part, scheme):
    url = f"{scheme}://{tmp_path}/source.bin"
    system, path = fsspec.core.url_to_fs(url)
    system.pipe_file(path, CONTENT)
    told = []
    assert download(url, part, SIZE, SHA256, lambda done, total: told.append(done)) == SHA256
    with part.open("r+b") as file:
        file.truncate(400_000)
    assert download(url, part, SIZE, SHA256, lambda done, total: told.append(done)) == SHA256
    assert told[told.index(SIZE) + 1 :][0] == 400_000
    with part.open("r+b") as file:
        file.truncate(400_000)
    time.sleep(0.01)  # the file's time is its mark
    system.pipe_file(path, OTHER)
    assert download(url, part, None, None, lambda done, total: None) == hashlib.sha256(OTHER).hexdigest()
    with pytest.raises(DataError, match=f"source.bin: expected 7 bytes, the server has {SIZE}"):
        download(url, part.with_name("again"), 7, None, lambda done, total: None)
    with pytest.raises(DataError, match=r"none\.bin: FileNotFoundError"):
        download(f"{scheme}://{tmp_path}/none.bin", part.with_name("none"), None, None, lambda done, total: None)


def test_a_filesystem_that_breaks_off(tmp_path, part, monkeypatch):
    from fsspec.implementations.memory import MemoryFile

    url = "memory://fetch/source.bin"
    fsspec.filesystem("memory").pipe_file("/fetch/source.bin", CONTENT)
    monkeypatch.setattr(fetch, "_CHUNK", 300_000)
    read, broken = MemoryFile.read, [ConnectionResetError("reset"), None, TimeoutError("slow")]

    def unreliable(self, length=-1):
        if self.tell() >= 300_000 and broken:
            error = broken.pop()
            if error is None:
                return b""  # as if the file ended here
            raise error
        return read(self, length)

    monkeypatch.setattr(MemoryFile, "read", unreliable)
    assert download(url, part, SIZE, SHA256, lambda done, total: None) == SHA256
    broken += [ConnectionResetError("reset")] * TRIES
    with pytest.raises(DataError, match=r"source\.bin: ConnectionResetError: reset; tried 5 times, 300000 bytes"):
        download(url, part.with_name("again"), SIZE, SHA256, lambda done, total: None)


def test_a_process_that_is_killed_half_way_costs_only_what_was_in_flight(server, part):
    server.pause = 0.01
    process = multiprocessing.get_context("fork").Process(target=get, args=(server, part))
    process.start()
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > SIZE // 3) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    arrived = part.stat().st_size
    assert SIZE // 3 < arrived < SIZE
    assert json.loads(part.with_name(f"{part.name}.json").read_text())["total"] == SIZE
    server.pause = 0
    assert get(server, part)[0] == SHA256
    assert server.log[-1]["range"] == f"bytes={arrived}-"
    assert server.log[-1]["sent"] == SIZE - arrived
    assert part.read_bytes() == CONTENT
