"""The Hugging Face hub as a place where files are: down and up, nothing else.

Owns the calls to huggingface_hub (the extra ``hub``), which is imported at the first call only. Downloads tensors and
JSON and nothing that could run. Never knows what is in the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from lopt.checkpoint import CheckpointError

CONFIG = "config.json"
FILES = ("*.safetensors", CONFIG)


def download(repo: str, revision: str | None = None) -> str:
    """The directory with the tensors and config.json of ``owner/name``, at ``revision`` (branch, tag or commit).

    What was downloaded once is taken from huggingface_hub's cache, also without a network. Raises ``CheckpointError``
    where huggingface_hub is not installed, the hub cannot be reached, or it knows no such repository or revision.
    """
    hub = _huggingface_hub()
    try:
        return str(hub.snapshot_download(repo, revision=revision, allow_patterns=[*FILES]))
    except _refusals(hub) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(f"hub repository {repo!r}{at} could not be read: {error}") from error


def upload(repo: str, files: Mapping[str, bytes], message: str, private: bool) -> str:
    """Put ``files`` into the repository ``owner/name`` as one commit, creating it if need be; returns the commit's URL.

    The token is huggingface_hub's own (``hf auth login`` or HF_TOKEN). Raises as ``download`` does.
    """
    hub = _huggingface_hub()
    operations = [hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in files.items()]
    try:
        api = hub.HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.create_commit(repo, operations, commit_message=message).commit_url)
    except _refusals(hub) as error:
        raise CheckpointError(f"hub repository {repo!r} could not be written: {error}") from error


def _refusals(hub: ModuleType) -> tuple[type[Exception], ...]:
    """What the hub's client raises: OSErrors and ValueErrors are its own, a network's are those of its HTTP client."""
    return (OSError, ValueError, hub.errors.HTTPError)


def _huggingface_hub() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise CheckpointError("the hub needs the package huggingface_hub: pip install 'paceline[hub]'") from error
    return huggingface_hub
