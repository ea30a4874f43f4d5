"""Small random Stable Diffusion pipelines of the true classes, made offline."""

from __future__ import annotations

from typing import Any

import torch

import dit_probe as dp


@torch.random.fork_rng()
def tiny_pipeline(kind: str = "sd", length: int = 77) -> Any:
    """A small random pipeline of the true classes, made offline, for tests and examples.

    Its tokenizer has the words of the demo models, each one token; others fall apart into letters.

    Args:
        kind: "sd" or "sdxl".
        length: tokens that prompts are padded to and cut at.

    Example:
        >>> pipe = tiny_pipeline("sd")
        >>> type(pipe).__name__, pipe.tokenizer.tokenize("a sun, zoo")
        ('StableDiffusionPipeline', ['a</w>', 'sun</w>', ',</w>', 'z', 'o', 'o</w>'])
    """
    import diffusers
    import transformers

    torch.manual_seed(0)
    parts = dp.testing.tiny_pipeline("sd3")
    tokenizer, config = parts.tokenizer, parts.text_encoder.config
    tokenizer.model_max_length, config.num_hidden_layers, xl = length, 2, kind == "sdxl"
    width = config.hidden_size
    added: dict[str, Any] = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": width + 6 * 8,
    }
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        transformer_layers_per_block=(1, 2) if xl else 1,
        attention_head_dim=(2, 4),  # which are numbers of heads
        norm_num_groups=4,
        cross_attention_dim=2 * width if xl else width,
        **(added if xl else {}),
    )
    shared: dict[str, Any] = {"vae": parts.vae, "tokenizer": tokenizer, "unet": unet}
    betas: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
    }
    shared["text_encoder"] = transformers.CLIPTextModel(config)
    if xl:
        second = transformers.CLIPTextModelWithProjection(config)
        scheduler = diffusers.EulerDiscreteScheduler(**betas)
        pipe = diffusers.StableDiffusionXLPipeline(
            **shared, text_encoder_2=second, tokenizer_2=tokenizer, scheduler=scheduler, add_watermarker=False
        )
    else:
        pipe = diffusers.StableDiffusionPipeline(
            **shared,
            scheduler=diffusers.DDIMScheduler(**betas, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    for seed, name in enumerate(("text_encoder", "text_encoder_2", "unet", "vae")):
        if (module := getattr(pipe, name, None)) is not None:
            dp.testing.randomise(module, seed)
    pipe.set_progress_bar_config(disable=True)
    return pipe
