"""What a learner and its readers rely on, on every kind of storage: a directory, memory and S3."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import learner.checkpoints
from learner.checkpoints import CheckpointStore, DamagedCheckpointError, FencedError, Lease, StoreError
from learner.records import blob_path, manifest_path
from learner.storage import MemoryStorage
from tests.stores import NOW, THETA, Place, owner, save


class Intervening:
    """A storage that calls ``act`` before its n-th operation (or after it, as when only the answer is lost)."""

    def __init__(self, storage: Any, n: int, act: Callable[[], None], after: bool = False) -> None:
        self._storage, self._left, self._act, self._after = storage, n, act, after

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._storage, name)
        if not callable(operation):
            return operation

        def intervened(*arguments: Any) -> Any:
            now, self._left = self._left == 0, self._left - 1
            if now and not self._after:
                self._act()
            result = operation(*arguments)
            if now and self._after:
                self._act()
            return result

        return intervened


def fail() -> None:
    raise StoreError("the connection broke")


def test_what_was_saved_is_read_back_by_another_process_of_the_run(place: Place) -> None:
    store = CheckpointStore(*place)
    lease = store.acquire(owner(), NOW)
    assert (store.latest(), store.list(), store.damaged_found) == (None, [], [])
    first = store.save(lease, 0, {"theta": b"zero"}, {"loss": 0.1, "keys": {"2": [1], "10": None}})
    second = store.save(lease, 50, {"theta": b"fifty", "empty": b""}, {})
    reader = CheckpointStore(*place)
    assert reader.latest() == second
    assert reader.list() == [second, first]
    assert [reader.read(second, "theta"), reader.read(second, "empty"), reader.read(first, "theta")] == [
        b"fifty",
        b"",
        b"zero",
    ]
    assert first.meta == {"loss": 0.1, "keys": {"2": [1], "10": None}}
    assert (first.parent, second.parent, second.incarnation) == (None, first.name, 1)
    with pytest.raises(StoreError, match=r"no blob 'thata', only \['empty', 'theta'\]"):
        reader.read(second, "thata")


@pytest.mark.parametrize("after", [False, True])
def test_a_save_that_dies_at_any_operation_leaves_the_previous_checkpoint_or_the_new_one(
    place: Place, after: bool
) -> None:
    for n in range(100):
        store = CheckpointStore(place[0], f"{place[1]}-{n}", place[2])
        lease = store.acquire(owner(), NOW)
        save(store, lease, 50)
        storage = store._storage
        store._storage = Intervening(storage, n, fail, after)
        try:
            save(store, lease, 100)
        except StoreError:
            store._storage = storage
            reader = CheckpointStore(place[0], f"{place[1]}-{n}", place[2])
            found = reader.latest()
            assert found is not None
            assert found.version in (50, 100)
            assert reader.read(found, "theta") == THETA % found.version
            assert reader.damaged_found == []
            assert save(store, lease, 100).parent == f"{50:012d}.{1:06d}"  # it can be repeated
            assert reader.latest() == store.latest() == save(store, lease, 100)
        else:
            break
    assert 6 <= n < 20  # every operation of a save was hit


def test_a_fenced_learner_cannot_move_latest_whenever_it_is_taken_over(place: Place) -> None:
    outcomes = []
    for n in range(100):
        name = f"{place[1]}-{n}"
        old, new = CheckpointStore(place[0], name, place[2]), CheckpointStore(place[0], name, place[2])
        old_lease = old.acquire(owner(), NOW)
        save(old, old_lease, 50)
        taken: list[Lease] = []
        old._storage = Intervening(old._storage, n, lambda: taken.append(new.acquire(owner(), NOW)))  # noqa: B023
        try:
            save(old, old_lease, 100)
        except FencedError:
            outcomes.append("fenced")
            assert new.latest().version == 50
        else:
            if not taken:
                break
            outcomes.append("saved")
            assert new.latest().version == 100  # acknowledged, so the new learner resumes from it
        mine = save(new, taken[0], 60)
        with pytest.raises(FencedError, match="taken over by incarnation 2"):
            save(old, old_lease, 150)
        assert CheckpointStore(*[place[0], name, place[2]]).latest() == mine
    assert outcomes.count("fenced") == len(outcomes) >= 6


@pytest.mark.parametrize("damage", [b"", b"not what was saved", None])
def test_latest_falls_back_to_the_newest_intact_checkpoint_and_says_what_it_skipped(
    place: Place, run: Any, damage: bytes | None
) -> None:
    store, lease = run
    good, bad = save(store, lease, 50, 100), save(store, lease, 150)
    path = blob_path(bad.blobs["theta"])
    store._storage.delete(path)
    if damage is not None:
        store._storage.put(path, damage)
    reader = CheckpointStore(*place)
    assert reader.latest() == good
    (skipped,) = reader.damaged_found
    assert all(text in skipped for text in (bad.name, path, "expected SHA-256 " + bad.blobs["theta"].digest, "found"))
    with pytest.raises(DamagedCheckpointError, match=path):
        reader.read(bad, "theta")
    # The restarted learner comes to version 150 again, with the very same bytes: its blob must be whole again.
    lease = store.acquire(owner(), NOW)
    assert store.read(good, "theta") == THETA % 100
    again = store.save(lease, 150, {"theta": THETA % 150}, {})
    assert (again.name, again.parent) == (f"{150:012d}.{2:06d}", good.name)
    assert (reader.latest(), reader.damaged_found) == (again, [])
    assert reader.read(again, "theta") == THETA % 150


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"schema":1,"checkpoint":"150","incarnation":2}'])
def test_without_latest_the_highest_incarnation_wins_over_the_highest_version(
    place: Place, run: Any, content: bytes | None
) -> None:
    store, lease = run
    save(store, lease, 100, 150, 200)
    lease = store.acquire(owner(), NOW)  # rolled back to 100
    rolled_back = save(store, lease, 110)
    store._storage.delete("LATEST")
    if content is not None:
        store._storage.put("LATEST", content)
    reader = CheckpointStore(*place)
    assert reader.latest() == rolled_back
    assert len(reader.damaged_found) == (content is not None)
    assert all("LATEST" in text for text in reader.damaged_found)
    assert save(store, lease, 120) == reader.latest()  # and the next save mends it
    assert reader.damaged_found == []
    store._storage.delete("LATEST")
    assert CheckpointStore(*place).acquire(owner(), NOW).incarnation == 3
    assert json.loads(store._storage.read("LATEST"))["checkpoint"] == f"{120:012d}.{2:06d}"


def test_a_damaged_manifest_is_skipped_and_named(place: Place, run: Any) -> None:
    store, lease = run
    good, bad = save(store, lease, 50), save(store, lease, 100)
    path = manifest_path(bad.name)
    intact = store._storage.read(path)
    for data, expected in (
        (intact[: len(intact) // 2], "expected JSON"),
        (intact.replace(b'"version":100', b'"version":101'), "expected SHA-256"),
        (store._storage.read(manifest_path(good.name)), "expected those of its name"),
    ):
        store._storage.put(path, data)
        reader = CheckpointStore(*place)
        assert (reader.latest(), reader.list()) == (good, [good])
        assert path in reader.damaged_found[0]
        assert expected in reader.damaged_found[0]
    store._storage.delete(path)
    assert reader.latest() == good
    assert "found nothing" in reader.damaged_found[0]


def test_versions_only_grow_and_a_version_is_saved_once(run: Any) -> None:
    store, lease = run
    first = save(store, lease, 50)
    assert store.save(lease, 50, {"theta": THETA % 50, "optimizer": b"1"}, {"other": "meta"}) == first
    with pytest.raises(StoreError, match="exists with other blobs"):
        store.save(lease, 50, {"theta": b"other"}, {})
    with pytest.raises(StoreError, match=r"expected a version after 0+50\.000001"):
        save(store, lease, 49)
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.save(lease, 60, {"theta": b""}, {"loss": float("nan")})
    with pytest.raises(ValueError, match="plain names"):
        store.save(lease, 60, {"../theta": b""}, {})
    assert store.list() == [first]


def test_a_reader_beside_a_saving_and_retaining_learner_sees_only_whole_checkpoints(place: Place, run: Any) -> None:
    store, lease = run
    save(store, lease, 0)
    done, seen, failures = threading.Event(), [], []

    def watch() -> None:
        reader = CheckpointStore(*place)
        while not done.is_set():
            checkpoint = reader.latest()
            failures.extend(reader.damaged_found if checkpoint else ["nothing found"])
            if checkpoint:
                seen.append(checkpoint.version)
            for old in reader.list():
                try:
                    assert reader.read(old, "theta") == THETA % old.version
                except DamagedCheckpointError as error:  # retention took it meanwhile
                    assert "found nothing" in str(error)  # noqa: PT017

    thread = threading.Thread(target=watch)
    thread.start()
    deadline = time.monotonic() + 30
    version = 0
    while (version < 40 or len(seen) < 5) and time.monotonic() < deadline:
        version += 1
        save(store, lease, version)
        store.retain(2, 10, [])
    done.set()
    thread.join(timeout=30)
    assert failures == []
    assert len(seen) >= 5
    assert seen == sorted(seen)


def test_results_are_created_once_and_exports_overwritten(place: Place, run: Any) -> None:
    store, _ = run
    barrier, won = threading.Barrier(6), []

    def create(i: int) -> None:
        barrier.wait(timeout=30)
        if CheckpointStore(*place).create("results/suite/a.json", b"%d" % i):
            won.append(i)

    threads = [threading.Thread(target=create, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(won) == 1
    assert store.read_file("results/suite/a.json") == b"%d" % won[0]
    store.put("results/b.json", b"1")
    store.put("results/b.json", b"2")
    assert store.read_file("results/b.json") == b"2"
    assert store.read_file("results/c.json") is None
    assert store.list_files("results") == store.list_files("results/") == ["results/b.json", "results/suite/a.json"]
    assert store.list_files("exports") == []
    for path in ("LATEST", "lease.json", "blobs/x", "manifests", "../x", "a//b", "/a", ".tmp/x", "a/../LATEST", ""):
        with pytest.raises(ValueError, match="plain names"):
            store.put(path, b"")


def test_check_passes_and_leaves_nothing_behind(place: Place) -> None:
    store = CheckpointStore(*place)
    store.check()
    assert [path for path in store._storage.list("") if path != ".lock"] == []


def test_check_refuses_storage_that_ignores_conditional_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Careless(MemoryStorage):
        def create(self, path: str, data: bytes) -> bool:
            self.put(path, data)
            return True

    monkeypatch.setattr(learner.checkpoints, "open_storage", lambda root, run, *_, **__: Careless(f"{root}/{run}"))
    with pytest.raises(StoreError, match="ignores conditional writes"):
        CheckpointStore("careless", "run").check()


def in_threads(work: Callable[[], None], count: int) -> None:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)


def test_compare_and_swap_loses_no_update(place: Place) -> None:
    storage = CheckpointStore(*place)._storage
    assert storage.swap("count", None, b"0")
    assert not storage.swap("count", None, b"x")

    def increment() -> None:
        for _ in range(10):
            while True:
                found = storage.read_tagged("count")
                count, *_ = found[0].split()
                unique = b"%d %d" % (int(count) + 1, threading.get_ident())
                if storage.swap("count", found[1], unique):
                    break

    in_threads(increment, 4)
    assert storage.read("count").split()[0] == b"40"


def test_a_file_that_is_overwritten_is_read_whole(place: Place) -> None:
    storage = CheckpointStore(*place)._storage
    contents = {bytes([letter]) * 2_000_000 for letter in b"ab"}
    storage.put("exports/x", min(contents))
    done, seen = threading.Event(), set()

    def read() -> None:
        while not done.is_set():
            seen.add(storage.read("exports/x"))

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(10):
        for content in contents:
            storage.put("exports/x", content)
    done.set()
    thread.join(timeout=60)
    assert seen
    assert seen <= contents
