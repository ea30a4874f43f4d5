"""How a trace ends: by an error, by a kill, beside another one; nothing stays hooked and nothing is lost."""

import signal
import subprocess
import sys
import textwrap
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tracing_cases import WORDS, generate, traced

import dit_probe as dp
from dit_probe import anatomy, testing
from dit_probe.errors import (
    IncompleteWarning,
    ModelError,
)
from probes import ConceptAttention


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["callback", "attention", "block"])
@pytest.mark.parametrize("family", ["flux", "sd3", "cogvideox"])
def test_nothing_stays_hooked_after_an_error(pipelines, family, error, where, tmp_path):
    pipe = pipelines(family)
    store = tmp_path / "cut.zarr"

    def fail(*args, **kwargs):
        raise error("stop")

    calls = {"callback_on_step_end": fail} if where == "callback" else {}
    block = anatomy.find(pipe).blocks(pipe.transformer)[1]
    broken = {"attention": block.attention.to_out[0], "block": block.module.ff}.get(where)
    handle = broken.register_forward_pre_hook(fail) if broken is not None else None
    with pytest.raises(error, match="stop"), dp.trace(pipe, ConceptAttention(WORDS), store=store, progress=False):
        generate(pipe, **calls)
    if handle is not None:
        handle.remove()
    assert testing.leftovers(pipe) == []
    with pytest.warns(IncompleteWarning, match="sample 0"):
        assert not dp.open(store).done.any()
    before = generate(pipe)
    after, ds = traced(pipe, ConceptAttention(WORDS), store=store)
    assert torch.equal(before, after) and bool(ds.done.all())
    assert testing.leftovers(pipe) == []


def test_one_trace_at_a_time(pipelines):
    pipe = pipelines("flux")
    with (
        dp.trace(pipe, ConceptAttention(WORDS), progress=False),
        pytest.raises(ModelError, match="being traced already"),
        dp.trace(pipe, ConceptAttention(WORDS), progress=False),
    ):
        pass
    assert testing.leftovers(pipe) == []


KILLED = """
    import os, sys, torch
    os.environ["HF_HUB_OFFLINE"] = "1"
    import dit_probe as dp
    from dit_probe import stream, testing
    from probes import ConceptAttention

    pipe = testing.tiny_pipeline("flux")
    def wait(pipe, step, time, values):
        print(step, flush=True)
        if step == 1 and sys.argv[1] == "wait":
            import time
            time.sleep(60)
        return values
    for store in sys.argv[2:]:
        with dp.trace(pipe, ConceptAttention(["sun", "sky"]), store=store, progress=False):
            for seed, prompt in enumerate(["a sun", "a boat"]):
                pipe(prompt, height=16, width=16, num_inference_steps=3, max_sequence_length=16,
                     generator=torch.Generator().manual_seed(seed), callback_on_step_end=wait if seed else None)
"""


def test_a_killed_run_is_readable_and_completed_by_running_it_again(tmp_path):
    script, store = tmp_path / "run.py", tmp_path / "killed.zarr"
    script.write_text(textwrap.dedent(KILLED))
    process = subprocess.Popen([sys.executable, script, "wait", store], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "1":
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with pytest.warns(IncompleteWarning, match=r"1 of 2 samples .* sample 1 lacks \d+ of \d+"):
        ds = dp.open(store)
    assert ds.done.values.tolist() == [True, False]
    fresh = tmp_path / "fresh.zarr"
    subprocess.run([sys.executable, script, "go", store, fresh], check=True, capture_output=True)
    completed = dp.open(store).load()
    assert completed.done.all() and completed.prompt.values.tolist() == ["a sun", "a boat"]
    for name, variable in dp.open(fresh).load().data_vars.items():
        assert np.array_equal(variable, completed[name]), name


def test_guidance_in_two_calls_is_resumed(pipelines, tmp_path):
    pipe, store = pipelines("flux"), tmp_path / "guided.zarr"
    guided = {"negative_prompt": "a boat", "true_cfg_scale": 2.0}

    def fail(*args):
        raise RuntimeError("stop")

    probe = ConceptAttention(WORDS)
    with pytest.raises(RuntimeError), dp.trace(pipe, probe, store=store, branch="both", progress=False):
        generate(pipe, **guided)
        generate(pipe, "a boat", seed=1, **guided, callback_on_step_end=fail)
    with dp.trace(pipe, probe, store=store, branch="both", progress=False) as run:
        generate(pipe, **guided)
        generate(pipe, "a boat", seed=1, **guided)
    assert run.dataset.done.values.tolist() == [True, True]
    assert np.isfinite(run.dataset.o_c).all()


THEIRS = str(Path(diffusers.__file__).parent)


class HostReads(TorchDispatchMode):
    """What waits for the device, with the file of ours that asked for it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero"):
            # Of whoever is the nearest: a model and its scheduler may wait for what they like.
            ours = str(Path(dp.__file__).parent)
            frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith((ours, THEIRS))]
            if frames[-1].filename.startswith(ours):
                self.seen.append(f"{Path(frames[-1].filename).stem}:{frames[-1].name}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["flux", "sd3", "cogvideox"])
def test_nothing_in_a_step_waits_for_the_device(pipelines, family):
    probe = ConceptAttention(WORDS, scores=("output", "value", "cross"))

    def reads(steps: int) -> Counter[str]:
        with dp.trace(pipelines(family), probe, verify=None, progress=False), HostReads() as reads:
            generate(pipelines(family), steps=steps)
        return Counter(reads.seen)

    few, many = reads(2), reads(4)
    assert many == few and "tracing:_embed" in few, "once a run, to see that concepts are finite"
