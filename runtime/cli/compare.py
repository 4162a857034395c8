"""`phisight compare`: variants of a model against a reference, on the reference's own answers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import get_args

from phisight.cli.asking import add_device_option
from phisight.cli.baselines import BASELINES_HELP, checkpoint_of, make_baselines, parse_baseline
from phisight.cli.console import Console, ProgressBar
from phisight.cli.mixing import find_mixer
from phisight.cli.temporary_export import usable_model
from phisight.compare.page import page_of
from phisight.compare.passages import (
    WINDOW,
    Asking,
    Passage,
    Question,
    drawn_sources,
    folder_sources,
    text_windows,
)
from phisight.compare.report import Data, report_of
from phisight.compare.run import compare
from phisight.compare.subjects import (
    Absent,
    KvName,
    Opening,
    Source,
    Subject,
    check_same_vocabulary,
    subjects_of,
    unique_names,
)
from phisight.compare.table import table_lines
from phisight.compare.workspace import Workspace
from phisight.errors import EngineError, ImageError, InputError, PhisightError
from phisight.evaluate.folder import FILE_NAME
from phisight.loading import is_checkpoint, model_directory
from phisight.text_file import read_text_file
from phisight.threads import choose_threads, read_threads

__all__ = ["EXAMPLES", "add_arguments", "run"]

DEFAULT_N = 20
DRAWN_MAX_TOKENS = 96
FOLDER_MAX_TOKENS = 256
WORK = "work"
KV = "@kv="

EXAMPLES = f"""The reference answers each question by its likeliest tokens. Each variant then gives its probabilities at
the positions of that answer, from its own pixels on, and answers the question itself.

DIR gets report.json, report.html, and in DIR/{WORK} what was measured: run it again with another variant and only that
one is measured, and after a break it goes on. DIR/{WORK} can be deleted; it holds baselines and the reference's logits,
3.3 kB a position for the built-in model and 401 kB for the 15B model.

--data demo      questions of the built-in tasks, {DEFAULT_N} of each, or --n
--data FOLDER    your own pictures and questions, as for phisight eval --tasks FOLDER
--data FILE      a text in UTF-8: windows of {WINDOW} tokens, scored on the second half as llama-perplexity does

Behind any of them @kv=TYPE names the type of its KV cache: f32, f16 or q8_0 for GGUF, int8 for ONNX exported with it.

A variant is a model directory, demo, a checkpoint (asked as ONNX in float32), or a GGUF file, its mmproj behind a plus.
ONNX models with INT4 or INT8 are measured at accuracy level 4 and 0: 0 shows what the weights cost, 4 rounds
activations too. A float32 export is the best reference.

KLD is the KL divergence of the variant from the reference in nats; "right prob." the root mean square of the change of
the right token's probability. --stages takes one stage at a time from the variant and all others from the reference.
--fine-stages also cuts the graphs of ONNX models, which llama.cpp's do not allow.

{BASELINES_HELP}

