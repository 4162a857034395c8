"""Checkpoints of the Hugging Face hub: all files fetched first, or the shards one by one while they are needed.

The hub's own library downloads (https://github.com/huggingface/huggingface_hub): it verifies sizes, goes on with files
that were cut off, and keeps what it has in its cache.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils.tqdm import disable_progress_bars

from phisight.errors import InputError, PhisightError
from phisight.export.checkpoint import Checkpoint, HeldTensor, import_safetensors

__all__ = ["StreamedShards", "fetch_checkpoint", "stream_checkpoint"]

DOCUMENTS = ["*.json", "*.jinja"]
WEIGHTS = ["*.safetensors"]
SHARDS_KEPT = 2
"""A layer may lie in two."""


def fetch_checkpoint(repository: str, tell: Callable[[str], None]) -> Path:
    """The directory of a repository's checkpoint in the hub's cache, complete. `tell` gets what is to be fetched.

    Raises InputError for a repository that is not there or a disk without room, PhisightError for a connection that
    fails: what is fetched stays, and the same call goes on.
    """
    patterns = [*DOCUMENTS, *WEIGHTS]
    with _naming(repository):
        missing = _missing(repository, patterns)
        cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
        if missing > free:
            raise InputError(
                f"{repository} has {missing / 1e9:.2f} GB to be fetched, but {cache} has {free / 1e9:.2f} GB free: "
                "make room, set HF_HUB_CACHE to another disk, or fetch shard by shard with --stream-shards"
            )
        if missing:
            tell(f"fetching {missing / 1e9:.2f} GB of {repository} into {cache}")
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))


def _missing(repository: str, patterns: list[str]) -> int:
    """Bytes that are not in the cache; 0 if the hub cannot be reached, since the cache may have all."""
    try:
        found = huggingface_hub.HfApi().model_info(repository, files_metadata=True)
    except RepositoryNotFoundError:
        raise
    except Exception:  # of its HTTP client, whichever that is: the fetching itself says what is wrong
        return 0
    wanted = [each for each in found.siblings or [] if any(fnmatch(each.rfilename, pattern) for pattern in patterns)]
    there = huggingface_hub.try_to_load_from_cache
    return sum(each.size or 0 for each in wanted if not there(repository, each.rfilename, revision=found.sha))


def stream_checkpoint(repository: str, folder: Path) -> Checkpoint:
    """A repository's checkpoint whose shards are fetched into `folder` when a tensor of theirs is read.

    Small files go into the hub's cache as usual, of shards only the headers are read. Raises as `fetch_checkpoint`, and
    as `Checkpoint.open`; a tensor's rows raise PhisightError if its shard cannot be fetched.
    """
    with _naming(repository):
        directory = Path(huggingface_hub.snapshot_download(repository, allow_patterns=DOCUMENTS))
        revision = directory.name  # the commit
        metadata = huggingface_hub.get_safetensors_metadata(repository, revision=revision)
    shards = StreamedShards(repository, revision, folder)
    held: dict[str, HeldTensor] = {}
    for file in sorted(metadata.files_metadata):
        for name, info in sorted(metadata.files_metadata[file].tensors.items()):
            held[name] = (_RemoteTensor(shards, file, name), tuple(info.shape), info.dtype)
    return Checkpoint.open(directory, held, revision)


class StreamedShards:
    """Shards of a repository of which only the last used ones are on the disk. `fetched` are all so far, in order."""

    def __init__(self, repository: str, revision: str, folder: Path) -> None:
        self._repository = repository
        self._revision = revision
        self._folder = folder
        self._open: dict[str, Any] = {}
        self.fetched: list[str] = []

    def tensor(self, file: str, name: str) -> Any:
        """What gives the rows of a tensor of this shard, which is fetched if it is not there. Raises PhisightError."""
        handle = self._open.pop(file, None)
        if handle is None:
            for old in list(self._open)[: max(0, len(self._open) + 1 - SHARDS_KEPT)]:
                del self._open[old]  # also closes it: Windows deletes no file that is open
                (self._folder / old).unlink(missing_ok=True)
            handle = import_safetensors().safe_open(self._fetch(file), framework="numpy")
        self._open[file] = handle  # as the last used
        return handle.get_slice(name)

    def _fetch(self, file: str) -> Path:
        self.fetched.append(file)
        with _naming(self._repository):
            return Path(
                huggingface_hub.hf_hub_download(self._repository, file, revision=self._revision, local_dir=self._folder)
            )


class _RemoteTensor:
    """Sliced as a tensor of an open safetensors file is."""

    def __init__(self, shards: StreamedShards, file: str, name: str) -> None:
        self._shards, self._file, self._name = shards, file, name

    def __getitem__(self, index: Any) -> Any:
        return self._shards.tensor(self._file, self._name)[index]


@contextmanager
def _naming(repository: str) -> Iterator[None]:
    """Errors of the hub's library as ours. Bars are shown on a terminal alone."""
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    except PhisightError:
        raise
    except RepositoryNotFoundError:
        raise InputError(
            f"the hub has no public repository {repository}: give a directory, or another name, or log in with "
            "hf auth login"
        ) from None
    except Exception as error:  # it raises its own errors, those of the system, and those of its HTTP client
        said = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".:")
        raise PhisightError(
            f"fetching {repository} failed: {said}: what is fetched stays, and the same command goes on from there"
        ) from error
