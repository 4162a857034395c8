"""A loaded model: every stage from pictures and a question to a stream of text, in order.

image -> patches -> image tokens
messages -> ids with image slots
both -> one sequence -> prefill, decode -> tokens -> text
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from phisight.answer import Answer, Chunk, PromptCost, cancelled_early, collect, stream_text
from phisight.backends.base import Decoder, VisionEncoder
from phisight.cached_decoder import CachedDecoder, Cancel
from phisight.cached_encoder import TEXT_ONLY, CachedEncoder, StageProgress
from phisight.chunks import ImageAttention
from phisight.config import ImageBudget
from phisight.constraint import AnswerRule
from phisight.constraint_llguidance import Compiler
from phisight.context import check_context
from phisight.disk_cache import DiskCache
from phisight.errors import Cancelled, ImageError, InputError
from phisight.generate import ControlIds, Generation
from phisight.images import ImageSource
from phisight.manifest import Manifest
from phisight.model_cache import CacheIdentity, ModelCache
from phisight.naflex import Patches, preprocess
from phisight.options import GenerateOptions
from phisight.prompt import (
    THINK,
    THINK_END,
    Message,
    Mode,
    Prompt,
    PromptBuilder,
    SystemBlock,
    check_images,
    user_message,
)
from phisight.sequence import IMAGE_SLOT, ImageFeatures, InputSequence, common_prefix, splice
from phisight.slots import DecoderSlots
from phisight.stopping import StopTexts
from phisight.thought import ThoughtSplitter
from phisight.tokenizer import Tokenizer

if TYPE_CHECKING:
    from phisight.grounding import Grounding

__all__ = ["Model", "StageProgress"]


class Model:
    """A loaded model. One answer at a time; not for two threads at once.

    `notes` say which device and how many threads were chosen, and why. `prompt_lookup` is the default of the option
    (off: docs/performance.md says why).
    """

    prompt_lookup = False

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: Tokenizer,
        prompts: PromptBuilder,
        encoder: VisionEncoder | None,
        decoder: Decoder,
        *,
        context: int,
        image_attention: ImageAttention = "causal",
        notes: tuple[str, ...] = (),
    ) -> None:
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.notes = notes
        self._decoder = CachedDecoder(decoder, context, image_attention)
        self._encoder = CachedEncoder(encoder, self._decoder.hidden_size)
        self._compiler: Compiler | None = None  # made with the first constraint
        self._control = ControlIds(
            frozenset(manifest.model.generation.eos_token_ids),
            tokenizer.control_tokens.get(THINK),
            tokenizer.control_tokens.get(THINK_END),
        )

    @property
    def context(self) -> int:
        """Most positions that prompt and answer may take together."""
        return self._decoder.context

    @property
    def image_attention(self) -> ImageAttention:
        """Whether the tokens of an image see only those before them, or each other."""
        return self._decoder.image_attention

    @property
    def budget(self) -> ImageBudget:
        """Fewest and most patches of an image. Raises ImageError for a text-only model."""
        if self.manifest.model.images is None:
            raise ImageError(TEXT_ONLY)
        return self.manifest.model.images

    @property
    def cached_positions(self) -> int:
        """Positions in the KV cache, of all slots."""
        return self._decoder.held

    @property
    def feature_bytes(self) -> int:
        """Memory of the image features that are kept for further questions."""
        return self._encoder.held_bytes

    def use_slots(self, count: int) -> None:
        """Keep the KV caches of `count` conversations instead of one, each in memory of its own.

        Raises EngineError for more than one where the engine cannot.
        """
        slots = [self._decoder.twin() for _ in range(count - 1)]
        if slots:
            self._decoder = DecoderSlots([*slots, self._decoder])

    def use_cache(self, disk: DiskCache, identity: CacheIdentity, *, pictures: bool) -> None:
        """Keep the KV cache of what all prompts begin with on disk and, if asked, image features and beginnings with
        pictures. `identity` is that of `phisight.model_cache.model_identity`. Call it before `use_slots`.
        """
        first, second = (np.array(self.prompt(text).ids, dtype=np.int64) for text in ("0", "1"))
        shared = tuple(first[: common_prefix(first, second)].tolist())
        self._decoder.store = self._encoder.store = ModelCache(disk, identity, shared, pictures=pictures)

    def options(self, **changes: Any) -> GenerateOptions:
        """The checkpoint's sampling defaults with some fields changed. Raises InputError."""
        defaults = self.manifest.model.generation
        own = {"temperature": defaults.temperature, "top_p": defaults.top_p, "prompt_lookup": self.prompt_lookup}
        return GenerateOptions(**own | changes)

    def preprocess(self, image: ImageSource | Patches, max_patches: int | None = None) -> Patches:
        """Image -> patches under the checkpoint's budget, or a smaller one of `max_patches`; patches stay as they are.

        Raises ImageError, and InputError for `max_patches` beyond what the model was trained on.
        """
        if isinstance(image, Patches):
            return image
        budget = self.budget
        most = budget.max_patches if max_patches is None else max_patches
        if not 1 <= most <= budget.max_patches:
            raise InputError(
                f"max_patches is {most}, wanted 1 to {budget.max_patches}, the most that the model was trained on"
            )
        return preprocess(image, most, min(budget.min_patches, most))

    def encode_image(self, patches: Patches) -> NDArray[np.float32]:
        """Patches -> image tokens (tokens, hidden) float32, from the cache if the same pixels were encoded before.

        Raises ImageError for a text-only model, EngineError.
        """
        return self._encoder.encode(patches)

    def score(
        self,
        ids: ArrayLike,
        images: Sequence[Patches | ImageFeatures] = (),
        *,
        chunk: int = 256,
        last: int | None = None,
    ) -> NDArray[np.float32]:
        """Logits (positions, vocab) float32 of ids (n,) with -200 where an image goes: one row per position after
        splicing, or only for the `last` ones. Features, perhaps of another model, are taken as they are.

        Raises PromptError, EngineError, and ValueError for `last` beyond the sequence.
        """
        self._check_length(ids, images, answer=False)
        return self._decoder.score(self._splice(ids, self._encoder.encode_all(images)), chunk=chunk, last=last)

    def generate_tokens(
        self,
        ids: ArrayLike,
        images: Sequence[Patches] = (),
        options: GenerateOptions | None = None,
        *,
        starts_in_thought: bool = False,
        cancel: Cancel | None = None,
        progress: StageProgress | None = None,
    ) -> Generation:
        """Continue ids (n,) with -200 where an image goes. Iterating yields objects with `token_id`; the end token
        ends it. The images are encoded before this returns.

        Raises PromptError, EngineError, and Cancelled between two images; later, a cancel ends the iteration.
        """
        options = options or self.options()
        self._check_length(ids, images, max_tokens=options.max_tokens)
        mode: Mode = "think" if starts_in_thought else "auto"
        rule = self._rule(options, mode)
        sequence = self._splice(ids, self._encoder.encode_all(images, progress, cancel))
        return self._generation(sequence, options, mode, rule, cancel, progress)

    def prompt(
        self,
        messages: str | Sequence[Message],
        num_images: int = 0,
        *,
        mode: Mode = "auto",
        system_block: SystemBlock = "keep",
    ) -> Prompt:
        """Messages -> ids. A string is one question about all the images. Raises PromptError."""
        if isinstance(messages, str):
            messages = [user_message(messages, num_images)]
        prompt = self.prompts.build(messages, mode=mode, system_block=system_block)
        check_images(prompt, num_images)
        return prompt

    def stream(
        self,
        messages: str | Sequence[Message],
        images: Sequence[ImageSource | Patches] = (),
        *,
        mode: Mode = "auto",
        options: GenerateOptions | None = None,
        system_block: SystemBlock = "keep",
        max_patches: int | None = None,
        cancel: Cancel | None = None,
        progress: StageProgress | None = None,
    ) -> Iterator[Chunk]:
        """Answer a question, or the last of several messages, about some images.

        Chunks are marked as thought or answer; the last one has the finish reason, counts and stage times. The prompt
        and the images are checked before this returns, the work is done while iterating.

        Raises PromptError, ImageError, InputError, EngineError.
        """
        prompt = self.prompt(messages, len(images), mode=mode, system_block=system_block)
        return self.stream_prompt(prompt, images, options, max_patches=max_patches, cancel=cancel, progress=progress)

    def stream_prompt(
        self,
        prompt: Prompt,
        images: Sequence[ImageSource | Patches] = (),
        options: GenerateOptions | None = None,
        *,
        max_patches: int | None = None,
        preprocess_seconds: float = 0.0,
        cancel: Cancel | None = None,
        progress: StageProgress | None = None,
    ) -> Iterator[Chunk]:
        """As `stream`, from a prompt that is made already.

        `preprocess_seconds` is what was spent before on images given as patches.
        """
        options = options or self.options()
        check_images(prompt, len(images))
        rule = self._rule(options, prompt.mode)
        started = perf_counter()
        patches = [self.preprocess(image, max_patches) for image in images]
        preprocess_seconds += perf_counter() - started
        self._check_length(prompt.ids, patches, max_tokens=options.max_tokens)
        return self._stream(prompt, patches, preprocess_seconds, options, rule, cancel, progress)

    def generate(
        self,
        messages: str | Sequence[Message],
        images: Sequence[ImageSource | Patches] = (),
        *,
        mode: Mode = "auto",
        options: GenerateOptions | None = None,
        system_block: SystemBlock = "keep",
        max_patches: int | None = None,
    ) -> Answer:
        """As `stream`, all at once, with the prompt's notes."""
        prompt = self.prompt(messages, len(images), mode=mode, system_block=system_block)
        return collect(self.stream_prompt(prompt, images, options, max_patches=max_patches), prompt.notes)

    def ground(
        self,
        image: ImageSource,
        instruction: str,
        *,
        mode: Mode = "auto",
        options: GenerateOptions | None = None,
        max_patches: int | None = None,
        cancel: Cancel | None = None,
        progress: StageProgress | None = None,
    ) -> Grounding:
        """Where in a picture is what an instruction is about: see `phisight.grounding.ground`."""
        from phisight.grounding import ground  # with the tasks, whose prompt it shares

        return ground(
            self,
            image,
            instruction,
            mode=mode,
            options=options,
            max_patches=max_patches,
            cancel=cancel,
            progress=progress,
        )

    def _stream(
        self,
        prompt: Prompt,
        patches: Sequence[Patches],
        preprocess_seconds: float,
        options: GenerateOptions,
        rule: AnswerRule | None,
        cancel: Cancel | None,
        progress: StageProgress | None,
    ) -> Iterator[Chunk]:
        cost = PromptCost(
            preprocess_seconds,
            encode_seconds=0.0,
            images=len(patches),
            cached_images=sum(map(self._encoder.holds, patches)),
            image_tokens=sum(p.num_patches for p in patches),
            text_tokens=len(prompt.ids) - prompt.num_images,
        )
        started = perf_counter()
        try:
            features = self._encoder.encode_all(patches, progress, cancel)
        except Cancelled:
            yield cancelled_early(replace(cost, encode_seconds=perf_counter() - started))
            return
        cost = replace(cost, encode_seconds=perf_counter() - started)
        sequence = self._splice(prompt.ids, features)
        generation = self._generation(sequence, options, prompt.mode, rule, cancel, progress)
        splitter = ThoughtSplitter.for_tokenizer(self.tokenizer, prompt.mode)
        yield from stream_text(generation, self.tokenizer, splitter, StopTexts(options.stop), cost)

    def _splice(self, ids: ArrayLike, features: Sequence[ImageFeatures]) -> InputSequence:
        return splice(ids, features, vocab_size=self._decoder.vocab_size, hidden_size=self._decoder.hidden_size)

    def _generation(
        self,
        sequence: InputSequence,
        options: GenerateOptions,
        mode: Mode,
        rule: AnswerRule | None,
        cancel: Cancel | None,
        progress: StageProgress | None,
    ) -> Generation:
        prefilled = None if progress is None else lambda done, total: progress("prefill", done, total)
        return Generation(
            self._decoder,
            sequence,
            options,
            self._control,
            drawable=self.tokenizer.vocab_size,
            starts_in_thought=mode == "think",
            rule=rule,
            progress=prefilled,
            cancel=cancel,
        )

    def _rule(self, options: GenerateOptions, mode: Mode) -> AnswerRule | None:
        """What the constraint means for one answer. Raises InputError, EngineError."""
        if options.constraint is None:
            return None
        stop = frozenset(id_ for id_ in self._control.stop if id_ < self.tokenizer.vocab_size)
        if self._compiler is None:
            self._compiler = Compiler(self.tokenizer, stop)
        return AnswerRule(self._compiler.compile(options.constraint), self.tokenizer, stop, mode)

    def _check_length(
        self,
        ids: ArrayLike,
        patches: Sequence[Patches | ImageFeatures],
        *,
        answer: bool = True,
        max_tokens: int | None = None,
    ) -> None:
        """Before the encoder runs: an image can take a minute. Raises PromptError."""
        text = int(np.count_nonzero(np.asarray(ids) != IMAGE_SLOT))
        images = sum(p.num_patches for p in patches)
        check_context(text, images, self.context, answer=answer, max_tokens=max_tokens)
