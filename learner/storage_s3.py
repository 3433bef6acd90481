"""Owns the file operations of ``learner.storage`` on S3, through s3fs.

It must never rely on a listing or a cache for a decision: exclusive creation and compare-and-swap are conditional
requests (``If-None-Match: *`` and ``If-Match: ETag`` on PUT), decided by the server.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from botocore.exceptions import BotoCoreError, NoCredentialsError  # type: ignore[import-untyped]
from fsspec.asyn import sync
from s3fs import S3FileSystem
from s3fs.core import S3_RETRYABLE_ERRORS

from learner.storage import Storage, StoreError

CONNECT_SECONDS = 2  # three attempts to connect stay below ten seconds
READ_SECONDS = 10


class S3Storage(Storage):
    """Objects below ``bucket/prefix`` on S3 or a server that honours If-Match and If-None-Match on PUT.

    Credentials come from the environment (botocore's chain). Requests are retried by botocore (three attempts), so
    an answer may be lost after the write was done; ``swap`` then recognises its own data.
    """

    def __init__(self, root: str, options: Mapping[str, Any], deadline: float) -> None:
        self.bucket, _, self._prefix = root.partition("/")
        self.url = f"s3://{root}"
        self._prefix += "/" if self._prefix else ""
        self._endpoint = options.get("endpoint_url")
        self._deadline = deadline
        if self._endpoint is not None and urlsplit(str(self._endpoint)).scheme not in ("http", "https"):
            raise StoreError(f"storage option endpoint_url = {self._endpoint!r}: expected http://... or https://...")
        self._fs = S3FileSystem(
            endpoint_url=self._endpoint,
            anon=bool(options.get("anon", False)),
            client_kwargs={"region_name": options["region"]} if options.get("region") else {},
            config_kwargs={
                "connect_timeout": CONNECT_SECONDS,
                "read_timeout": READ_SECONDS,
                "retries": {"mode": "standard", "total_max_attempts": 3},
            },
            use_listings_cache=False,
        )
        self._fs.retries = 1  # botocore's are enough

    def read(self, path: str) -> bytes | None:
        found = self.read_tagged(path)
        return found[0] if found else None

    def read_tagged(self, path: str) -> tuple[bytes, str] | None:
        with self._errors():
            try:
                get: tuple[bytes, str] = sync(self._fs.loop, self._get, self._prefix + path, timeout=self._deadline)
            except FileNotFoundError as error:
                if _error_code(error) != "NoSuchKey":
                    raise
                return None
            return get

    def create(self, path: str, data: bytes) -> bool:
        return self._put_if(path, data, IfNoneMatch="*")

    def swap(self, path: str, tag: str | None, data: bytes) -> bool:
        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
        return self._put_if(path, data, **condition) or self.read(path) == data

    def put(self, path: str, data: bytes) -> None:
        with self._errors():
            self._call("put_object", Key=self._prefix + path, Body=data)

    def delete(self, path: str) -> None:
        with self._errors():
            self._call("delete_object", Key=self._prefix + path)

    def list(self, folder: str) -> list[str]:
        found: list[str] = []
        page: dict[str, Any] = {"IsTruncated": True}
        prefix = f"{self._prefix}{folder.strip('/')}/" if folder.strip("/") else self._prefix
        with self._errors():
            while page.get("IsTruncated"):
                token = {"ContinuationToken": page["NextContinuationToken"]} if "NextContinuationToken" in page else {}
                page = self._call("list_objects_v2", Prefix=prefix, **token)
                found += [entry["Key"] for entry in page.get("Contents", [])]
        return sorted(key.removeprefix(self._prefix) for key in found if not key.endswith("/"))

    def sweep(self) -> None:
        """Nothing: an object appears whole or not at all."""

    def _put_if(self, path: str, data: bytes, **condition: str) -> bool:
        with self._errors():
            for _ in range(5):
                try:
                    self._call("put_object", Key=self._prefix + path, Body=data, **condition)
                except OSError as error:
                    if _error_code(error) in ("PreconditionFailed", "412", "NoSuchKey"):
                        return False
                    if _error_code(error) not in ("ConditionalRequestConflict", "409"):
                        raise  # a conflict, though, only says that another such request was under way: ask again
                else:
                    return True
        raise StoreError(f"{self.url}/{path}: five conditional writes in a row conflicted with others; try again")

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._fs.call_s3(method, Bucket=self.bucket, timeout=self._deadline, **arguments)
        return answer

    async def _get(self, key: str) -> tuple[bytes, str]:
        try:
            return await self._get_once(key)
        except S3_RETRYABLE_ERRORS:  # botocore retries the request, but not an answer that breaks off
            return await self._get_once(key)

    async def _get_once(self, key: str) -> tuple[bytes, str]:
        answer = await self._fs._call_s3("get_object", Bucket=self.bucket, Key=key)
        try:
            return await answer["Body"].read(), answer["ETag"]
        finally:
            answer["Body"].close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        where = self._endpoint or "AWS"
        try:
            yield
        except NoCredentialsError as error:
            raise StoreError(
                f"{self.url}: no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or storage.options.anon"
            ) from error
        except PermissionError as error:
            raise StoreError(f"{self.url}: {where} refused the credentials: {error}") from error
        except FileNotFoundError as error:
            raise StoreError(f"{self.url}: no bucket {self.bucket!r} at {where}; create it first ({error})") from error
        except (*S3_RETRYABLE_ERRORS, BotoCoreError) as error:
            reason = str(error) or f"no answer within {self._deadline:g} s"
            raise StoreError(f"{self.url}: cannot reach {where} (storage.options.endpoint_url): {reason}") from error
        except OSError as error:
            raise StoreError(f"{self.url}: {where} answered: {error}") from error


def _error_code(error: OSError) -> str:
    """The S3 error code behind what s3fs made of it ('' if there is none)."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))