examples:
  phisight compare f32 int8 int4 --out comparison
  phisight compare f32 int4 --out comparison --checkpoint phi4 --baseline llama.cpp:Q4_K_M --baseline llama.cpp:Q8_0
  phisight compare f32 int8 int4 model-q4_k_m.gguf+mmproj-f16.gguf --out comparison --stages --speed
  phisight compare both both@kv=int8 --out kv --stages
  phisight compare m.gguf+mm.gguf@kv=f32 m.gguf+mm.gguf m.gguf+mm.gguf@kv=q8_0 --out kv-llama --stages
  phisight compare phi4-f16 phi4-int4 --out receipts-compared --data receipts --max-patches 1024
  phisight compare phi4-f16 phi4-int4 --out text-compared --data wiki.test.raw --n 40 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="REFERENCE", help="the model that all others are measured against")
    parser.add_argument("variants", metavar="VARIANT", nargs="*", help="a model to measure")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder of the report")
    parser.add_argument("--data", metavar="DATA", default="demo", help="demo (default), a folder of cases, or a text")
    parser.add_argument(
        "--n", type=int, metavar="N", help=f"questions of each task or windows (default: {DEFAULT_N} of demo, else all)"
    )
    parser.add_argument(
        "--baseline", metavar="TOOL:TYPE", action="append", default=[], help="what another quantiser makes, see below"
    )
    parser.add_argument("--checkpoint", metavar="DIR", help="what baselines are made of (default: REFERENCE)")
    parser.add_argument("--stages", action="store_true", help="measure what each stage alone brings")
    parser.add_argument(
        "--fine-stages", action="store_true", help="tower, projector, layers and head of ONNX models too: takes longer"
    )
    parser.add_argument(
        "--speed", action="store_true", help="time loading and each stage, and peak memory, in a process for each model"
    )
    parser.add_argument("--mode", choices=["auto", "think", "nothink"], default="auto", help="force a thought, or none")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of an answer")
    parser.add_argument("--max-patches", type=int, metavar="N", help="most patches per image (default: the model's)")
    parser.add_argument("--threads", default="auto", metavar="N", help="threads, or auto (default)")
    add_device_option(parser)
    parser.add_argument("--json", action="store_true", help="the report as one JSON document on standard output")


def run(args: argparse.Namespace, console: Console) -> int:
    _check_numbers(args)
    _check_out(args.out)
    if not args.variants and not args.baseline:
        raise InputError("there is nothing to measure against the reference: give a VARIANT, or a --baseline")
    opening = Opening(read_threads(args.threads), args.device)
    with ExitStack() as passing:
        reference, variants, absent = _subjects(args, opening, passing, console)
        for variant in variants:
            check_same_vocabulary(reference, variant)
        data, passages = _passages(args, reference, console)
        _check_pictures([reference, *variants], passages)
        asking = _asking(args, data)

        @contextmanager
        def progress(name: str, total: int) -> Iterator[ProgressBar]:
            with console.progress(name, total, " passages", scale=False) as bar:
                yield bar

        mixer = find_mixer() if args.fine_stages else None
        if args.fine_stages and mixer is None:
            raise EngineError('--fine-stages joins ONNX graphs: pip install "phisight[export]"')
        try:
            args.out.mkdir(exist_ok=True)
            work = Workspace(args.out / WORK)
            comparison = compare(
                reference, variants, passages, asking, work, progress, stages=args.stages, mixer=mixer, speed=args.speed
            )
        except KeyboardInterrupt:
            console.note(f"phisight: what was measured is kept in {args.out / WORK}: run it again to go on")
            raise
        report = report_of(comparison, data, asking, absent)
    _write(args.out / "report.json", json.dumps(report, indent=1) + "\n")
    _write(args.out / "report.html", page_of(report, comparison))
    for line in table_lines(report):
        console.line(line)
    said = report["data"]
    console.note(
        f"{said['passages']} {'windows' if data.kind == 'text' else 'questions'}, {said['positions']} positions of "
        f"{reference.name} -> {args.out / 'report.html'}"
    )
    if args.json:
        console.document(report)
    return 0


def _check_numbers(args: argparse.Namespace) -> None:
    for name in ("n", "max_tokens", "max_patches"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}: give a whole number, 1 or more")


