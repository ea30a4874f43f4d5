"""HunyuanVideo: image before text, text never rotated, padding masked as keys; and what its relatives share with it.

Before the first block a refiner lets the text tokens attend to each other, modulated by the timestep and the mean of
the text. A concept goes through it alone, as a prompt of one token.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_probe.anatomy.ada_zero import AdaZeroText, ParallelText, qk_norms
from dit_probe.anatomy.base import Anatomy, EncodeInputs, TinyModel, TinyParts, draw_noise
from dit_probe.anatomy.block import Block, Grid, TextContext
from dit_probe.errors import ConceptError


class ReplacingText(ParallelText):
    """Single blocks; those for image-to-video modulate the first frame's tokens in another way than the rest."""

    def normed(self, c: Tensor, context: TextContext) -> tuple[Tensor, Sequence[Tensor]]:
        norm, temb = context.block.module.norm, context.modulation
        if "TokenReplace" in type(norm).__name__:
            n, gate, _ = norm(c, temb, temb, 0)  # none of these tokens is of the first frame
        else:
            n, gate = norm(c, emb=temb)
        return n, [gate]


class RefinedText(Anatomy):
    """Joint and single blocks of the Hunyuan models behind their token refiner. No family by itself."""

    text = AdaZeroText()
    single_text = ReplacingText()
    text_first = False
    returns_text_first = False

    def unrotated(self, block: Block, arguments: Mapping[str, Any]) -> dict[str, nn.Module]:
        return qk_norms(block)

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        sizes, patch = arguments["hidden_states"].shape[2:], model.config.patch_size
        if isinstance(patch, int):
            patch = (model.config.patch_size_t, patch, patch)
        *frames, height, width = (size // step for size, step in zip(sizes, patch, strict=True))
        return Grid.regular(height, width, *frames)

    def planned_grid(self, pipe: Any, height: int, width: int, frames: int) -> Grid:
        config = pipe.transformer.config
        token = pipe.vae_scale_factor_spatial * config.patch_size
        latent_frames = (frames - 1) // pipe.vae_scale_factor_temporal + 1
        return Grid.regular(height // token, width // token, latent_frames // config.patch_size_t)

    def entry(self, model: Any) -> nn.Module:
        return model.context_embedder

    def embed(self, model: Any, embeddings: Tensor, arguments: Mapping[str, Any], rows: slice) -> Tensor:
        count = embeddings.shape[1]
        alone, times = embeddings.flatten(0, 1).unsqueeze(1), arguments["timestep"][rows].repeat_interleave(count)
        return self.entry(model)(alone, times).view(*embeddings.shape[:2], -1)

    def with_prompt(self, inputs: Mapping[str, Any], embeddings: Tensor) -> dict[str, Any]:
        mask = inputs["encoder_attention_mask"].new_ones(embeddings.shape[:2])
        return {**inputs, "encoder_hidden_states": embeddings, "encoder_attention_mask": mask}


class HunyuanVideo(RefinedText):
    """`HunyuanVideoTransformer3DModel`, text to video and image to video (concatenated or replaced first frame)."""

    family = "hunyuan-video"
    classes = ("HunyuanVideoTransformer3DModel",)
    pooled = True
    pooled_argument = 1
    # Image to video, SkyReels and FramePack do not name their two calls.
    unlabelled_calls = ("cond", "uncond")
    variants = ("padded", "token-replace", "unguided")
    pipeline_variants = ("padded",)
    tiny_call = {"height": 32, "width": 48, "num_frames": 5, "max_sequence_length": 16}
    guided_call = {"negative_prompt": "a boat", "true_cfg_scale": 2.0}

    def conditioner(self, model: Any) -> nn.Module:
        return model.time_text_embed

    def encode_text(self, pipe: Any, texts: Sequence[str], limit: int) -> Tensor:
        if _reads_images(pipe):
            raise ConceptError(
                f"{type(pipe).__name__} encodes every text together with its image, so no word has an embedding of its "
                "own there. Give embeddings: trace(..., concepts=tensor)"
            )
        return pipe._get_llama_prompt_embeds(
            list(texts), _template(), device=pipe._execution_device, max_sequence_length=limit
        )[0]

    def pooled_vectors(self, pipe: Any, words: Sequence[str]) -> Tensor:
        return pipe._get_clip_prompt_embeds(list(words), device=pipe._execution_device)

    def tokens(self, pipe: Any, prompt: str, length: int) -> tuple[list[str], list[bool]]:
        if _reads_images(pipe):
            # The image's tokens come first, and what is cut out of the template hangs on the prompt's length.
            return [""] * length, [False] * length
        template, start = _template()["template"], _template()["crop_start"]
        encoded = pipe.tokenizer(
            template.format(prompt), padding="max_length", max_length=start + length, truncation=True
        )
        strings = pipe.tokenizer.convert_ids_to_tokens(encoded["input_ids"])[start:]
        return strings, [not mask for mask in encoded["attention_mask"][start:]]

    def prepare(self, pipe: Any, pixels: Sequence[Any], prompts: Sequence[str], seed: int, **text: Any) -> EncodeInputs:
        device, config, vae = pipe._execution_device, pipe.transformer.config, pipe.vae
        if config.image_condition_type is not None or config.in_channels != vae.config.latent_channels:
            return super().prepare(pipe, pixels, prompts, seed, **text)  # which says that it cannot: image to video
        video = torch.cat([pipe.video_processor.preprocess_video(list(frames)) for frames in pixels])
        latents = vae.encode(video.to(device, vae.dtype)).latent_dist.mode() * vae.config.scaling_factor
        latents = latents.to(pipe.transformer.dtype)
        made = [part.to(latents) for part in pipe.encode_prompt(list(prompts), device=device, **text)]
        call: dict[str, Any] = dict(zip(("encoder_hidden_states", "pooled_projections"), made, strict=False))
        # The guidance scale that the pipeline has unless told otherwise.
        call |= {"encoder_attention_mask": made[2], "guidance": latents.new_full((len(latents),), 6000.0)}
        return EncodeInputs(latents, draw_noise(latents, seed), call)

    def tiny(self, variant: str, batch: int) -> TinyModel:
        model = _transformer(variant, text_width=24, pooled_width=12)
        inputs = {
            "hidden_states": torch.randn(batch, 4, 2, 4, 6),
            "encoder_hidden_states": torch.randn(batch, 5, 24),
            "encoder_attention_mask": padded(batch, 5),
            "pooled_projections": torch.randn(batch, 12),
            "timestep": torch.full((batch,), 700.0),
        }
        if variant != "unguided":
            inputs["guidance"] = torch.full((batch,), 6000.0)
        return TinyModel(model, inputs, Grid.regular(2, 3, 2), torch.randn(3, 24))

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline

        tokenizer, llama = _llama(parts.words)
        clip_tokenizer, clip = parts.clip()
        vae = AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        )
        return HunyuanVideoPipeline(
            text_encoder=llama,
            tokenizer=tokenizer,
            transformer=_transformer(variant, text_width=llama.config.hidden_size, pooled_width=parts.clip_width),
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=clip,
            tokenizer_2=clip_tokenizer,
        )


def padded(batch: int, tokens: int) -> Tensor:
    """A mask under which the last tokens of every row are padding, more in the first row than in the second."""
    kept = torch.tensor([tokens - 2, tokens - 1])[:batch, None]
    return (torch.arange(tokens)[None] < kept).long()


def _transformer(variant: str, *, text_width: int, pooled_width: int) -> Any:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        text_embed_dim=text_width,
        pooled_projection_dim=pooled_width,
        rope_axes_dim=(4, 6, 6),
        guidance_embeds=variant != "unguided",
        image_condition_type="token_replace" if variant == "token-replace" else None,
    )


def _llama(words: Sequence[str]) -> tuple[Any, Any]:
    """A tokenizer of whole words, and a small random Llama that reads the template as so many tokens as it drops."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    before, after = _template()["template"].split("{}")
    pieces = ["<pad>", "<unk>", "<template>", "<end>", *words]
    core = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(pieces)}, unk_token="<unk>"))
    marks = normalizers.Replace(before, "<template> " * _template()["crop_start"]), normalizers.Replace(after, " <end>")
    core.normalizer, core.pre_tokenizer = normalizers.Sequence(list(marks)), pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=len(pieces),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return tokenizer, LlamaModel(config)


def _reads_images(pipe: Any) -> bool:
    return "image" in inspect.signature(pipe._get_llama_prompt_embeds).parameters


def _template() -> dict[str, Any]:
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    return DEFAULT_PROMPT_TEMPLATE
