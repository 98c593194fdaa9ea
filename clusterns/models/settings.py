"""What a model folder says about the encoder in it: clusterns.json, else sentence-transformers' files.

Nobody can evaluate a saved model with the wrong pooling or template by leaving an argument out: what is not
given is read, and what contradicts it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .folder import read_json, read_max_length, read_modules, read_pooling, read_pooling_mode
from .pooling import POOLINGS, check_pooling
from .prompts import Prompt

SETTINGS_FILE = "clusterns.json"
SETTINGS_FORMAT = 1
# The tokenizer as it came, in a prompt model, whose tokenizer.json puts the template around each text.
TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class EncoderSettings:
    """Where the parts of an encoder are and how they are put together; None is the class's default."""

    root: Path  # of the transformer and the head
    tokenizer_folder: Path
    modules: dict[str, str]  # of sentence-transformers; empty where they are overridden
    pooling: str | None
    head: str | None
    prompt: Prompt | None
    max_length: int | None


def read_encoder_settings(
    folder: Path,
    *,
    pooling: str | None = None,
    head: str | None = None,
    prompt: Prompt | Sequence[str] | None = None,
) -> EncoderSettings:
    """The settings of a folder, with those given in place of its own.

    `prompt` "none" takes the folder's prompt off. Raises ValueError, in one line, for files that are broken
    or disagree, and for a pooling that does not fit the prompt.
    """
    settings, modules = read_settings(folder), read_modules(folder)
    stated_prompt = read_prompt(folder, settings)
    root = folder / modules.get("Transformer", "")
    if "PromptEncoder" in modules and not settings:
        raise ValueError(f"{folder / SETTINGS_FILE}: expected the settings of a prompt model, there are none")
    if prompt is None and stated_prompt is not None:
        try:
            check_pooling(pooling, None, has_prompt=True)
        except ValueError as error:
            raise ValueError(f"{error}; pass prompt='none' too to take it without its prompt") from None
    chosen = stated_prompt if prompt is None else None if prompt == "none" else prompt
    if chosen is not None and not isinstance(chosen, Prompt):
        chosen = Prompt(chosen)  # type: ignore[arg-type]
    overridden = pooling is not None or prompt is not None
    if not overridden:
        check_agreement(folder, modules, settings)
    if pooling is None and (chosen is None) == (stated_prompt is None):
        pooling = settings["pooling"] if settings else read_pooling(folder, modules)
    # The head belongs to the pooling it was recorded with.
    if head is None and settings and pooling == settings["pooling"]:
        head = settings.get("head")
    elif head is None and not overridden and "Dense" in modules:
        head = "always"
    # A prompt model's counts the tokens of the sentence alone.
    max_length = read_max_length(root) if stated_prompt is None else None
    if stated_prompt is not None and chosen is not None:
        max_length = settings.get("max_length")
    return EncoderSettings(
        root=root,
        tokenizer_folder=root if stated_prompt is None else folder / TOKENIZER_FOLDER,
        modules=modules if not overridden and not settings else {},
        pooling=pooling,
        head=head,
        prompt=chosen,
        max_length=max_length,
    )


def read_prompt(folder: Path, settings: Mapping[str, Any]) -> Prompt | None:
    """The prompt that clusterns.json records."""
    stated = settings.get("prompt")
    if stated is None:
        return None
    try:
        return Prompt(**stated)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / SETTINGS_FILE}: {error}") from error


def read_settings(folder: Path) -> dict[str, Any]:
    """What clusterns.json says, the prompt as it stands there; empty where there is none."""
    path = folder / SETTINGS_FILE
    settings = read_json(path)
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not isinstance(settings.get("pooling"), str):
        raise ValueError(f"{path}: expected the settings of an encoder, got other JSON")
    if settings.get("format") != SETTINGS_FORMAT:
        raise ValueError(
            f"{path}: expected format {SETTINGS_FORMAT}, got {settings.get('format')!r}; "
            "a newer clusterns may have written it"
        )
    known = {"format", "pooling", "head", "prompt", "max_length"}
    if set(settings) - known:
        raise ValueError(f"{path}: expected {', '.join(sorted(known))}, got {min(set(settings) - known)!r}")
    try:
        check_pooling(
            settings["pooling"], settings.get("head"), has_prompt=settings.get("prompt") is not None
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    length = settings.get("max_length")
    if length is not None and not isinstance(length, int):
        raise ValueError(f"{path}: expected a whole number as max_length, got {length!r}")
    return settings


def check_agreement(folder: Path, modules: Mapping[str, str], settings: Mapping[str, Any]) -> None:
    """Require that clusterns.json and sentence-transformers' files tell of one embedding."""
    if not modules or not settings:
        return
    expected = sentence_transformers_modules(
        settings["pooling"], settings.get("head"), settings.get("prompt")
    )
    found = set(modules) - {"Normalize", "Dropout"}
    # The one module that is every prompt model, see `sentence_transformers_modules.py`.
    if found == {"PromptEncoder"} and settings.get("prompt"):
        return
    if found != set(expected):
        raise ValueError(
            f"{folder / 'modules.json'}: expected {', '.join(expected)} to match {SETTINGS_FILE}, "
            f"got {', '.join(sorted(found))}; give a pooling to choose"
        )
    if "Pooling" in modules:
        stated, wanted = read_pooling_mode(folder, modules), POOLINGS[settings["pooling"]].saved_as
        if stated != wanted:
            raise ValueError(
                f"{folder / modules['Pooling'] / 'config.json'}: expected the pooling {wanted} to match "
                f"{SETTINGS_FILE}, got {stated}; give a pooling to choose"
            )


def sentence_transformers_modules(pooling: str, head: str | None, prompt: Any) -> list[str]:
    """Modules of sentence-transformers that make the embedding, in order."""
    if prompt is not None and prompt.get("evaluation_denoising"):
        return ["PromptEncoder"]
    modules = ["Transformer"]
    if POOLINGS[pooling].of_prompt:
        modules.append("WordWeights")
    if POOLINGS[pooling].layers:
        modules.append("WeightedLayerPooling")
    return [*modules, "Pooling", *(["Dense"] if head == "always" else [])]
