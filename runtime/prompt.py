"""Messages to token ids, as the model was trained on them.

    messages -> turns (role, text) -> the template's rendering -> control tokens, image slots, text -> ids

What a user writes stays plain text. While the template is rendered, every character of a message that could
begin or end a control token or an image marker is replaced by a lone surrogate, which no valid text holds.
The rendering is cut at the markers that are left, which are the template's and ours, and the characters are
put back. Text of a message and text of the template that touch are encoded as one stretch, as the reference
does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from phisight.chat_template import PLAIN_TEMPLATE, ChatTemplate
from phisight.errors import PromptError, TokenizerError
from phisight.sequence import IMAGE_SLOT
from phisight.tokenizer import Tokenizer, lone_surrogate

__all__ = [
    "DIRECT",
    "THINK",
    "THINK_END",
    "Message",
    "Mode",
    "Prompt",
    "PromptBuilder",
    "SystemBlock",
    "check_images",
    "user_message",
]

Mode = Literal["auto", "think", "nothink"]
SystemBlock = Literal["keep", "none"]
Message = Mapping[str, Any]

IMAGE_MARKER = "<image>"
THINK = "<think>"
THINK_END = "</think>"
DIRECT = "<|dummy_84|>"  # opens a direct answer

IMAGE_PARTS = ("image", "image_url", "input_image")
TEXT_PARTS = ("text", "input_text")
SYSTEM_BEGIN = "<|im_start|>system<|im_sep|>"
TURN_END = "<|im_end|>"
OPENERS: dict[Mode, str] = {"think": THINK, "nothink": DIRECT}

NO_TEMPLATE_NOTE = "The checkpoint has no chat template: the plain form is used."
SYSTEM_NOTE = "The chat template has no place for the system message: its text heads the next user turn."
NO_BLOCK_NOTE = "The chat template adds no system block of its own: there is none to leave out."


@dataclass(frozen=True)
class Prompt:
    """A prompt, ready to run.

    `ids` hold IMAGE_SLOT for each of `num_images` images. `mode` is the mode in effect: "think" if the prompt
    ends inside a thought, also where the template itself opened it. `text` is the rendering, for people to
    read: what a user typed and a true control token look alike there, only the ids tell them apart. `notes`
    say in words what stands elsewhere than the messages had it.
    """

    ids: tuple[int, ...]
    num_images: int
    mode: Mode
    text: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Turn:
    """One turn of the conversation, its text shielded, image markers in place."""

    role: Literal["system", "user", "assistant"]
    text: str


class Shield:
    """Keeps message texts from becoming markers while a template handles them.

    A marker needs its first and its last character. Where a text has one of these, a lone surrogate takes its
    place, so no marker can begin or end in a text. One that a template would form around a whole text
    (`<|` + text + `|>`) is prevented by a fence in that text.
    """

    FENCE = "\ud800"
    PROBE = "\ud801"  # a text of its own, which no message can hold

    def __init__(self, markers: Iterable[str]) -> None:
        self._markers = tuple(markers)
        edges = sorted({edge for marker in self._markers for edge in (marker[0], marker[-1])})
        self._hide = {ord(edge): 0xDC00 + n for n, edge in enumerate(edges)}
        self._reveal: dict[int, int | None] = {hidden: edge for edge, hidden in self._hide.items()}
        self._reveal[ord(self.FENCE)] = None

    def hide(self, text: str) -> str:
        hidden = text.translate(self._hide)
        core = hidden.strip()
        if core and any(core in marker for marker in self._markers):
            hidden = hidden.replace(core, self.FENCE + core, 1)
        return hidden

    def reveal(self, text: str) -> str:
        return text.translate(self._reveal)


class PromptBuilder:
    """Builds prompts for one checkpoint: its tokenizer and the source of its chat template, if it has one."""

    def __init__(self, tokenizer: Tokenizer, template: str | None) -> None:
        """Raises TokenizerError for a template that is not valid."""
        self._tokenizer = tokenizer
        self._template = ChatTemplate(PLAIN_TEMPLATE if template is None else template)
        self._notes = [] if template is not None else [NO_TEMPLATE_NOTE]
        self._shield = Shield([*tokenizer.control_tokens, IMAGE_MARKER])
        self._shows_system = self._probe_system()

    def build(
        self,
        messages: str | Sequence[Message],
        *,
        mode: Mode = "auto",
        system_block: SystemBlock = "keep",
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """The prompt for a conversation.

        A string is one user message. A message has "role" (system, user, assistant, tool) and "content": a
        string, or a list of `{"type": "text", "text": ...}` and `{"type": "image"}` parts, joined as they
        are. `<image>` and control tokens typed in a text are plain text, but for the `<think>...</think>` or
        `<|dummy_84|>` at the start of an assistant's text; its thought may also stand in "reasoning_content".

        A system message that the template has no place for goes before the next user text, an empty line
        between; a tool message becomes a user turn; both are noted. `mode` "think" opens a thought, "nothink"
        a direct answer. `system_block="none"` leaves out the system turn that the template puts first by
        itself.

        Raises PromptError for messages that cannot be used, or a mode that the tokenizer has no token for;
        TokenizerError if the template fails.
        """
        notes = list(self._notes)
        turns = self._place_system(self._read_turns(messages, notes), notes)
        rendering = self._render(turns, add_generation_prompt)
        if system_block == "none":
            rendering = self._drop_system_block(rendering, turns, notes)
        rendering, effective_mode = self._open_answer(rendering, mode, add_generation_prompt)
        ids = self._encode(rendering)
        text = self._shield.reveal(rendering)
        return Prompt(ids, ids.count(IMAGE_SLOT), effective_mode, text, tuple(notes))

    # messages -> turns

    def _read_turns(self, messages: str | Sequence[Message], notes: list[str]) -> list[Turn]:
        entries: Sequence[Any] = [user_message(messages)] if isinstance(messages, str) else messages
        if not entries:
            raise PromptError("there are no messages: give at least one user message")
        turns = []
        for number, message in enumerate(entries, 1):
            if not isinstance(message, Mapping):
                found = type(message).__name__
                raise PromptError(f"message {number} is {found}: a mapping with role and content is wanted")
            turns.append(self._read_turn(message, f"message {number}", notes))
        return turns

    def _read_turn(self, message: Message, where: str, notes: list[str]) -> Turn:
        role = message.get("role")
        if message.get("tool_calls"):
            raise PromptError(f"{where} has tool_calls, which have no place here: put them into the content")
        if role == "assistant":
            return Turn("assistant", self._assistant_text(message, where))
        text = self._join(read_parts(message, where))
        if role == "tool":
            notes.append(f"The tool message ({where}) is given as a user turn.")
            return Turn("user", text)
        if role == "system" or role == "user":
            return Turn(role, text)
        raise PromptError(f"{where} has the role {role!r}: system, user, assistant or tool is wanted")

    def _assistant_text(self, message: Message, where: str) -> str:
        """The text of an assistant's turn, with the control tokens that it starts with left as such."""
        thought = message.get("reasoning_content")
        parts = read_parts(message, where, empty_allowed=True)
        opening = ""
        if thought is not None and not isinstance(thought, str):
            raise PromptError(f"{where} has {type(thought).__name__} as reasoning_content: a string is wanted")
        if thought:
            check_text(thought, where)
            self._need_token(THINK, f"{where} has reasoning_content")
            self._need_token(THINK_END, f"{where} has reasoning_content")
            opening = THINK + self._shield.hide(thought) + THINK_END
        elif parts and parts[0] is not None:
            opening, parts[0] = self._split_opening(parts[0])
        return opening + self._join(parts)

    def _join(self, parts: Iterable[str | None]) -> str:
        return "".join(IMAGE_MARKER if part is None else self._shield.hide(part) for part in parts)

    def _split_opening(self, text: str) -> tuple[str, str]:
        """(opening with its control tokens, the plain text after it). White space may come first."""
        content = text.lstrip()
        blank = text[: len(text) - len(content)]
        if content.startswith(DIRECT):
            return blank + DIRECT, content.removeprefix(DIRECT)
        if content.startswith(THINK):
            thought, end, answer = content.removeprefix(THINK).partition(THINK_END)
            return blank + THINK + self._shield.hide(thought) + end, answer
        return "", text

    # system messages

    def _probe_system(self) -> bool:
        """Whether the template shows a system message."""
        probe = [Turn("system", Shield.PROBE), Turn("user", "")]
        try:
            return Shield.PROBE in self._template.render(as_messages(probe), add_generation_prompt=True)
        except TokenizerError:  # a template may refuse the role
            return False

    def _place_system(self, turns: list[Turn], notes: list[str]) -> list[Turn]:
        """Leave a leading system turn to a template that shows it; put any other before the next user text."""
        placed: list[Turn] = []
        pending: list[str] = []
        for turn in turns:
            if turn.role == "system":
                if self._shows_system and not placed:
                    placed.append(turn)
                elif turn.text.strip():
                    pending.append(turn.text)
                    notes.append(SYSTEM_NOTE)
            elif turn.role == "user" and pending:
                placed.append(replace(turn, text="\n\n".join([*pending, turn.text])))
                pending = []
            else:
                placed.append(turn)
        if pending:
            placed.append(Turn("user", "\n\n".join(pending)))
        return placed

    # turns -> rendering -> ids

    def _render(self, turns: Sequence[Turn], add_generation_prompt: bool) -> str:
        rendering = self._template.render(as_messages(turns), add_generation_prompt=add_generation_prompt)
        for number, turn in enumerate(turns, 1):
            # A template may shorten what the assistant said (old thoughts), not what it was told.
            if turn.role != "assistant" and turn.text.strip() not in rendering:
                raise PromptError(f"the chat template leaves out the text of turn {number} ({turn.role})")
        return rendering

    def _drop_system_block(self, rendering: str, turns: Sequence[Turn], notes: list[str]) -> str:
        """The rendering without the system turn that the template begins with by itself."""
        end = rendering.find(TURN_END)
        if end < 0 or turns[0].role == "system" or not rendering.startswith(SYSTEM_BEGIN):
            notes.append(NO_BLOCK_NOTE)
            return rendering
        return rendering[end + len(TURN_END) :].removeprefix("\n")

    def _open_answer(self, rendering: str, mode: Mode, add_generation_prompt: bool) -> tuple[str, Mode]:
        """Append the mode's control token; (rendering, mode in effect)."""
        if mode != "auto" and mode not in OPENERS:
            raise PromptError(f"there is no mode {mode!r}: auto, think or nothink is wanted")
        if not add_generation_prompt:
            if mode != "auto":
                raise PromptError(f"mode {mode} opens the answer and needs add_generation_prompt=True")
            return rendering, mode
        for opened, token in OPENERS.items():
            if rendering.rstrip().endswith(token) and token in self._tokenizer.control_tokens:
                if mode not in ("auto", opened):
                    raise PromptError(f"mode {mode}: the chat template opens the answer in mode {opened} by itself")
                return rendering, opened
        if mode == "auto":
            return rendering, mode
        self._need_token(OPENERS[mode], f"mode {mode} was asked for")
        return rendering + OPENERS[mode], mode

    def _need_token(self, token: str, purpose: str) -> None:
        if token not in self._tokenizer.control_tokens:
            raise PromptError(f"{purpose}, but the tokenizer has no token {token}: leave it out")

    def _encode(self, rendering: str) -> tuple[int, ...]:
        """Ids of a shielded rendering. As in the reference, each piece between images is encoded alone."""
        ids: list[int] = []
        for index, piece in enumerate(rendering.split(IMAGE_MARKER)):
            if index > 0:
                ids.append(IMAGE_SLOT)
            for part in self._tokenizer.split_control(piece):
                if isinstance(part, int):
                    ids.append(part)
                else:
                    ids += self._tokenizer.encode(self._shield.reveal(part), parse_special=False)
        return tuple(ids)


