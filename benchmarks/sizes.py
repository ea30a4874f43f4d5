"""What the paper's models need on a GPU, computed: weights, operations of a step, and what a trace holds.

    python benchmarks/sizes.py

Models of the true sizes are made on torch's meta device, where tensors have shapes and no contents. Writes docs/gpu.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from dit_probe import anatomy, planning
from dit_probe.anatomy import Grid
from dit_probe.probe import Combination
from dit_probe.schema import human
from dit_probe.summary import markdown
from probes import ConceptAttention

PAGE = Path(__file__).resolve().parent.parent / "docs" / "gpu.md"
CARDS = (24, 40, 80)
PEAK = 312e12
"""Operations a second of an A100 in bfloat16, dense."""
WORDS = ["fox", "snow", "sky", "tree", "grass", "water"]
FLUX, SD3, COGVIDEOX = "FluxTransformer2DModel", "SD3Transformer2DModel", "CogVideoXTransformer3DModel"
SD = {"in_channels": 16, "attention_head_dim": 64, "joint_attention_dim": 4096, "qk_norm": "rms_norm"}
SD |= {"sample_size": 128}
LARGE = {"num_attention_heads": 38, "num_layers": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}
MEDIUM = {"num_attention_heads": 24, "num_layers": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384}
MEDIUM |= {"dual_attention_layers": tuple(range(13))}
COG = {"num_attention_heads": 48, "attention_head_dim": 64, "num_layers": 42, "use_rotary_positional_embeddings": True}
# Class, configuration, image tokens (frame, y, x), text tokens, steps, passes a step.
MODELS = {
    "FLUX.1-schnell": (FLUX, {}, (1, 64, 64), 256, 4, 1),
    "FLUX.1-dev": (FLUX, {}, (1, 64, 64), 512, 28, 1),
    "SD3.5-medium": (SD3, SD | MEDIUM, (1, 64, 64), 333, 40, 2),
    "SD3.5-large": (SD3, SD | LARGE, (1, 64, 64), 333, 28, 2),
    "CogVideoX-2b": (COGVIDEOX, {}, (13, 30, 45), 226, 50, 2),
    "CogVideoX-5b": (COGVIDEOX, COG, (13, 30, 45), 226, 50, 2),
}
LEAD = """# Memory and time on a GPU

<!-- Written by benchmarks/sizes.py. -->

**Computed, not measured.** Models of the true sizes are made without their weights, and `benchmarks/sizes.py` counts
parameters and floating-point operations, and asks `probe.plan` what a trace holds. All in bfloat16, at each
model's own size (1024 x 1024; 49 frames of 480 x 720) and number of steps, with six concepts.

"""
TAIL = """
* *Weights* are those of the transformer and, in brackets, with the text encoders. On top come activations of the pass,
  the autoencoder and the libraries: leave a few GB, and more for video.
* *Fits*: everything on the card at once; or, with `--offload`, one part at a time, of which T5-XXL has {t5:.1f} GB.
  Where the largest part alone fills the card, weights have to be quantised or offloaded block by block; traces of both
  are tested, on CPUs ([limits](limits.md)).
* *A step takes at least* its operations over the peak of an A100 ({peak:.0f}e12 a second). No run is that fast; another
  card scales with its own peak. What tracing adds was measured on small models: [benchmarks](benchmarks.md).
* Of a trace, `vectors` are everything that `ConceptAttention` records, and `scores` what
  `record=(), scores=("output", "cross")` keeps, enough for maps. Vectors leave the GPU while the model runs: they need
  disk, not GPU memory.
"""


def arguments(kind: str, grid: tuple[int, int, int], text: int) -> dict[str, torch.Tensor]:
    """Of one pass."""
    frames, y, x = grid
    shapes: dict[str, tuple[int, ...]] = {"encoder_hidden_states": (1, text, 4096), "timestep": (1,)}
    latents = {FLUX: (1, y * x, 64), SD3: (1, 16, 2 * y, 2 * x), COGVIDEOX: (1, frames, 16, 2 * y, 2 * x)}
    shapes["hidden_states"] = latents[kind]
    if kind != COGVIDEOX:
        shapes["pooled_projections"] = (1, 768 if kind == FLUX else 2048)
    if kind == FLUX:
        shapes |= {"img_ids": (y * x, 3), "txt_ids": (text, 3)}
    return {name: torch.empty(shape) for name, shape in shapes.items()}


def giga(module: Any) -> float:
    """Bytes of parameters in bfloat16, in units of 1e9."""
    return sum(2 * parameter.numel() for parameter in module.parameters()) / 1e9


def main() -> None:
    rows = [["model", "weights, GB", *(f"fits {card} GB" for card in CARDS), "a step, at least", "vectors", "scores"]]
    with torch.device("meta"):
        config = T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
        t5 = giga(T5EncoderModel(config))
        small = giga(CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072)))
        big = giga(CLIPTextModel(CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32)))
        for name, (kind, config, grid, text, steps, passes) in MODELS.items():
            model = getattr(diffusers, kind).from_config(config)
            with FlopCounterMode(display=False) as counter:
                model(**arguments(kind, grid, text))
            own, clips = giga(model), {FLUX: small, SD3: small + big, COGVIDEOX: 0.0}[kind]
            whole, part = own + t5 + clips, max(own, t5)
            fits = ["yes" if whole < card - 2 else "offloaded" if part < card - 2 else "no" for card in CARDS]
            layout = {"grid": Grid.regular(*grid[1:], grid[0]), "prompt_tokens": text, "concepts": len(WORDS)}
            layout |= {"timesteps": [0.0] * steps, "sigmas": [0.0] * steps, "branch": "cond"}
            vectors, scores = (
                planning.Plan(planning.layout(anatomy.find(model), model, Combination(probe), **layout), 1).nbytes
                for probe in (ConceptAttention(WORDS), ConceptAttention(WORDS, record=(), scores=("output", "cross")))
            )
            seconds = f"{steps} x {counter.get_total_flops() * passes / PEAK:.2f} s"
            # The model is float32 here, and so are its vectors; scores are float32 anyway.
            rows.append([name, f"{own:.1f} ({whole:.1f})", *fits, seconds, human(vectors // 2), human(scores)])
    PAGE.write_text(LEAD + markdown(rows) + "\n" + TAIL.format(t5=t5, peak=PEAK / 1e12), encoding="utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()
