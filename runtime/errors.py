"""Every error that phisight raises on purpose.

    PhisightError                 exit code 1: something failed
    ├── EngineError               an engine is missing, cannot open a file, or failed while running
    ├── AnswerError               a model's answer cannot be used
    ├── Cancelled                 the caller asked to stop
    └── InputError                exit code 2: what the user gave cannot be used
        ├── ImageError            a picture
        ├── PromptError           messages, image slots, the context's length
        ├── TokenizerError        tokenizer.json or the chat template
        ├── ConfigError           config.json and its neighbours
        ├── CheckpointError       safetensors files
        └── ModelDirError         an exported model directory

A message is one line for the user: it names the thing, the value found, the value wanted and the way out.
"""

from __future__ import annotations

__all__ = [
    "AnswerError",
    "Cancelled",
    "CheckpointError",
    "ConfigError",
    "EngineError",
    "ImageError",
    "InputError",
    "ModelDirError",
    "PhisightError",
    "PromptError",
    "TokenizerError",
]


class PhisightError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1


class EngineError(PhisightError):
    """An engine is missing, cannot open a file, or failed while running."""


class AnswerError(PhisightError):
    """A model's answer that cannot be used for what was asked."""


class Cancelled(PhisightError):  # noqa: N818  a request, not a fault
    """The caller asked to stop before the work was done."""


class InputError(PhisightError):
    """What the user gave cannot be used."""

    exit_code = 2


class ImageError(InputError):
    """A picture that cannot be read or used."""


class PromptError(InputError):
    """Messages, image slots or a length that do not fit the model."""


class TokenizerError(InputError):
    """A tokenizer.json or chat template that cannot be used."""


class ConfigError(InputError):
    """A configuration file that is wrong or asks for what is not supported."""


class CheckpointError(InputError):
    """Safetensors files that are missing, damaged or do not fit the configuration."""


class ModelDirError(InputError):
    """A directory that is not a usable exported model."""
