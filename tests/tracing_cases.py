"""Small pipeline calls that several test files trace."""

import torch

import dit_probe as dp
from dit_probe import anatomy

SIZES = {family: found.tiny_call for family, found in anatomy.families().items() if found.pipeline_variants}
WORDS = ["sun", "sky", "boat"]


def generate(pipe, prompt="a sun in the sky", *, steps=2, seed=0, **options):
    call = {"num_inference_steps": steps, "output_type": "pt", **anatomy.find(pipe).tiny_call, **options}
    if isinstance(prompt, list):
        prompt = list(prompt)  # Z-Image's pipeline writes its template into the list that it is given
        if isinstance(call.get("negative_prompt"), str):
            call["negative_prompt"] = [call["negative_prompt"]] * len(prompt)
    result = pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), **call)
    return result.frames if hasattr(result, "frames") else result.images


def fewest_steps(pipe):
    """Steps of a call with ``steps=1``: Mochi's schedule has no single step."""
    return anatomy.find(pipe).tiny_call.get("num_inference_steps", 1)


def sites(pipe):
    """Options of a probe that records concepts wherever the family's blocks are: in the paper's, if it has them."""
    joint = anatomy.find(pipe).blocks(pipe.transformer)[0].kind == "joint"
    return {} if joint else {"layers": "single", "through": "all"}


def traced(pipe, *probes, call=None, **options):
    with dp.trace(pipe, *probes, progress=False, **options) as run:
        output = generate(pipe, **(call or {}))
    return output, run.dataset
