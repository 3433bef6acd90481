"""Which checkpoints stay, that no blob of theirs goes, and that damaged records are never half used."""

from __future__ import annotations

import contextlib
import json
import secrets
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.checkpoints import CheckpointStore, DamagedCheckpointError, FencedError, StoreError, kept
from learner.records import (
    BlobRef,
    Checkpoint,
    decode_checkpoint,
    decode_lease,
    decode_pointer,
    encode_checkpoint,
    manifest_path,
)
from tests.stores import NOW, THETA, Place, owner, save

keys = st.sets(st.tuples(st.integers(1, 4), st.integers(0, 40)), max_size=30)


@given(keys, st.integers(1, 6), st.integers(1, 12), st.sets(st.integers(0, 40), max_size=4))
def test_retention_keeps_the_newest_every_nth_the_first_and_the_leased_and_nothing_else(
    keys: set[tuple[int, int]], keep_last: int, keep_every: int, leased: set[int]
) -> None:
    result = kept(keys, keep_last, keep_every, leased)
    newest = sorted(keys)[-keep_last:]
    best = {version: max(key for key in keys if key[1] == version) for _, version in keys}
    for key in keys:
        regular = key[1] % keep_every == 0 and best[key[1]] == key
        assert (key in result) == (key in newest or regular or key[1] in leased)
    assert result <= keys
    assert kept(result, keep_last, keep_every, leased) == result  # thinning out twice changes nothing
    if 0 in best:
        assert best[0] in result


steps = st.lists(st.tuples(st.sampled_from(["save", "restart", "retain", "lose"]), st.integers(1, 4)), max_size=25)


@settings(max_examples=60, deadline=None)
@given(steps, st.sets(st.integers(0, 30), max_size=3))
def test_whatever_happens_kept_checkpoints_stay_readable_and_no_blob_is_left_over(
    steps: list[tuple[str, int]], leased: set[int]
) -> None:
    store = CheckpointStore("memory://retention", f"run-{secrets.token_hex(8)}")
    lease, version = store.acquire(owner(), NOW), 0
    expected = save(store, lease, 0)
    for step, amount in steps:
        if step == "save":
            version += amount
            expected = save(store, lease, version)
        elif step == "restart":
            lease = store.acquire(owner(), NOW)
        elif step == "lose" and (older := [item for item in store.list() if item.version < expected.version]):
            version = older[0].version  # rolled back to an older version by a new incarnation
            lease = store.acquire(owner(), NOW)
            expected = save(store, lease, version)
        elif step == "retain":
            before = store.list()
            deleted = store.retain(amount, 5, leased)
            after = store.list()
            assert {item.name for item in before} == {item.name for item in after} | set(deleted)
            referred = {f"blobs/{blob.digest}" for item in after for blob in item.blobs.values()}
            assert set(store._storage.list("blobs")) == referred
            assert {item.version for item in before} & (leased | {0}) <= {item.version for item in after}
        assert (store.latest(), store.damaged_found) == (expected, [])
        for item in store.list():
            assert store.read(item, "theta") == THETA % item.version


def test_a_retain_that_dies_at_any_deletion_is_finished_by_the_next(place: Place) -> None:
    for n in range(100):
        store = CheckpointStore(place[0], f"{place[1]}-{n}", place[2])
        lease = store.acquire(owner(), NOW)
        save(store, lease, 0, 1, 2, 3, 4)
        delete, left = store._storage.delete, [n]

        def dying(path: str, delete: Any = delete, left: list[int] = left) -> None:
            if left[0] == 0:
                raise StoreError("killed")
            left[0] -= 1
            delete(path)

        store._storage.delete = dying
        with contextlib.suppress(StoreError):
            store.retain(1, 1000, [2])
        store._storage.delete = delete
        for item in store.list():  # manifests went before their blobs
            assert store.read(item, "theta") == THETA % item.version
        store.retain(1, 1000, [2])
        assert [item.version for item in store.list()] == [4, 2, 0]
        assert len(store._storage.list("blobs")) == 4  # three thetas and the optimizer they share
        if left[0] > 0:
            break
    assert n == 5  # two manifests and two blobs, and one that was not reached


