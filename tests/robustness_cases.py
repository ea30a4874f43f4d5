"""What must hold of a trace of any model or pipeline that something was done to."""

import functools

import diffusers
import numpy as np
import pytest
import torch
from tracing_cases import SIZES, WORDS

import dit_probe as dp
from dit_probe import stream, testing

FAMILIES = ["flux", "sd3", "cogvideox"]
PROBE = dp.Probe(WORDS, record=["o_x", "o_c", "x", "p", "c"], layers="all", through="all")


def need(*names):
    """Skip where the installed diffusers has not got something yet."""
    for name in names:
        if not hasattr(diffusers, name):
            pytest.skip(f"diffusers {diffusers.__version__} has no {name}")


def call(family, pipe, **options):
    """A small call of a family's pipeline, whatever its transformer is wrapped in."""
    torch.manual_seed(0)  # some ControlNet pipelines encode their image with the global generator
    given = {"prompt": "a sun in the sky", "num_inference_steps": 2, "output_type": "pt", **SIZES[family], **options}
    result = pipe(generator=torch.Generator().manual_seed(0), **given)
    return result.frames if hasattr(result, "frames") else result.images


def caller(family, **options):
    """`call` for `unharmed`."""
    return functools.partial(call, family, **options)


def unharmed(pipe, run, probe=PROBE, **options):
    """Trace a call that leaves the output as it is and nothing behind; what was recorded.

    Args:
        pipe: the changed pipeline.
        run: calls it.
        probe: what to record.
        **options: of `dp.trace`.
    """
    before = run(pipe)
    with dp.trace(pipe, probe, progress=False, **options) as trace:
        during = run(pipe)
    assert torch.equal(before, during)
    assert torch.equal(before, run(pipe))
    assert testing.leftovers(pipe) == []
    ds = trace.dataset.load()
    assert ds.done.all()
    assert all(np.isfinite(ds[name]).all() for name in ("o_x", "o_c") if name in ds)
    return ds


def worst_replay(pipe, run):
    """Largest self-replay difference by kind of block."""
    kinds = {block.layer: block.kind for block in dp.anatomy.find(pipe).blocks(pipe.transformer)}
    worst = {}
    for layer, values in testing.replay_differences(pipe, lambda: run(pipe)).items():
        worst[kinds[layer]] = max(worst.get(kinds[layer], 0.0), *values.values())
    return worst


def replayed(pipe, run, **options):
    """`unharmed`, and self-replay passes in every block of every forward."""
    ds = unharmed(pipe, run, **options)
    assert max(worst_replay(pipe, run).values()) <= stream.tolerance(torch.float32)
    return ds


@torch.no_grad()
def untraced(pipe, run):
    """``x`` and ``o_x`` by layer, of the prompt's row in the last step, as hooks apart from a trace's see them."""
    family, found = dp.anatomy.find(pipe), {}

    def see(call, output):
        x, _ = family.outputs(call.block, output, call.places)
        o, _ = call.places.split(call.attention.o)
        found[call.block.layer] = {"x": x[-1].numpy(), "o_x": o[-1].numpy()}

    with testing.watched(pipe, see):
        run(pipe)
    return found


def same(one, other):
    """Whether two datasets hold the same activations, bit for bit."""
    return all(np.array_equal(one[name], other[name], equal_nan=True) for name in PROBE.record)


def nothing_alike(one, other):
    """Whether both image and concepts differ in every layer."""
    return not any(
        np.allclose(one[name].sel(layer=layer), other[name].sel(layer=layer), equal_nan=True)
        for name in ("o_x", "o_c")
        for layer in one.layer.values
    )
