"""`phisight cache`: what models keep on disk between processes, and the options of the commands that use it."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from pathlib import Path

from phisight.cli.console import Console
from phisight.disk_cache import DiskCache
from phisight.errors import InputError
from phisight.loading import model_directory
from phisight.manifest import FILE_NAME
from phisight.model import Model
from phisight.model_cache import CacheIdentity, model_identity

__all__ = [
    "EXAMPLES",
    "add_arguments",
    "add_cache_options",
    "chosen_cache",
    "identity_of",
    "own_cache",
    "run",
    "use_cache",
]

VARIABLE = "PHISIGHT_CACHE"

EXAMPLES = f"""What all prompts of a model begin with is kept, as its KV cache, in the user's cache directory,
or in ${VARIABLE}, if it took a second or more to compute. With --cache DIR the commands keep image features
too, and prompts up to their last picture.

examples:
  phisight cache
  phisight cache --cache DIR --json
  phisight cache --clear"""

OWN_LIMIT = 2 << 30
OWN_SECONDS = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache", type=Path, metavar="DIR", help="another cache than the user's own")
    parser.add_argument("--clear", action="store_true", help="remove all entries")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")


def run(args: argparse.Namespace, console: Console) -> int:
    disk = DiskCache(_own_directory() if args.cache is None else args.cache)
    entries = disk.entries()
    if args.clear:
        for path, _ in entries:
            with suppress(FileNotFoundError):  # another process was faster
                path.unlink()
    size = sum(stat.st_size for _, stat in entries)
    if args.json:
        told = {"cache": str(disk.directory), "entries": len(entries), "bytes": size, "cleared": args.clear}
        console.document(told)
    else:
        console.line(f"{disk.directory}: {len(entries)} entries, {size / 1e6:,.1f} MB" + ", removed" * args.clear)
    return 0


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """Where a command keeps what saves work next time."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--cache", type=Path, metavar="DIR", help="keep image features and prompts with pictures in this folder"
    )
    where.add_argument("--no-cache", action="store_true", help="neither read nor write a cache on disk")


def use_cache(args: argparse.Namespace, model: Model, path: str | Path) -> None:
    """Give the model the cache of the command line. Raises InputError for a file in the place of the folder."""
    disk = chosen_cache(args)
    if disk is not None:
        model.use_cache(disk, identity_of(args, model, path), pictures=args.cache is not None)


def chosen_cache(args: argparse.Namespace) -> DiskCache | None:
    """The cache of the command line; None for --no-cache. Raises InputError for a file in its place."""
    if args.no_cache:
        return None
    if args.cache is not None and args.cache.exists() and not args.cache.is_dir():
        raise InputError(f"--cache {args.cache} is a file: give a folder, which is made if it is not there")
    return own_cache() if args.cache is None else DiskCache(args.cache)


def own_cache() -> DiskCache:
    """The user's own."""
    return DiskCache(_own_directory(), limit=OWN_LIMIT, least_seconds=OWN_SECONDS)


def identity_of(args: argparse.Namespace, model: Model, name: str | Path) -> CacheIdentity:
    """What a model's entries belong to, opened with these options."""
    path = model_directory(name)
    names = ("device", "accuracy_level", "vision_engine", "gpu_layers", "kv", "repack")
    settings: dict[str, object] = {name: getattr(args, name) for name in names}
    settings["image_attention"] = model.image_attention
    if path.is_dir():
        hashes = {name: entry.sha256 for name, entry in model.manifest.files.items()}
        return model_identity(path, [path / name for name in (*hashes, FILE_NAME)], hashes, settings)
    mmproj = [] if args.mmproj is None else [Path(args.mmproj)]
    return model_identity(path, [path, *mmproj], {}, settings)


def _own_directory() -> Path:
    """The user's cache directory, as the system has it."""
    if value := os.environ.get(VARIABLE):
        return Path(value)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "phisight" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/phisight"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phisight"
