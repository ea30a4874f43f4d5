"""Small pipeline calls that several test files trace."""

import torch

import dit_probe as dp

SIZES = {
    "flux": {"height": 16, "width": 24},
    "sd3": {"height": 16, "width": 16},
    "cogvideox": {"height": 32, "width": 48, "num_frames": 9},
}
WORDS = ["sun", "sky", "boat"]


def generate(pipe, prompt="a sun in the sky", *, steps=2, seed=0, **options):
    family = dp.testing.find(pipe).family
    result = pipe(
        prompt,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        **{**SIZES[family], "max_sequence_length": 226 if family == "cogvideox" else 16, **options},
    )
    return result.frames if family == "cogvideox" else result.images


def traced(pipe, *probes, call=None, **options):
    with dp.trace(pipe, *probes, progress=False, **options) as run:
        output = generate(pipe, **(call or {}))
    return output, run.dataset