def test_retain_removes_what_interrupted_saves_left_but_never_what_latest_names(place: Place, run: Any) -> None:
    store, lease = run
    save(store, lease, 1, 2, 3)
    latest = store._storage.read("LATEST")
    save(store, lease, 5)
    store._storage.put("LATEST", latest)  # as if killed just before LATEST moved to 5
    store._storage.put("blobs/" + "0" * 64, b"of a save that never wrote its manifest")
    store._storage.put(manifest_path(f"{9:012d}.{1:06d}"), b"damaged")
    assert store.retain(1, 1000, []) == [f"{version:012d}.{1:06d}" for version in (9, 2, 1)]
    assert [item.version for item in store.list()] == [5, 3]
    assert store.latest().version == 3
    assert "blobs/" + "0" * 64 not in store._storage.list("blobs")
    with pytest.raises(FencedError, match="only the holder"):
        CheckpointStore(*place).retain(1, 1, [])


def test_a_reader_whose_checkpoint_was_deleted_is_told_so(place: Place, run: Any) -> None:
    store, lease = run
    old = save(store, lease, 1)
    save(store, lease, 2)
    store.retain(1, 1000, [])
    with pytest.raises(DamagedCheckpointError, match="found nothing"):
        CheckpointStore(*place).read(old, "theta")


def test_checkpoints_of_a_newer_paceline_are_refused_rather_than_deleted(run: Any) -> None:
    store, lease = run
    save(store, lease, 1, 2)
    path = manifest_path(f"{3:012d}.{1:06d}")
    store._storage.put(path, json.dumps({"schema": 2}).encode())
    for use in (store.list, lambda: store.retain(1, 1, [])):
        with pytest.raises(StoreError, match=r"schema = 2: written by a newer paceline .*; upgrade"):
            use()
    assert store.latest().version == 2
    assert store._storage.read(path) is not None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("decode", "fields"),
    [
        (
            lambda data: decode_checkpoint("m", data, f"{1:012d}.{1:06d}"),
            ["version", "blobs", "digest", "meta", "parent"],
        ),
        (lambda data: decode_pointer("p", data), ["checkpoint", "incarnation"]),
        (lambda data: decode_lease("l", data), ["incarnation", "owner", "renewed", "token", "machine", "released"]),
    ],
)
@settings(max_examples=100)
@given(data=st.data())
def test_arbitrary_bytes_and_json_are_decoded_or_refused_with_one_sentence(
    decode: Any, fields: list[str], data: st.DataObject
) -> None:
    record = {"schema": 1} | {field: data.draw(json_values) for field in fields}
    for raw in (
        data.draw(st.binary(max_size=40)),
        json.dumps(record).encode(),
        json.dumps(data.draw(json_values)).encode(),
    ):
        try:
            decode(raw)
        except StoreError as error:
            assert "expected" in str(error) or "newer paceline" in str(error)  # noqa: PT017


def is_plain(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except ValueError:
        return False


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(max_size=5), json_values, max_size=4).filter(is_plain), st.integers(0, 6))
def test_a_manifest_is_read_as_it_was_written_or_not_at_all_whatever_bit_flips(meta: dict[str, Any], bit: int) -> None:
    checkpoint = Checkpoint(7, 2, {"theta": BlobRef("0" * 64, 5)}, meta, None, f"{7:012d}.{2:06d}")
    data = encode_checkpoint(checkpoint)
    assert decode_checkpoint("m", data, checkpoint.name) == checkpoint
    refused = 0
    for position in range(0, len(data), 5):
        changed = data[:position] + bytes([data[position] ^ (1 << bit)]) + data[position + 1 :]
        try:
            assert decode_checkpoint("m", changed, checkpoint.name) == checkpoint  # such as 1e5 for 1E5
        except StoreError:
            refused += 1
    assert refused > 0
