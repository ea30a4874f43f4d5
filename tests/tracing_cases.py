"""Small pipeline calls that several test files trace."""

import torch

import dit_probe as dp
from dit_probe import anatomy

SIZES = {family: found.tiny_call for family, found in anatomy.families().items() if found.pipeline_variants}
WORDS = ["sun", "sky", "boat"]


def generate(pipe, prompt="a sun in the sky", *, steps=2, seed=0, **options):
    result = pipe(
        prompt,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        **{**anatomy.find(pipe).tiny_call, **options},
    )
    return result.frames if hasattr(result, "frames") else result.images


def traced(pipe, *probes, call=None, **options):
    with dp.trace(pipe, *probes, progress=False, **options) as run:
        output = generate(pipe, **(call or {}))
    return output, run.dataset
