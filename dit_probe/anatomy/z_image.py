"""Z-Image: single-stream blocks on (image, caption), each filled up to a multiple of 32 with learned pad tokens.

Concepts are an extension beyond the paper here. They do not see the pad tokens, which are neither image nor caption;
but each passes the context refiner with 31 of them, as a caption of one token does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dit_probe.anatomy.base import Anatomy, TinyModel, TinyParts
from dit_probe.anatomy.block import Block, Grid, Places, Rotary, TextContext
from dit_probe.anatomy.lumina2 import SandwichText, shared_start, turned_by
from dit_probe.errors import TraceError

_MULTIPLE = 32


class ZImageText(SandwichText):
    """The same with scale and gates made from the timestep by a layer of the block's own."""

    after_attention = "attention_norm2"

    def modulate(self, block: Any, c: Tensor, context: TextContext) -> tuple[Tensor, Sequence[Tensor]]:
        scale, *gates = block.adaLN_modulation(context.modulation).chunk(4, dim=-1)
        return block.attention_norm1(c) * (1 + scale.unsqueeze(1)), gates


class ZImage(Anatomy):
    """`ZImageTransformer2DModel`. Text stands at frames 1, 2 …, the image at the frame after the caption's last pad.

    Captions of one call may differ in length: the prompt is then as long as the longest, and what follows a shorter
    one within it is padding.
    """

    family = "z-image"
    classes = ("ZImageTransformer2DModel",)
    joint = "no joint blocks"
    single = "layers"
    attention = "attention"
    single_text = ZImageText()
    text_first = False
    halves = ("cond", "uncond")
    variants = ("padded", "masked")
    pipeline_variants = ("padded",)
    tiny_call = {"height": 16, "width": 24, "max_sequence_length": 32}

    def heads(self, model: Any) -> tuple[int, int]:
        return model.config.n_heads, model.config.dim // model.config.n_heads

    def unrotated(self, block: Block, arguments: Mapping[str, Any]) -> dict[str, nn.Module]:
        return {"q": block.attention.norm_q, "k": block.attention.norm_k}

    def rows(self, arguments: Mapping[str, Any]) -> int:
        return len(arguments["x"])

    def time(self, arguments: Mapping[str, Any]) -> float:
        return 1000.0 * (1 - float(arguments["t"].flatten()[0]))

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        shapes = {tuple(image.shape[1:]) for image in arguments["x"]}
        if len(shapes) > 1:
            raise TraceError(f"the images of one call have different sizes: {shapes}. Call the model on one size")
        ((frames, height, width),) = shapes
        patch, patch_t = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
        return Grid.regular(height // patch, width // patch, frames // patch_t)

    def prompt_embeddings(self, arguments: Mapping[str, Any]) -> Tensor:
        return pad_sequence(list(arguments["cap_feats"]), batch_first=True)

    def places(self, model: Any, arguments: Mapping[str, Any]) -> Places:
        if isinstance(arguments["x"][0], list):
            raise TraceError(
                "Z-Image was called with several images a row (Omni), clean and noisy ones between pad tokens and each "
                "with a modulation of its own; this order of tokens is not described. Call it with one image a row"
            )
        image, captions = len(self.grid(model, arguments)), [len(caption) for caption in arguments["cap_feats"]]
        start = _filled(image)
        return Places(slice(0, image), slice(start, start + max(captions)), start + _filled(max(captions)))

    def entry(self, model: Any) -> nn.Module:
        return model.cap_embedder

    def embed(self, model: Any, embeddings: Tensor, arguments: Mapping[str, Any], rows: slice) -> Tensor:
        if arguments.get("controlnet_block_samples") is not None:
            raise TraceError(
                "Z-Image's ControlNet adds to the caption tokens between blocks, and there is nothing that it would "
                "add to concepts. Trace without it"
            )
        alone = self.entry(model)(embeddings).flatten(0, 1).unsqueeze(1)
        pads = model.cap_pad_token.to(alone).expand(len(alone), _MULTIPLE - 1, -1)
        c = torch.cat([alone, pads], dim=1)
        ids = torch.zeros(_MULTIPLE, 3, dtype=torch.int32, device=c.device)
        ids[:, 0] = torch.arange(1, _MULTIPLE + 1)
        angles = model.rope_embedder(ids).expand(len(c), -1, -1)
        for layer in model.context_refiner:
            c = layer(c, None, angles)
        return c[:, 0].view(*embeddings.shape[:2], -1)

    def streams(self, block: Block, arguments: Mapping[str, Any], places: Places) -> tuple[Tensor, Tensor]:
        return places.split(arguments["x"])

    def modulation(self, block: Block, arguments: Mapping[str, Any]) -> Tensor:
        return arguments["adaln_input"]

    def text_rotary(self, block: Block, arguments: Mapping[str, Any], places: Places, at: slice) -> Rotary:
        angles = arguments["freqs_cis"][:, places.in_joint(at)]
        # Behind the end of a row there are no positions; the first one is the same in all rows.
        return turned_by(angles[:1] if at.stop == 1 else angles)

    def encode_text(self, pipe: Any, texts: Sequence[str], limit: int) -> Tensor:
        start = shared_start(pipe.tokenizer, lambda text: _templated(pipe, text))
        hidden = pipe.encode_prompt(list(texts), None, False, max_sequence_length=start + limit)[0]
        return pad_sequence([row[start:] for row in hidden], batch_first=True)

    def tokens(self, pipe: Any, prompt: str, length: int) -> tuple[list[str], list[bool]]:
        return super().tokens(pipe, _templated(pipe, prompt), length)

    def tiny(self, variant: str, batch: int) -> TinyModel:
        height, width = 6, 8
        # Tuples, where pipelines give lists. A longer caption in the second row makes a mask and moves its image.
        captions = [40 if variant == "masked" and row == 1 else 5 for row in range(batch)]
        inputs = {
            "x": tuple(torch.randn(batch, 4, 1, height, width)),
            "t": torch.full((batch,), 0.3),
            "cap_feats": tuple(torch.randn(tokens, 24) for tokens in captions),
        }
        grid = Grid.regular(height // 2, width // 2)
        return TinyModel(_transformer(text_width=24), inputs, grid, concepts=torch.randn(3, 24))

    def with_prompt(self, inputs: Mapping[str, Any], embeddings: Tensor) -> dict[str, Any]:
        # A prompt that is one concept over and over is a prompt of that concept, with the pads that belong to it.
        alone = bool((embeddings == embeddings[:, :1]).all())
        return {**inputs, "cap_feats": tuple(embeddings[:, :1] if alone else embeddings)}

    def with_streams(
        self, block: Block, arguments: Mapping[str, Any], x: Tensor, p: Tensor, places: Places
    ) -> dict[str, Any]:
        joint, angles = arguments["x"].clone(), arguments["freqs_cis"].clone()
        joint[:, places.image], joint[:, places.prompt] = x, p
        angles[:, places.prompt.start :] = angles[:, places.prompt.start, None]
        seen = torch.zeros(joint.shape[:2], dtype=torch.bool, device=joint.device)
        seen[:, places.image] = seen[:, places.prompt] = True
        return {**arguments, "x": joint, "freqs_cis": angles, "attn_mask": seen}

    def clamp(self, block: Block, arguments: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
        # The image's positions begin where the caption ends. All text now stands at one position, no image token does.
        now, then = arguments["freqs_cis"], before["freqs_cis"]
        image = int((now != now[:, -1:]).any(-1)[0].sum())
        return {**arguments, "freqs_cis": torch.cat([then[:, :image], now[:, image:]], dim=1)}

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

        tokenizer, t5 = parts.t5()
        tokenizer.chat_template = "{% for message in messages %}picture of {{ message['content'] }} drawing{% endfor %}"
        return ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=parts.vae(),
            text_encoder=t5,  # any encoder will do, and this one's words are one token each
            tokenizer=tokenizer,
            transformer=_transformer(text_width=parts.t5_width),
        )


def _filled(tokens: int) -> int:
    return -(-tokens // _MULTIPLE) * _MULTIPLE


def _templated(pipe: Any, text: str) -> str:
    message = [{"role": "user", "content": text}]
    return pipe.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=True)


def _transformer(*, text_width: int) -> Any:
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=text_width,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 64, 64],
    )
