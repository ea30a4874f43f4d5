"""GLM-Image: CogView4's blocks; text is what the prompt puts in quotation marks, the rest reaches the image otherwise.

The prompt goes through a language model, whose image tokens are added to the image stream; the text stream holds the
bytes of the quoted texts alone. Reference images are keys and values from forwards of their own, kept in a cache:

    o_p = softmax(q_p [k_r; k_p; k_x]^T / sqrt(d)) [v_r; v_p; v_x]

Concepts attend to the image that is made, not to the references r, which have no stream here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dit_probe.anatomy.base import Anatomy, TinyModel, TinyParts
from dit_probe.anatomy.block import Places
from dit_probe.anatomy.cogview4 import CogView4
from dit_probe.attention import AttentionCall
from dit_probe.errors import ConceptError

_LAYERS = 3


class GlmImage(CogView4):
    """`GlmImageTransformer2DModel`. A word as a concept is that word in quotation marks."""

    family = "glm-image"
    classes = ("GlmImageTransformer2DModel",)
    heads_first = False
    unlabelled_calls = ("cond", "uncond")
    variants = ("plain", "masked", "reference")
    pipeline_variants = ("plain",)
    # With the image's tokens given, the language model that would write them is not needed.
    tiny_call = {"height": 16, "width": 24, "prior_token_ids": torch.arange(24)[None], "max_sequence_length": 16}
    # Real images have no such tokens.
    prepare = Anatomy.prepare

    def entry(self, model: Any) -> nn.Module:
        return model.glyph_projector

    def aside(self, arguments: Mapping[str, Any]) -> bool:
        caches = arguments.get("kv_caches")
        return super().aside(arguments) or (caches is not None and caches[0].mode == "write")

    def places(self, model: Any, arguments: Mapping[str, Any]) -> Places:
        places = super().places(model, arguments)
        return dataclasses.replace(places, total=places.total + _references(arguments.get("kv_caches")))

    def joint_call(self, calls: Sequence[AttentionCall], arguments: Mapping[str, Any], where: str, tokens: int) -> Any:
        return super().joint_call([_references_last(call) for call in calls], arguments, where, tokens)

    def encode_text(self, pipe: Any, texts: Sequence[str], limit: int) -> Tensor:
        if any(any(found) for found in pipe.get_glyph_texts(list(texts))):
            raise ConceptError(
                "GLM-Image's text stream holds only what a prompt puts in quotation marks, so words are not found in "
                "it where the prompt has them. Use embed='mean_tokens' and words without quotation marks"
            )
        # One by one, or the pipeline would pad the shorter ones on the left.
        return pad_sequence([pipe._get_glyph_embeds(f'"{text}"', limit)[0] for text in texts], batch_first=True)

    def tokens(self, pipe: Any, prompt: str, length: int) -> tuple[list[str], list[bool]]:
        tokenizer, texts = pipe.tokenizer, pipe.get_glyph_texts(prompt)[0] or [""]
        # The pipeline puts a pad before each of an even number of texts, and attends to it as to any other token.
        before = [tokenizer.pad_token] * ((len(texts) + 1) % 2)
        encoded = [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(texts)["input_ids"]]
        strings = [string for text in encoded for string in [*before, *text]][:length]
        pads = length - len(strings)
        return [tokenizer.pad_token] * pads + strings, [True] * pads + [False] * len(strings)

    def tiny(self, variant: str, batch: int) -> TinyModel:
        tiny = super().tiny(variant, batch)
        ids = torch.randint(20, (batch, len(tiny.grid)))
        inputs = {**tiny.inputs, "prior_token_id": ids, "prior_token_drop": ids > 15}
        del inputs["original_size"]
        if variant == "reference":
            inputs["kv_caches"] = _cache(_LAYERS, batch)
        return TinyModel(tiny.transformer, inputs, tiny.grid, tiny.concepts)

    def with_prompt(self, inputs: Mapping[str, Any], embeddings: Tensor) -> dict[str, Any]:
        return {**super().with_prompt(inputs, embeddings), "kv_caches": None}

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler, GlmImagePipeline

        tokenizer, t5 = parts.t5()
        vae = parts.vae()
        vae.register_to_config(latents_mean=[0.1] * 4, latents_std=[1.1] * 4)
        return GlmImagePipeline(
            tokenizer=tokenizer,
            processor=None,
            text_encoder=t5,
            vision_language_encoder=None,
            vae=vae,
            transformer=self._transformer(text_width=parts.t5_width),
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )

    def _transformer(self, *, text_width: int) -> Any:
        from diffusers import GlmImageTransformer2DModel

        return GlmImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=_LAYERS,
            num_attention_heads=2,
            attention_head_dim=16,
            text_embed_dim=text_width,
            time_embed_dim=24,
            condition_dim=8,
            prior_vq_quantizer_codebook_size=32,
        )


def _references(caches: Any) -> int:
    """Keys that a cache puts before those of text and image."""
    if caches is None or caches[0].mode != "read" or not caches[0].k_caches:
        return 0
    return caches[0].k_caches[0].shape[1]


def _references_last(call: AttentionCall) -> AttentionCall:
    """The same call with text and image in front, as in every other tensor of the block.

    References have keys and values alone; queries and outputs are filled up to their number, never to be read.
    """
    references = call.k.shape[1] - call.q.shape[1]
    if not references:
        return call
    q, o = (F.pad(part, (0, 0, 0, 0, 0, references)) for part in (call.q, call.o))
    k, v = (part.roll(-references, dims=1) for part in (call.k, call.v))
    return dataclasses.replace(call, q=q, k=k, v=v, o=o, kernel=None)


def _cache(layers: int, rows: int) -> Any:
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    caches = GlmImageKVCache(layers)
    for layer in caches.caches:
        for _ in range(rows):
            # Joined to keys of any precision, integers leave them theirs.
            layer.store(*torch.randint(-2, 3, (2, 1, 4, 2, 16)))
            layer.next_sample()
    caches.set_mode("read")
    return caches
