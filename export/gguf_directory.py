"""The files of a GGUF directory, and how other programs are pointed at them."""

from __future__ import annotations

from dataclasses import dataclass

from phisight.config import ModelConfig
from phisight.export.gguf_plan import GgufOptions

__all__ = ["GgufNames", "modelfile"]


@dataclass(frozen=True)
class GgufNames:
    """Names of the text file and of the mmproj, which a text-only model lacks."""

    text: str
    mmproj: str | None

    @classmethod
    def of(cls, options: GgufOptions, *, has_vision: bool) -> GgufNames:
        mmproj = f"mmproj-{options.vision.lower()}.gguf" if has_vision else None
        mixed = "-mixed" if options.overrides else ""
        return cls(f"model-{options.decoder.lower()}{mixed}.gguf", mmproj)


def modelfile(names: GgufNames, config: ModelConfig) -> str:
    """A Modelfile for Ollama (https://github.com/ollama/ollama/blob/main/docs/modelfile.md)."""
    lines = [f"FROM ./{names.text}"]
    if names.mmproj is not None:
        lines.append(f"FROM ./{names.mmproj}")
    lines += [
        f"PARAMETER temperature {config.generation.temperature:g}",
        f"PARAMETER top_p {config.generation.top_p:g}",
    ]
    return "\n".join(lines) + "\n"
