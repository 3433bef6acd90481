"""Owns the checkpoints of one run: who may write them, how they are written, found again and thinned out.

A run's folder holds ``blobs/<sha256>``, ``manifests/<version>.<incarnation>.json``, ``LATEST`` and ``lease.json``;
everything else in it (results, exports) is free for others through ``create`` and ``put``.

- A checkpoint exists once its manifest does; it is acknowledged once LATEST names it. Blobs are written first, the
  manifest next (exclusively), LATEST last (compare-and-swap), so no reader ever sees half of one.
- One learner writes: the holder of the lease. Whoever takes a run over gets a higher incarnation and stamps it on
  LATEST before doing anything else; from then on an earlier incarnation cannot move LATEST. It may still leave a
  manifest of its own behind, under a name that nobody else uses; readers prefer higher incarnations.
- The newest checkpoint is the one LATEST names if it is intact, otherwise the intact one with the highest
  (incarnation, version): after a fall-back from version 150 to 100, what the next incarnation makes of 150 wins.

It must never overwrite or delete what a later incarnation may need, never trust what it reads, and never unpickle.
"""

from __future__ import annotations

import builtins
import contextlib
import re
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from learner.lease import is_free, new_lease
from learner.records import (
    BLOB_NAME,
    BlobRef,
    Checkpoint,
    DamagedCheckpointError,
    Lease,
    Owner,
    Pointer,
    blob_path,
    checkpoint_key,
    checkpoint_name,
    decode_checkpoint,
    decode_lease,
    decode_pointer,
    digest,
    encode_checkpoint,
    encode_lease,
    encode_pointer,
    manifest_path,
)
from learner.storage import StoreError, open_storage

__all__ = [
    "BlobRef",
    "Checkpoint",
    "CheckpointStore",
    "DamagedCheckpointError",
    "FencedError",
    "Lease",
    "Owner",
    "RunHeldError",
    "StoreError",
]

CHECK_SECONDS = 8.0  # how long ``check`` waits for one answer
LATEST, LEASE = "LATEST", "lease.json"
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MANIFEST_PATH = re.compile(r"manifests/(\d{12})\.(\d{6})\.json")
_FREE_PATH = re.compile(
    r"(?!(blobs|manifests|LATEST|lease\.json)(/|$))[A-Za-z0-9][\w.=+-]*(/[A-Za-z0-9][\w.=+-]*)*", re.A
)


class RunHeldError(StoreError):
    """Another learner holds this run."""


class FencedError(StoreError):
    """This learner lost its run to a later incarnation and must stop."""