def _check_out(out: Path) -> None:
    """Before hours of work; nothing of the user's is written over."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: name a folder for the report")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out.absolute().parent} is no directory: make it, or give another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / WORK).is_dir():
        raise InputError(f"{out} is not empty and not of a comparison: give another --out")


def _subjects(
    args: argparse.Namespace, opening: Opening, passing: ExitStack, console: Console
) -> tuple[Subject, list[Subject], list[Absent]]:
    """The reference as it is run, the variants and baselines, ONNX ones at both accuracy levels, and what is absent."""
    asked = [*dict.fromkeys(parse_baseline(given) for given in args.baseline)]
    directory = checkpoint_of(args.reference, args.checkpoint) if asked else None
    asked_models = [_asked_model(given) for given in (args.reference, *args.variants)]
    shown = [text.with_name(text.name + ("" if kv is None else KV + kv)) for text, _, kv in asked_models]
    names = [unique_names(shown[:1])[0], *unique_names(shown[1:])]
    sources = []
    for name, (text, mmproj, kv) in zip(names, asked_models, strict=True):
        checkpoint = is_checkpoint(model_directory(str(text)))
        path = passing.enter_context(usable_model(str(text), console))
        if not path.exists():
            raise InputError(f"{text} does not exist: give a model directory, a GGUF file, a checkpoint, or demo")
        sources.append(Source(name, path, mmproj, checkpoint, kv=kv))
    absent: list[Absent] = []
    if directory is not None:
        threads = choose_threads(opening.threads).count
        made, absent = make_baselines(asked, directory, args.out / WORK / "baselines", threads, console)
        sources += made
    found: list[Subject] = []
    for number, source in enumerate(sources):
        bare = [file for file in (source.path, source.mmproj) if file is not None and file.is_file()]
        with console.progress(source.name, sum(file.stat().st_size for file in bare), "B") as hashed:
            found += subjects_of(source, opening, hashed.add, both_levels=number > 0)
    return found[0], found[1:], absent


def _asked_model(given: str) -> tuple[Path, Path | None, KvName | None]:
    """TEXT.gguf+MMPROJ.gguf -> both paths; anything else is one path. @kv=TYPE behind either -> the type.

    Raises InputError.
    """
    if Path(given).exists():
        return Path(given), None, None
    files, _, kind = given.partition(KV)
    kv = next((name for name in get_args(KvName) if name == kind), None)
    if kind and kv is None:
        raise InputError(f"{given}: there is no KV cache of type {kind}: give one of {', '.join(get_args(KvName))}")
    text, plus, mmproj = files.partition(".gguf+")
    if not plus or Path(files).exists():
        return Path(files), None, kv
    return Path(f"{text}.gguf"), Path(mmproj), kv


def _passages(args: argparse.Namespace, reference: Subject, console: Console) -> tuple[Data, list[Passage]]:
    """What --data means. Raises InputError, ImageError."""
    path = Path(args.data)
    if args.data == "demo":
        data, sources = Data("demo", "demo"), drawn_sources(DEFAULT_N if args.n is None else args.n)
    elif path.is_dir():
        data = Data("folder", args.data)
        sources, problems = folder_sources(path, args.n)
        for problem in problems:
            console.note(f"phisight: {problem}")
        if problems:
            raise InputError(f"{path / FILE_NAME}: {len(problems)} cases cannot be asked: mend the lines above")
    elif path.is_file():
        context = reference.config.decoder.context_length
        return Data("text", args.data), [*text_windows(read_text_file(path), reference.tokenizer(), context, args.n)]
    else:
        raise InputError(f"--data is {args.data!r}: give demo, a folder with {FILE_NAME}, or a text file")
    passages: list[Passage] = []
    with console.progress("questions", len(sources), " questions", scale=False) as bar:
        for source in sources:
            passages.append(Question.of(source))
            bar.add(1)
    return data, passages


def _check_pictures(subjects: Sequence[Subject], passages: Sequence[Passage]) -> None:
    if not any(isinstance(passage, Question) and passage.has_pictures for passage in passages):
        return
    for subject in subjects:
        if subject.config.vision is None:
            raise ImageError(
                f"{subject.name} cannot see, and the questions have pictures: give TEXT.gguf+MMPROJ.gguf for a GGUF "
                "file, or --data with a text"
            )


def _asking(args: argparse.Namespace, data: Data) -> Asking:
    usual = DRAWN_MAX_TOKENS if data.kind == "demo" else FOLDER_MAX_TOKENS
    return Asking(usual if args.max_tokens is None else args.max_tokens, args.mode, args.max_patches)


def _write(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".partial")
    try:
        beside.write_text(text, encoding="utf-8", newline="\n")
        beside.replace(path)
    except OSError as error:
        raise PhisightError(f"{path} cannot be written: {error.strerror or error}") from None
