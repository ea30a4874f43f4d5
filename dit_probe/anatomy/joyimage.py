"""JoyImage-Edit and JoyImage-Edit-Plus: joint blocks only, fused qkv always, image before text in the attention call.

Text has positions with ``rope_type="mrope"`` alone; the pipelines hand on no mask for them, padding attends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_probe.anatomy.base import Anatomy, EncodeInputs, TinyModel, TinyParts, draw_noise
from dit_probe.anatomy.block import Block, Grid, Places, Rotary, TextContext, interleaved
from dit_probe.anatomy.qwen_vl import TINY_WIDTH, QwenVLPrompts, tiny_text_encoder, tiny_vae
from dit_probe.anatomy.shift_scale_gate import ShiftScaleGateText
from dit_probe.errors import ModelError

_TURN = "<|im_start|>user\n{}<|im_end|>\n"


class JoyImageText(ShiftScaleGateText):
    """``txt_*`` of block and attention; the six vectors are a table of the block plus those of the whole model."""

    def vectors(self, c: Tensor, context: TextContext) -> Sequence[Tensor]:
        return context.block.module.txt_mod(context.modulation)

    def projected(self, attention: Any, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = attention.txt_attn_qkv(normed).unflatten(-1, (3, attention.heads, -1)).unbind(-3)
        return attention.txt_attn_q_norm(q), attention.txt_attn_k_norm(k), v


class JoyImage(QwenVLPrompts):
    """`JoyImageEditTransformer3DModel`: of several images the last is being made, and stands first among the tokens."""

    family = "joyimage"
    classes = ("JoyImageEditTransformer3DModel",)
    joint = "double_blocks"
    text = JoyImageText("txt_norm1", "txt_norm2", "txt_mlp", "txt_attn_proj")
    text_first = False
    returns_text_first = False
    unlabelled_calls = ("cond", "uncond")
    variants = ("plain", "edit", "mrope")
    pipeline_variants = ("plain",)
    tiny_call = {"height": 16, "width": 24, "max_sequence_length": 32}
    guided_call = {"negative_prompt": "a boat on the water"}

    def heads(self, model: Any) -> tuple[int, int]:
        heads = model.config.num_attention_heads
        return heads, model.config.hidden_size // heads

    def text_rotary(self, block: Block, arguments: Mapping[str, Any], places: Places, at: slice) -> Rotary | None:
        table = arguments["image_rotary_emb"][1]
        return None if table is None else interleaved(table, at)

    def unrotated(self, block: Block, arguments: Mapping[str, Any]) -> dict[str, nn.Module]:
        attention = block.attention
        return {
            "q_x": attention.img_attn_q_norm,
            "k_x": attention.img_attn_k_norm,
            "q_p": attention.txt_attn_q_norm,
            "k_p": attention.txt_attn_k_norm,
        }

    def entry(self, model: Any) -> nn.Module:
        return model.condition_embedder.text_embedder

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        latents = arguments["hidden_states"]
        images = latents.shape[1] if latents.ndim == 6 else 1
        frames, height, width = (
            size // patch for size, patch in zip(latents.shape[-3:], model.config.patch_size, strict=True)
        )
        return Grid.regular(height, width, images * frames)

    def planned_grid(self, pipe: Any, height: int, width: int, frames: int) -> Grid:
        # The pipeline goes to the nearest of its own sizes.
        return self._planned(pipe, *pipe.vae_image_processor.get_default_height_width(None, height, width))

    def _planned(self, pipe: Any, height: int, width: int) -> Grid:
        _, *patch = pipe.transformer.config.patch_size
        tokens = [pipe.vae_scale_factor_spatial * size for size in patch]
        return Grid.regular(height // tokens[0], width // tokens[1])

    def template(self, pipe: Any) -> tuple[str, int]:
        return pipe.prompt_template_encode["image"], pipe.prompt_template_encode_start_idx["image"]

    def reads_images(self, pipe: Any) -> bool:
        # Unless the prompt is all that the stream holds, which `tokens` sees.
        return True

    def prepare(self, pipe: Any, pixels: Sequence[Any], prompts: Sequence[str], seed: int, **text: Any) -> EncodeInputs:
        device, dtype = pipe._execution_device, pipe.transformer.dtype
        pictures, processor = [frames[0] for frames in pixels], pipe.vae_image_processor
        width, height = pictures[0].size
        size = processor.get_default_height_width(None, height, width)
        pictures = processor.resize_center_crop(pictures, size)
        images = pipe.image_processor.preprocess(pictures).to(device, pipe.vae.dtype)
        latents = pipe.normalize_latents(pipe.vae.encode(images.unsqueeze(2)).latent_dist.mode()).to(dtype)
        embeds, _ = pipe.encode_prompt(list(prompts), device=device, **text)
        return EncodeInputs(latents, draw_noise(latents, seed), {"encoder_hidden_states": embeds})

    def tiny(self, variant: str, batch: int) -> TinyModel:
        model = self._transformer("mrope" if variant == "mrope" else "rope", text_width=24)
        images = (2,) if variant == "edit" else ()
        inputs = {
            "hidden_states": torch.randn(batch, *images, 4, 1, 6, 8),
            "timestep": torch.full((batch,), 700.0),
            "encoder_hidden_states": torch.randn(batch, 5, 24),
        }
        return TinyModel(model, inputs, self.grid(model, inputs), concepts=torch.randn(3, 24))

    def clamp(self, block: Block, arguments: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
        image, text = arguments["image_rotary_emb"]
        if text is None:
            return dict(arguments)
        # The model counts text positions itself.
        one = tuple(part[:1].expand(len(part), -1) for part in text)
        return {**arguments, "image_rotary_emb": (image, one)}

    def _transformer(self, rope_type: str, *, text_width: int) -> Any:
        import diffusers

        return getattr(diffusers, self.classes[0])(
            patch_size=[1, 2, 2],
            in_channels=4,
            hidden_size=32,
            num_attention_heads=2,
            text_dim=text_width,
            num_layers=3,
            rope_dim_list=[4, 6, 6],
            rope_type=rope_type,
        )

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, JoyImageEditPipeline

        tokenizer, encoder = tiny_text_encoder("3", parts.words)
        pipe = JoyImageEditPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=tiny_vae(AutoencoderKLWan, scale_factor_spatial=2),
            text_encoder=encoder,
            tokenizer=tokenizer,
            transformer=self._transformer("rope", text_width=TINY_WIDTH),
            processor=None,
        )
        # The sizes that it would go to are all of a million pixels.
        pipe.vae_image_processor.get_default_height_width = lambda image, height, width: (height, width)
        return pipe


class JoyImagePlus(JoyImage):
    """`JoyImageEditPlusTransformer3DModel`: patches of any number of images of any size, the one being made first."""

    family = "joyimageplus"
    classes = ("JoyImageEditPlusTransformer3DModel",)
    unlabelled_calls = ("cond",)
    variants = ("references", "masked")
    pipeline_variants = ("references",)
    prepare = Anatomy.prepare

    def text_rotary(self, block: Block, arguments: Mapping[str, Any], places: Places, at: slice) -> None:
        return None

    def template(self, pipe: Any) -> tuple[str, int]:
        template = pipe.prompt_template_encode["multiple_images"].format(_TURN)
        return template, pipe.prompt_template_encode_start_idx["multiple_images"]

    def hidden(self, pipe: Any, texts: list[str]) -> Tensor:
        # One at a time: the pipeline drops the template's tokens from the front, whichever side pads are on.
        rows = [
            pipe.encode_prompt_multiple_images(_TURN.format(text), device=pipe._execution_device)[0][0]
            for text in texts
        ]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def planned_grid(self, pipe: Any, height: int, width: int, frames: int) -> Grid:
        return self._planned(pipe, height, width)

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        shapes, tokens = arguments["shape_list"], arguments["hidden_states"].shape[1]
        where, start = [], 0
        for frames, height, width in shapes[0]:
            where += [(start + f, y, x) for f in range(frames) for y in range(height) for x in range(width)]
            start += frames
        if len(where) != tokens or any(list(row) != list(shapes[0]) for row in shapes):
            raise ModelError(
                f"the rows of this call hold images of different sizes ({shapes}), so that one image token stands in "
                "different places. Trace one prompt at a time"
            )
        return Grid(*(tuple(axis) for axis in zip(*where, strict=True)))

    def tiny(self, variant: str, batch: int) -> TinyModel:
        model = self._transformer("rope", text_width=24)
        inputs: dict[str, Any] = {
            "hidden_states": torch.randn(batch, 18, 4, 1, 2, 2),
            "timestep": torch.full((batch,), 700.0),
            "encoder_hidden_states": torch.randn(batch, 5, 24),
            "shape_list": [[(1, 3, 4), (1, 2, 3)]] * batch,
        }
        if variant == "masked":
            inputs["encoder_hidden_states_mask"] = (torch.arange(5) < torch.tensor([[3], [5]])[:batch]).long()
        return TinyModel(model, inputs, self.grid(model, inputs), concepts=torch.randn(3, 24))

    def with_prompt(self, inputs: Mapping[str, Any], embeddings: Tensor) -> dict[str, Any]:
        return {**inputs, "encoder_hidden_states": embeddings, "encoder_hidden_states_mask": None}

    def clamp(self, block: Block, arguments: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
        return dict(arguments)

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, JoyImageEditPlusPipeline

        tokenizer, encoder = tiny_text_encoder("3", parts.words)
        return JoyImageEditPlusPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=tiny_vae(AutoencoderKLWan, scale_factor_spatial=2),
            text_encoder=encoder,
            tokenizer=tokenizer,
            transformer=self._transformer("rope", text_width=TINY_WIDTH),
            processor=_TextProcessor(tokenizer),
        )


class _TextProcessor:
    """What a Qwen3-VL processor does without images; the real one needs torchvision."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: list[str], images: None, **options: Any) -> Any:
        return self._tokenizer(text, **options)
