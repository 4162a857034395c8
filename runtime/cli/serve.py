"""`phisight serve`: the model behind an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from phisight.cli.asking import add_model_options, load_model
from phisight.cli.console import Console
from phisight.cli.extras import needs_extra
from phisight.errors import InputError

if TYPE_CHECKING:
    from phisight.serve.settings import ServeSettings

__all__ = ["EXAMPLES", "add_arguments", "run"]

KEY_VARIABLE = "PHISIGHT_API_KEY"

EXAMPLES = f"""Clients of OpenAI's API ask at http://HOST:PORT/v1. Without --host only this machine reaches the server.

examples:
  phisight serve demo
  phisight serve phi4-int4 --port 9000 --max-queue 32 --slots 4
  {KEY_VARIABLE}=secret phisight serve phi4-int4 --host 0.0.0.0
  phisight serve phi4-int4 --allow-origin https://app.example --image-host pictures.example

Ctrl-C stops it: answers that run may end, a second Ctrl-C breaks them off."""

MEGABYTE = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="an exported model directory, a GGUF file, or demo")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8080, metavar="N", help="0 takes a free one (default: 8080)")
    parser.add_argument(
        "--name",
        action="append",
        metavar="NAME",
        help="the model's name for clients; may be given again",
    )
    access = parser.add_argument_group("who may come")
    access.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"a key to ask for; better: ${KEY_VARIABLE}",
    )
    access.add_argument("--api-key-file", metavar="FILE", help="keys to ask for, one a line")
    access.add_argument("--without-key", action="store_true", help="no key though others reach the server")
    access.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a further name of the server"
    )
    access.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="pages that may ask, such as https://app.example",
    )
    access.add_argument(
        "--image-host",
        action="append",
        default=[],
        metavar="HOST",
        help="host to fetch pictures from (default: none)",
    )
    _add_limits(parser.add_argument_group("limits"))
    parser.add_argument("--log-content", action="store_true", help="log what is asked and answered, without pictures")
    add_model_options(parser)


def _add_limits(limits: argparse._ArgumentGroup) -> None:
    limits.add_argument("--max-queue", type=int, default=16, metavar="N", help="requests that may wait (default: 16)")
    limits.add_argument("--slots", type=int, default=2, metavar="N", help="conversations in the cache (default: 2)")
    limits.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of an answer (default: the context)")
    limits.add_argument("--max-images", type=int, default=8, metavar="N", help="pictures of a request (default: 8)")
    limits.add_argument("--max-megapixels", type=float, default=50, metavar="N", help="of a picture (default: 50)")
    limits.add_argument("--max-body", type=float, default=32, metavar="MIB", help="size of a request (default: 32)")
    limits.add_argument(
        "--timeout", type=float, default=3600, metavar="S", help="seconds until an answer has ended (default: 3600)"
    )
    limits.add_argument(
        "--grace", type=float, default=30, metavar="S", help="seconds for answers in work when stopping (default: 30)"
    )


def run(args: argparse.Namespace, console: Console) -> int:
    with needs_extra("serve"):
        from phisight.serve.server import Server, listen
    settings = _settings(args)
    listener = listen(args.host, args.port)
    with listener:
        model = load_model(args)
        for note in model.notes:
            console.note(f"phisight: note: {note}")
        _log_to_standard_error()
        server = Server(model, settings)
        port = listener.getsockname()[1]
        host = f"[{args.host}]" if ":" in args.host else args.host
        console.note(f"phisight: serving {settings.names[0]} at http://{host}:{port}/v1 (Ctrl-C stops)")
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    console.note("phisight: stopped")
    return 0


def _settings(args: argparse.Namespace) -> ServeSettings:
    """Raises InputError."""
    from phisight.serve.settings import Access, Limits, ServeSettings

    access = Access(
        host=args.host,
        api_keys=_keys(args),
        without_key=args.without_key,
        allowed_hosts=tuple(args.allow_host),
        allowed_origins=tuple(args.allow_origin),
        image_hosts=tuple(args.image_host),
    )
    for name in ("max_megapixels", "max_body"):
        if not 0 < (value := getattr(args, name)) < 1e6:
            raise InputError(f"--{name.replace('_', '-')} is {value}, wanted a number above 0")
    limits = Limits(
        queue=args.max_queue,
        body_bytes=int(args.max_body * MEGABYTE) or 1,
        images=args.max_images,
        pixels=int(args.max_megapixels * 1e6) or 1,
        max_tokens=args.max_tokens,
        answer_seconds=args.timeout,
        grace_seconds=args.grace,
    )
    names = tuple(args.name or [Path(args.model).name or str(args.model)])
    return ServeSettings(names, access, limits, args.slots, args.log_content)


def _keys(args: argparse.Namespace) -> tuple[str, ...]:
    """From the command line, the file and the environment. Raises InputError."""
    keys = list(args.api_key)
    if args.api_key_file is not None:
        try:
            lines = Path(args.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise InputError(f"{args.api_key_file} cannot be read: {reason}") from None
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise InputError(f"{args.api_key_file} holds no key: write one a line")
        keys += found
    if os.environ.get(KEY_VARIABLE):
        keys.append(os.environ[KEY_VARIABLE])
    return tuple(keys)


def _log_to_standard_error() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("phisight: %(message)s"))
    log = logging.getLogger("phisight.serve")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
