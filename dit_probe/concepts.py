"""Words to concept embeddings, by the pipeline's own text encoders."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit_probe.anatomy import Anatomy
from dit_probe.errors import ConceptError, ConceptWarning

EMBEDS = ("first_token", "mean_tokens", "in_prompt")


def check_words(words: Sequence[str]) -> tuple[str, ...]:
    """The words as a tuple, refused when a map of them could not be told apart.

    Raises:
        ConceptError: not a list of words, or an empty or repeated one.

    Example:
        >>> check_words(["sun", "sky"])
        ('sun', 'sky')
    """
    if isinstance(words, str):
        raise ConceptError(f"concepts must be a list of words, found the string {words!r}; write [{words!r}]")
    words = tuple(words)
    wrong = [word for word in words if not isinstance(word, str) or not word.strip()]
    if wrong:
        raise ConceptError(f"every concept must be a word, found {wrong[0]!r} in {list(words)}")
    repeated = sorted({word for word in words if words.count(word) > 1})
    if repeated:
        raise ConceptError(f"concepts must differ, found {', '.join(map(repr, repeated))} more than once")
    return words


def pieces(anatomy: Anatomy, pipe: Any, word: str) -> list[str]:
    """The tokens that a word splits into, end marks left out."""
    tokenizer = getattr(pipe, anatomy.encoder[0])
    return tokenizer.convert_ids_to_tokens(tokenizer(word, add_special_tokens=False)["input_ids"])


def check_tokens(anatomy: Anatomy, pipe: Any, words: Sequence[str], embed: str, limit: int) -> None:
    """Warn or refuse, before anything is computed, where the encoder would not see a word as it is meant.

    Raises:
        ConceptError: no text encoder, a word longer than the encoder's input, or more concepts than text tokens.
    """
    tokenizer, encoder = anatomy.encoder
    if getattr(pipe, tokenizer, None) is None or getattr(pipe, encoder, None) is None:
        raise ConceptError(
            f"{type(pipe).__name__} was loaded without its text encoder ({tokenizer}, {encoder}), which concepts go "
            "through. Load it, or give embeddings: trace(..., concepts=tensor)"
        )
    if len(words) > limit:
        raise ConceptError(f"{len(words)} concepts, but the model was made for at most {limit} text tokens; use fewer")
    for word in words:
        tokens = pieces(anatomy, pipe, word)
        if len(tokens) >= limit:
            raise ConceptError(f"the concept {word[:40]!r}… has {len(tokens)} tokens; the text encoder takes {limit}")
        if len(tokens) > 1 and embed == "first_token":
            warnings.warn(
                f"the concept {word!r} splits into {len(tokens)} tokens ({' '.join(tokens)}) and only the first, "
                f"{tokens[0]!r}, is used; embed='mean_tokens' takes them all",
                ConceptWarning,
                stacklevel=5,  # the call of trace
            )


def check_embeddings(embeddings: Tensor, words: Sequence[str]) -> None:
    """Refuse concept embeddings that are given in place of words, where they do not fit the words.

    Raises:
        ConceptError: other dims, or another number.
    """
    if embeddings.ndim not in (2, 3):
        raise ConceptError(
            f"concepts must be (concept, width) or (sample, concept, width), found {tuple(embeddings.shape)}"
        )
    if len(words) != embeddings.shape[-2]:
        raise ConceptError(
            f"{embeddings.shape[-2]} concept embeddings for {len(words)} names ({', '.join(words)}); "
            "the probe's concepts name the embeddings in order"
        )


@torch.no_grad()
def embed_words(
    anatomy: Anatomy, pipe: Any, words: Sequence[str], prompts: Sequence[str | None], *, embed: str, limit: int
) -> Tensor:
    """Concept embeddings as the transformer's text input would be.

    Args:
        anatomy: the pipeline's family.
        pipe: the pipeline, whose text encoder encodes.
        words: the concepts.
        prompts: the prompts, one per row, None where not known as text; used by "in_prompt" only.
        embed: "first_token": every word encoded alone, padded as a prompt is, its first token (the paper);
            "mean_tokens": the mean over the word's tokens; "in_prompt": the mean over the word's tokens where it
            first stands in the prompt, in context.
        limit: length that texts are padded to, tokens.

    Returns:
        (row, concept, text width); one row for all prompts unless "in_prompt".

    Raises:
        ConceptError: "in_prompt" and a word does not stand in a prompt.
    """
    if embed == "in_prompt":
        known = [prompt for prompt in prompts if prompt is not None]
        if len(known) < len(prompts):
            raise ConceptError(
                "embed='in_prompt' finds words in the text that the encoder reads, but the call gives embeddings, or a "
                "text of its own for another encoder (prompt_2, prompt_3). Pass one prompt, or use embed='first_token'"
            )
        hidden = anatomy.encode_text(pipe, known, limit)
        spans = [[_find(anatomy, pipe, word, prompt, limit) for word in words] for prompt in known]
        return torch.stack(
            [torch.stack([row[span].mean(0) for span in found]) for row, found in zip(hidden, spans, strict=True)]
        )
    hidden = anatomy.encode_text(pipe, words, limit)
    if embed == "first_token":
        return hidden[None, :, 0]
    lengths = [len(pieces(anatomy, pipe, word)) for word in words]
    return torch.stack([row[:length].mean(0) for row, length in zip(hidden, lengths, strict=True)])[None]


def _find(anatomy: Anatomy, pipe: Any, word: str, prompt: str, limit: int) -> slice:
    tokens = pieces(anatomy, pipe, prompt)
    # Byte-level vocabularies spell a word in another way behind a space.
    spellings = [pieces(anatomy, pipe, word), pieces(anatomy, pipe, f" {word}")]
    for wanted in spellings:
        for start in range(min(len(tokens), limit) - len(wanted) + 1):
            if tokens[start : start + len(wanted)] == wanted:
                return slice(start, start + len(wanted))
    raise ConceptError(
        f"embed='in_prompt': {word!r} ({' '.join(spellings[0])}) does not stand in the prompt {prompt!r} "
        f"({' '.join(tokens)}). Use a word of the prompt, or embed='first_token'"
    )
