"""Prompts that a Qwen vision-language model reads inside a chat template, of which the pipeline drops the first tokens.

What it drops need not be all that stands before the prompt: JoyImage keeps two tokens, edit pipelines their images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dit_probe.anatomy.base import Anatomy

TINY_WIDTH = 32


class QwenVLPrompts(Anatomy):
    """Concepts and token strings of pipelines with such a text encoder."""

    def template(self, pipe: Any) -> tuple[str, int]:
        """The chat template, with ``{}`` for the prompt, and how many of its tokens the pipeline drops."""
        raise NotImplementedError

    def reads_images(self, pipe: Any) -> bool:
        """Whether images stand in the prompt stream, before the text."""
        raise NotImplementedError

    def hidden(self, pipe: Any, texts: list[str]) -> Tensor:
        """Hidden states of texts by the pipeline's own encoder, template dropped: (text, token, text width)."""
        return pipe._get_qwen_prompt_embeds(texts, device=pipe._execution_device)[0]

    def encode_text(self, pipe: Any, texts: Sequence[str], limit: int) -> Tensor:
        template, dropped = self.template(pipe)
        before = _tokens(pipe.tokenizer, template.split("{}")[0])
        return self.hidden(pipe, list(texts))[:, len(before) - dropped :][:, :limit]

    def tokens(self, pipe: Any, prompt: str, length: int) -> tuple[list[str], list[bool]]:
        template, dropped = self.template(pipe)
        strings = _tokens(pipe.tokenizer, template.format(prompt))[dropped:][:length]
        missing = length - len(strings)
        if missing and self.reads_images(pipe):
            # How many tokens an image takes is not known here. They come first, and the prompt ends the stream.
            strings = _tokens(pipe.tokenizer, prompt + template.split("{}")[1])
            return ["<image>"] * (length - len(strings)) + strings, [False] * length
        return strings + [""] * missing, [False] * len(strings) + [True] * missing


def tiny_text_encoder(version: str, words: Sequence[str]) -> tuple[Any, Any]:
    """A tokenizer of whole words and marks, and a small random Qwen-VL of version "2.5" or "3"."""
    import transformers
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    marks = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
    vocabulary = {word: number for number, word in enumerate([*marks, "\n", "system", "user", "assistant", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    # Lines, words and signs, as many tokens as Qwen makes of its templates.
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\s\w]+"), "removed", invert=True)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", additional_special_tokens=marks[2:]
    )
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TINY_WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TINY_WIDTH}
    if version == "3":
        vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
        config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
        return tokenizer, transformers.Qwen3VLForConditionalGeneration(config)
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return tokenizer, transformers.Qwen2_5_VLForConditionalGeneration(config)


def tiny_vae(kind: Any, **options: Any) -> Any:
    """A small random video VAE of factor 2 and 4 latent channels: `AutoencoderKLQwenImage` or `AutoencoderKLWan`."""
    return kind(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1] * 4,
        latents_std=[1.5] * 4,
        **options,
    )


def _tokens(tokenizer: Any, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
