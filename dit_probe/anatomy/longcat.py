"""LongCat-Image and its editing model: Flux's blocks, prompt tokens at positions (0, i, i), image tokens after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dit_probe.anatomy.base import Anatomy, EncodeInputs, TinyModel, TinyParts
from dit_probe.anatomy.block import Grid
from dit_probe.anatomy.unpooled import UnpooledFlux, word_tokenizer
from dit_probe.errors import ConceptError


class LongCat(UnpooledFlux):
    """`LongCatImageTransformer2DModel`. Frame 0 is the image; the one that an edit starts from is frame 1.

    The pipeline has its language model rewrite the prompt unless told ``enable_prompt_rewrite=False``; the tokens of
    the rewritten prompt are not known here, so switch it off where tokens have to carry their names.
    """

    family = "longcat"
    classes = ("LongCatImageTransformer2DModel",)
    variants = ("image", "edit")
    pipeline_variants = ("image",)
    tiny_call = {"height": 16, "width": 24, "enable_prompt_rewrite": False}

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        # (1, y + start, x + start); a reference image is at (2, y + start, x + start).
        axes = arguments["img_ids"].round().long()
        return Grid(*(tuple(axis) for axis in (axes - axes.amin(0)).T.tolist()))

    def text_limit(self, pipe: Any) -> int:
        return pipe.tokenizer_max_length

    def encode_text(self, pipe: Any, texts: Sequence[str], limit: int) -> Tensor:
        if _reads_images(pipe):
            raise ConceptError(
                f"{type(pipe).__name__} reads every text together with an image, so that no word stands alone. Give "
                "embeddings: trace(..., concepts=tensor of (concept, text width))"
            )
        return pipe._encode_prompt(list(texts))

    def tokens(self, pipe: Any, prompt: str, length: int) -> tuple[list[str], list[bool]]:
        from diffusers.pipelines.longcat_image.pipeline_longcat_image import split_quotation

        # Quoted text is to be drawn: it goes to the tokenizer letter by letter.
        parts = [part for text, quoted in split_quotation(prompt) for part in (text if quoted else [text])]
        ids = [number for part in parts for number in pipe.tokenizer(part, add_special_tokens=False)["input_ids"]]
        limit = pipe.tokenizer_max_length
        strings = pipe.tokenizer.convert_ids_to_tokens(ids[:limit])
        pads = limit - len(strings)
        # What an edit shows the language model comes first.
        shown = [getattr(pipe, "image_token", "")] * (length - limit)
        names = [*shown, *strings, *[pipe.tokenizer.pad_token] * pads]
        return names, [False] * (length - pads) + [True] * pads

    def prepare(self, pipe: Any, pixels: Sequence[Any], prompts: Sequence[str], seed: int, **text: Any) -> EncodeInputs:
        # An edit's transformer call reads two images, one of them in the prompt too: the inherited refusal.
        prepare = Anatomy.prepare if _reads_images(pipe) else UnpooledFlux.prepare
        return prepare(self, pipe, pixels, prompts, seed, **text)

    def text_inputs(self, pipe: Any, prompts: list[str], latents: Tensor, **text: Any) -> dict[str, Any]:
        embeddings, text_ids = pipe.encode_prompt(prompts, **text)
        return {"encoder_hidden_states": embeddings, "txt_ids": text_ids}

    def positions(self, pipe: Any, latents: Tensor) -> Tensor:
        rows, channels, height, width = latents.shape
        # It takes pixels, and given latents returns them as they are.
        pixels = height * pipe.vae_scale_factor, width * pipe.vae_scale_factor
        return pipe.prepare_latents(rows, channels, *pixels, latents.dtype, latents.device, None, latents)[1]

    def tiny(self, variant: str, batch: int) -> TinyModel:
        tiny = super().tiny(variant, batch)
        ids = tiny.inputs["img_ids"] + torch.tensor([1.0, 7.0, 7.0])
        inputs, grid = {**tiny.inputs, "img_ids": ids}, tiny.grid
        if variant == "edit":
            inputs["hidden_states"] = torch.randn(batch, 2 * len(grid), 16)
            inputs["img_ids"] = torch.cat([ids, ids + torch.tensor([1.0, 0.0, 0.0])])
            grid = Grid.regular(3, 4, frames=2)
        return TinyModel(tiny.transformer, inputs, grid, tiny.concepts)

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, LongCatImagePipeline
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        tokenizer = word_tokenizer(parts)
        width = 32
        text = {
            "vocab_size": len(tokenizer),
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "hidden_size": width,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        }
        vision = {"depth": 1, "hidden_size": width, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": width}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        pipe = LongCatImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            # The pipeline makes latents of 16 channels, whatever the VAE's.
            vae=AutoencoderKL.from_config({**parts.vae().config, "latent_channels": 16}),
            text_encoder=Qwen2_5_VLForConditionalGeneration(config),
            tokenizer=tokenizer,
            text_processor=None,
            transformer=self.tiny_transformer(variant, text_width=width, in_channels=64),
        )
        pipe.tokenizer_max_length = 16
        pipe.prompt_template_encode_prefix, pipe.prompt_template_encode_suffix = "a picture of", "in the scene"
        return pipe


def _reads_images(pipe: Any) -> bool:
    """Whether images stand in the prompt stream, before the text: in the editing pipeline."""
    return hasattr(pipe, "image_token")