class CheckpointStore:
    """The checkpoints of ``run`` under ``root`` (a path or a ``file://``, ``s3://`` or ``memory://`` URL).

    ``options``: endpoint_url, region and anon of an S3 client. Constructing does no I/O; every method may raise
    StoreError. Methods may be called from any thread, but ``save`` and ``retain`` never at the same time.
    ``damaged_found`` lists what the last ``latest()`` had to skip, one sentence each.
    """

    def __init__(self, root: str, run: str, options: Mapping[str, Any] | None = None) -> None:
        if not _RUN_NAME.fullmatch(run):
            raise StoreError(f"run.name = {run!r}: expected 1 to 64 letters, digits, dots, dashes or underscores")
        self.run = run
        self.damaged_found: list[str] = []
        self._location = root, run, dict(options or {})
        self._storage = open_storage(*self._location)
        self._lease: Lease | None = None
        self._parent: str | None = None
        self._manifests: dict[str, Checkpoint] = {}  # manifests never change, so each is fetched for a list once

    def check(self) -> None:
        """Write, read back and delete a probe, and see that conditional writes are honoured.

        Raises StoreError, after about ten seconds at most, if anything of that fails.
        """
        storage = open_storage(*self._location, deadline=CHECK_SECONDS)
        path, data = f"probe-{secrets.token_hex(8)}", secrets.token_bytes(16)
        storage.create(path, data)
        try:
            found = storage.read_tagged(path)
            if found is None or found[0] != data:
                raise StoreError(f"{storage.url}: a file just written could not be read back")
            stale = storage.swap(path, found[1], data + b"2") and storage.swap(path, found[1], data + b"3")
            if stale or storage.create(path, data + b"4"):
                raise StoreError(
                    f"{storage.url}: the server ignores conditional writes (If-Match, If-None-Match), without which "
                    "two learners could overwrite each other; use another server"
                )
        finally:
            storage.delete(path)

    # -- who may write ------------------------------------------------------------------------------------------

    def acquire(self, owner: Owner, now: float) -> Lease:
        """Become the next incarnation of the run; ``now`` in seconds since the epoch.

        Possible if the run is free, its lease was not renewed for LEASE_SECONDS, its holder belongs to the same
        launch, or its holder's process on this machine is dead. Raises RunHeldError otherwise, and for all but one
        of several who try at once.
        """
        current, tag = self._read_lease()
        if current and not is_free(current, owner, now):
            age = max(0.0, now - current.renewed)
            raise RunHeldError(
                f"run {self.run!r} is held by process {current.owner.pid} on {current.owner.host} (renewed {age:.0f} s "
                "ago): stop it, or choose another run.name"
            )
        # LATEST and manifests count too: lease.json may have been deleted to force a way in.
        pointer, _ = self._read_pointer()
        known = [record.incarnation for record in (current, pointer) if record] + [key[0] for key in self._keys()]
        incarnation = 1 + max(known, default=0)
        lease = new_lease(incarnation, owner, now)
        if not self._storage.swap(LEASE, tag, encode_lease(lease)):
            raise RunHeldError(f"run {self.run!r} was taken by another learner just now: choose another run.name")
        self._fence(incarnation)
        self._lease = lease
        return lease

    def renew(self, lease: Lease, now: float) -> Lease:
        """Prolong a lease; FencedError if it was released or taken over."""
        return self._rewrite_lease(lease, replace(lease, renewed=now))

    def release(self, lease: Lease) -> None:
        """Let go of the run; FencedError if it was released or taken over."""
        self._rewrite_lease(lease, replace(lease, released=True))

    def _rewrite_lease(self, lease: Lease, wanted: Lease) -> Lease:
        for _ in range(5):  # another thread of this learner may be renewing it right now
            tag = self._assert_held(lease)
            if self._storage.swap(LEASE, tag, encode_lease(wanted)):
                self._lease = None if wanted.released else wanted
                return wanted
        raise StoreError(f"run {self.run!r}: {LEASE} changed five times while it was being written")

    def _read_lease(self) -> tuple[Lease | None, str | None]:
        found = self._storage.read_tagged(LEASE)
        try:
            return (decode_lease(LEASE, found[0]), found[1]) if found else (None, None)
        except DamagedCheckpointError as error:
            raise StoreError(
                f"{self._storage.url}/{error}; delete that file if no learner of this run lives"
            ) from error

    def _assert_held(self, lease: Lease) -> str | None:
        """The tag of lease.json if it is this lease; FencedError otherwise."""
        current, tag = self._read_lease()
        if current is None or current.token != lease.token:
            by = f"was taken over by incarnation {current.incarnation}" if current else "lost its lease.json"
            raise FencedError(f"incarnation {lease.incarnation} of run {self.run!r} {by}")
        if current.released:
            raise FencedError(f"incarnation {lease.incarnation} of run {self.run!r} has released its lease")
        return tag

    def _fence(self, incarnation: int) -> None:
        """Stamp LATEST, so that no earlier incarnation can move it any more."""
        for _ in range(20):  # an earlier incarnation may be moving it right now, once per save at most
            pointer, tag = self._read_pointer()
            if pointer and pointer.incarnation > incarnation:
                break
            if pointer is None:
                newest = self.latest()
                pointer = Pointer(newest.name if newest else None, incarnation)
            if self._storage.swap(LATEST, tag, encode_pointer(replace(pointer, incarnation=incarnation))):
                return
        raise RunHeldError(f"run {self.run!r} was taken over while it was being acquired")

    # -- writing ------------------------------------------------------------------------------------------------

    def save(self, lease: Lease, version: int, blobs: Mapping[str, bytes], meta: Mapping[str, Any]) -> Checkpoint:
        """Write a checkpoint and make it the latest; when this returns, it is durable.

        ``meta`` is JSON (ValueError or TypeError if not). Its parent is the checkpoint that this object last saved
        or read from. Versions must grow within an incarnation; saving one again (after a StoreError, say) returns
        the one that is there. Raises FencedError if the lease was released or taken over; LATEST is then untouched.
        """
        if not 0 <= version < 10**12 or not all(BLOB_NAME.fullmatch(name) for name in blobs):
            raise ValueError(f"version = {version}, blobs = {sorted(blobs)}: expected 0 to 10**12 - 1 and plain names")
        checkpoint = Checkpoint(
            version=version,
            incarnation=lease.incarnation,
            blobs={name: BlobRef(digest(data), len(data)) for name, data in blobs.items()},
            meta=dict(meta),
            parent=self._parent,
            name=checkpoint_name(version, lease.incarnation),
        )
        path, manifest = manifest_path(checkpoint.name), encode_checkpoint(checkpoint)
        checkpoint = decode_checkpoint(path, manifest, checkpoint.name)  # what readers get: meta is plain JSON now
        self._assert_held(lease)
        pointer, tag = self._read_pointer()
        if pointer and pointer.incarnation > lease.incarnation:
            raise FencedError(f"run {self.run!r} was taken over by incarnation {pointer.incarnation}")
        if pointer and pointer.checkpoint and (lease.incarnation, version) < checkpoint_key(pointer.checkpoint):
            raise StoreError(f"checkpoint {checkpoint.name}: expected a version after {pointer.checkpoint}")
        for name, data in blobs.items():
            self._write_blob(checkpoint.blobs[name], data)
        if not self._storage.create(path, manifest):  # an earlier attempt at this version came that far: it stands
            earlier, checkpoint = checkpoint, self._read_manifest(checkpoint.name)
            if earlier.blobs != checkpoint.blobs:
                raise StoreError(f"{self._storage.url}/{path}: exists with other blobs; a version is saved only once")
        if not self._storage.swap(LATEST, tag, encode_pointer(Pointer(checkpoint.name, lease.incarnation))):
            raise FencedError(f"run {self.run!r}: LATEST was moved by a later incarnation, or by two saves at once")
        self._parent = checkpoint.name
        return checkpoint

    def _write_blob(self, blob: BlobRef, data: bytes) -> None:
        """Blobs are named by their content, so an existing one is left alone, unless it has been damaged since."""
        path = blob_path(blob)
        if not self._storage.create(path, data) and self._storage.read(path) != data:
            self._storage.put(path, data)

    # -- finding and reading ------------------------------------------------------------------------------------

    def latest(self) -> Checkpoint | None:
        """The newest intact checkpoint (manifest and all blobs verified), or None; fills ``damaged_found``."""
        for _ in range(5):
            damaged: builtins.list[str] = []
            pointer, tag = self._read_pointer(damaged)
            checkpoint = self._first_intact(pointer, damaged)
            # If LATEST moved on meanwhile, retention may have deleted under our hands: not damage, so look again.
            if not damaged or self._read_pointer()[1] == tag:
                break
        self.damaged_found = damaged
        return checkpoint

    def _first_intact(self, pointer: Pointer | None, damaged: builtins.list[str]) -> Checkpoint | None:
        for name in self._candidates(pointer):
            try:
                checkpoint = self._read_manifest(name)
                for blob in checkpoint.blobs:
                    self._read_blob(checkpoint, blob)
            except DamagedCheckpointError as error:
                damaged.append(str(error))
            else:
                return checkpoint
        return None

    def _candidates(self, pointer: Pointer | None) -> Iterator[str]:
        named = pointer.checkpoint if pointer else None
        if named:
            yield named
        for incarnation, version in self._keys():
            if checkpoint_name(version, incarnation) != named:
                yield checkpoint_name(version, incarnation)

    def list(self) -> builtins.list[Checkpoint]:
        """All checkpoints, newest (incarnation, version) first; blobs are not verified, damaged manifests left out."""
        return self._load(self._keys())

    def _load(self, keys: Iterable[tuple[int, int]]) -> builtins.list[Checkpoint]:
        found = []
        for name in (checkpoint_name(version, incarnation) for incarnation, version in keys):
            with contextlib.suppress(DamagedCheckpointError):
                found.append(self._manifests.get(name) or self._read_manifest(name))
        self._manifests = {checkpoint.name: checkpoint for checkpoint in found}
        return found

    def read(self, checkpoint: Checkpoint, blob: str) -> bytes:
        """A blob's bytes, verified; DamagedCheckpointError if they are missing or not what was saved."""
        data = self._read_blob(checkpoint, blob)
        self._parent = checkpoint.name
        return data

    def _read_blob(self, checkpoint: Checkpoint, blob: str) -> bytes:
        expected = checkpoint.blobs.get(blob)
        if expected is None:
            raise StoreError(f"checkpoint {checkpoint.name} has no blob {blob!r}, only {sorted(checkpoint.blobs)}")
        path = blob_path(expected)
        data = self._storage.read(path)
        if data is None or digest(data) != expected.digest:
            found = "nothing" if data is None else f"{digest(data)} ({len(data)} bytes)"
            raise DamagedCheckpointError(
                f"checkpoint {checkpoint.name}: {self._storage.url}/{path} ({blob}): expected SHA-256 "
                f"{expected.digest} ({expected.size} bytes), found {found}"
            )
        return data

    def _read_manifest(self, name: str) -> Checkpoint:
        path = manifest_path(name)
        data = self._storage.read(path)
        if data is None:
            raise DamagedCheckpointError(f"{self._storage.url}/{path}: expected a manifest, found nothing")
        return decode_checkpoint(f"{self._storage.url}/{path}", data, name)

    def _read_pointer(self, damaged: builtins.list[str] | None = None) -> tuple[Pointer | None, str | None]:
        """LATEST and its tag; no pointer if it is missing or damaged (the latter is noted)."""
        found = self._storage.read_tagged(LATEST)
        try:
            return (decode_pointer(f"{self._storage.url}/{LATEST}", found[0]), found[1]) if found else (None, None)
        except DamagedCheckpointError as error:
            if damaged is not None:
                damaged.append(str(error))
            return None, found[1] if found else None

    def _keys(self) -> builtins.list[tuple[int, int]]:
        """(incarnation, version) of every manifest by name, newest first."""
        matches = (_MANIFEST_PATH.fullmatch(path) for path in self._storage.list("manifests"))
        return sorted(((int(match[2]), int(match[1])) for match in matches if match), reverse=True)

    # -- thinning out -------------------------------------------------------------------------------------------

    def retain(self, keep_last: int, keep_every: int, leased: Collection[int]) -> builtins.list[str]:
        """Delete checkpoints that ``kept`` does not name, then blobs nobody refers to; returns the names deleted.

        For the holder of the lease only (FencedError otherwise), between its saves: a save under way refers to
        blobs that no manifest names yet. A reader of a checkpoint that goes away gets DamagedCheckpointError. What
        a killed retain or save left behind is deleted by the next one.
        """
        if self._lease is None:
            raise FencedError(f"run {self.run!r}: only the holder of its lease may delete checkpoints")
        # Blobs are listed before manifests, so that one whose manifest appears meanwhile is seen to be referred to.
        blobs, keys = self._storage.list("blobs"), self._keys()
        checkpoints = self._load(keys)
        keep = kept([checkpoint_key(checkpoint.name) for checkpoint in checkpoints], keep_last, keep_every, leased)
        pointer, _ = self._read_pointer()
        if pointer and pointer.checkpoint:
            keep.add(checkpoint_key(pointer.checkpoint))
        self._assert_held(self._lease)
        deleted = [checkpoint_name(key[1], key[0]) for key in keys if key not in keep]
        for name in reversed(deleted):
            self._storage.delete(manifest_path(name))
        referred = {blob_path(ref) for item in checkpoints if item.name not in deleted for ref in item.blobs.values()}
        for path in blobs:
            if path not in referred:
                self._storage.delete(path)
        self._storage.sweep()
        return deleted

    # -- free files ---------------------------------------------------------------------------------------------

    def create(self, path: str, data: bytes) -> bool:
        """Write a file of one's own (``results/...``) once; False if it exists, whatever is in it."""
        return self._storage.create(_free(path), data)

    def put(self, path: str, data: bytes) -> None:
        """Write a file of one's own (``exports/...``), whether it exists or not."""
        self._storage.put(_free(path), data)

    def read_file(self, path: str) -> bytes | None:
        """A file of one's own, not verified; None if there is none."""
        return self._storage.read(_free(path))

    def list_files(self, prefix: str) -> builtins.list[str]:
        """Paths of the files below a folder of one's own, sorted."""
        return self._storage.list(_free(prefix.rstrip("/")))


def kept(
    keys: Collection[tuple[int, int]], keep_last: int, keep_every: int, leased: Collection[int]
) -> set[tuple[int, int]]:
    """Which checkpoints, by (incarnation, version), stay.

    Those are the newest ``keep_last``; of every version that is a multiple of ``keep_every`` (0 is one) the highest
    incarnation's; and all of the ``leased`` versions.
    """
    newest_first = sorted(keys, reverse=True)
    regular = {version: (incarnation, version) for incarnation, version in sorted(keys) if version % keep_every == 0}
    return {*newest_first[:keep_last], *regular.values(), *(key for key in keys if key[1] in leased)}


def _free(path: str) -> str:
    if not _FREE_PATH.fullmatch(path):
        raise ValueError(
            f"path = {path!r}: expected plain names separated by '/', other than {LATEST}, {LEASE}, blobs and manifests"
        )
    return path
