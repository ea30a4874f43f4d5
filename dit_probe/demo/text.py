"""Tokenizers and text encoders of the demo models, built from a word list, without a download.

Every word of `WORDS` is one T5 token, so that a concept's first token is the whole concept. Only the words of the
scenes' captions are ever trained; the rest are there so that a stranger's prompt doesn't fall apart into letters.
"""

import string
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from dit_probe.datasets.clips import CLIP_WORDS
from dit_probe.datasets.scenes import BACKGROUNDS, NOUNS, RELATIONS

GLUE: tuple[str, ...] = ("a", "and", "on", "in", "the", "at", *dict.fromkeys(" ".join(RELATIONS).split()))
"""Words that captions are held together with."""

TRAINED: tuple[str, ...] = tuple(dict.fromkeys((*NOUNS, *BACKGROUNDS, *GLUE)))
"""Every word that occurs in a caption of a scene."""

_FURTHER = (
    "an is are with of to under over near behind beside between picture photo drawing scene background red orange "
    "yellow green blue purple pink white black brown grey big small one two three four cat dog bird horse moon star "
    "cloud rain snow road hill river field wall door window roof wheel sail apple table chair"
)
UNTRAINED: tuple[str, ...] = tuple(word for word in _FURTHER.split() if word not in TRAINED)
"""Words with a token of their own that no caption uses: their embeddings are random."""

WORDS: tuple[str, ...] = (*TRAINED, *UNTRAINED)

VIDEO_WORDS: tuple[str, ...] = tuple(dict.fromkeys((*WORDS, *CLIP_WORDS)))
"""Words of the video model."""

T5_LENGTH, CLIP_LENGTH = 512, 77
T5_WIDTH, CLIP_WIDTH = 64, 32
_MARK_LENGTH = 30.0  # pads and end marks, in lengths of a word


def t5_tokenizer(words: Sequence[str] = WORDS) -> T5TokenizerFast:
    """Build the tokenizer of the prompt stream: one piece a word, letters for what it doesn't know.

    Args:
        words: Those that are one piece.

    Example:
        >>> t5_tokenizer().tokenize("a sun left of a boat, water")
        ['▁a', '▁sun', '▁left', '▁of', '▁a', '▁boat', ',', '▁water']
    """
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [(f"▁{word}", -1.0) for word in words]
    letters = string.ascii_lowercase + string.ascii_uppercase + string.digits + ",.;:!?'-"
    pieces += [(letter, -1.0 if letter in ",." else -8.0) for letter in letters]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=T5_LENGTH)


def clip_tokenizer(length: int = CLIP_LENGTH) -> CLIPTokenizer:
    """Build CLIP's tokenizer: byte pairs merged until every word is one token.

    Args:
        length: Tokens that pipelines pad to and cut at.

    Example:
        >>> clip_tokenizer().tokenize("a sun on water")
        ['a</w>', 'sun</w>', 'on</w>', 'water</w>']
    """
    characters = [*string.ascii_lowercase, *string.digits, *",.;:!?'-"]
    merges = _merges(WORDS)
    pieces = ["<|startoftext|>", "<|endoftext|>", *characters, *(f"{character}</w>" for character in characters)]
    # two ways of merging may give one piece, which has one number
    vocabulary = dict.fromkeys([*pieces, *("".join(pair) for pair in merges)])
    numbered = {piece: number for number, piece in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=numbered, merges=merges, model_max_length=length)


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte pairs in the order in which they merge, until every word is one piece.

    The trainer of the tokenizers library breaks ties as its hash tables happen to lie, which gives another vocabulary
    in every process; here the alphabet breaks them.

    Example:
        >>> _merges(["on", "an"])
        [('a', 'n</w>'), ('o', 'n</w>')]
    """
    split = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for parts in split for pair in pairwise(parts)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = [_merged(parts, best) for parts in split]
    return merges


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Join every occurrence of a pair, from the left."""
    joined: list[str] = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def t5_encoder(vocabulary: int) -> T5EncoderModel:
    """Build the untrained prompt encoder: 1 layer, width 64, no dropout.

    The stock pipelines mask no padding, and pads that hear the words become summaries of the caption, which the image
    then reads in place of the nouns. So the embeddings of the pad and of the end marker are long and stay as they
    are: what attention adds to them is lost in the final norm.
    """
    config = T5Config(
        vocab_size=vocabulary,
        d_model=T5_WIDTH,
        d_kv=16,
        d_ff=128,
        num_layers=1,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="relu",
        pad_token_id=0,
        eos_token_id=1,
        use_cache=False,
        is_encoder_decoder=False,
    )
    encoder = T5EncoderModel(config)
    marks = torch.tensor([0, 1])
    with torch.no_grad():
        encoder.shared.weight[marks] *= _MARK_LENGTH
    encoder.shared.weight.register_hook(lambda gradient: gradient.index_fill(0, marks.to(gradient.device), 0.0))
    return encoder


def clip_encoder(tokenizer: CLIPTokenizer, projection: bool = False) -> Any:
    """Build the untrained encoder of the pooled vector: 1 layer, width 32.

    Args:
        tokenizer: Its tokenizer.
        projection: Project the pooled vector, as SD3's CLIPs do.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CLIP_WIDTH,
        intermediate_size=2 * CLIP_WIDTH,
        projection_dim=CLIP_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def token_ids(tokenizer: T5TokenizerFast | CLIPTokenizer, captions: list[str], length: int) -> torch.Tensor:
    """Tokenise captions padded to one length.

    Args:
        tokenizer: One of the two above.
        captions: What to tokenise.
        length: Tokens a row, end marker and pads included.

    Returns:
        (caption, token) int64.
    """
    return tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