def read_parts(message: Message, where: str, *, empty_allowed: bool = False) -> list[str | None]:
    """A message's content as texts and images (None), neighbouring texts joined."""
    content = message.get("content")
    if content is None and empty_allowed:
        return []
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        found = type(content).__name__
        raise PromptError(f"{where} has {found} as content: a string or a list of parts is wanted")
    parts: list[str | None] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in IMAGE_PARTS:
            parts.append(None)
            continue
        text = part.get("text") if kind in TEXT_PARTS else None
        if not isinstance(text, str):
            raise PromptError(f"{where} has a part that is neither text nor an image: {str(part)[:60]!r}")
        check_text(text, where)
        if parts and parts[-1] is not None:
            parts[-1] += text
        else:
            parts.append(text)
    return parts


def check_text(text: str, where: str) -> None:
    """Raises PromptError for text with a lone surrogate: it is no character, and the shield needs them."""
    if (found := lone_surrogate(text)) is not None:
        raise PromptError(f"{where} holds {found}, half of a surrogate pair: decode the text properly")


def as_messages(turns: Iterable[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def user_message(text: str, num_images: int = 0) -> Message:
    """A question about images as the model was trained: for each an image and a newline, then the text."""
    image: list[dict[str, str]] = [{"type": "image"}, {"type": "text", "text": "\n"}]
    return {"role": "user", "content": [*(image * num_images), {"type": "text", "text": text}]}


def check_images(prompt: Prompt, count: int) -> None:
    """Raises PromptError, with both counts, unless `count` images are given for the prompt's slots."""
    if prompt.num_images != count:
        raise PromptError(
            f"the prompt has {prompt.num_images} image slots, but {count} images were given: "
            "give one image for each slot"
        )
