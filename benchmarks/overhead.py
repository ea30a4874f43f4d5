"""What tracing costs: arms that run the same forwards with and without a trace, in turns.

    python benchmarks/overhead.py                        # on a CPU: the Flux-like model, 1024 + 128 tokens, float32
    python benchmarks/overhead.py --model FLUX.1-dev     # for a GPU: the true size, random weights, bfloat16

The other true sizes are those of `benchmarks/sizes.py`. On a GPU, the highest memory of every arm is given, too.

| arm | |
|---|---|
| hooks | plain torch hooks that keep references to what attention modules return: the floor of any capture |
| processor | the model's attention processor replaced by one that keeps references to q, k, v and o |
| nnsight | the residual streams after every block, saved by nnsight, where it is installed |
| x p | the same tensors, recorded in memory by a probe without concepts |
| scores | six concepts, scores of the output space reduced in flight, in memory |
| three scores | those of the output, value and cross spaces |
| o_x o_c | both recorded in memory |
| everything | o, q, k, v of image and concepts in memory |
| reinvoke | every joint block called once more with the concepts in the text slot: what sharing nothing costs |

The theoretical overhead is counted while a forward runs with and without the trace, whatever the operations are: how
many floating-point operations (torch's table), and how many bytes of tensors they read and write. None can take less
than the longer of both at the rates of a large product and of a large copy, measured in the same process. Bytes tell
more than operations here: six rows of concepts are multiplied by all of the text's weights.

CPU time of the process counts, all threads included; every arm runs once a round, in a random order, and ratios are
those of the same round. ``verify`` is off here: what it costs, once a trace, is an arm of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from alternating import bars, measure, write
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from sizes import FLUX, MODELS, arguments
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import dit_probe as dp
from dit_probe import anatomy
from dit_probe.report import Section
from probes import ConceptAttention

WORDS = ["sun", "sky", "boat", "grass", "water", "house"]
COUNTED = ("plain", "scores", "three scores", "reinvoke")
SHAPES = {
    "small": {"layers": 6, "single": 6, "heads": 8, "head_dim": 64, "side": 32, "text": 128, "axes": (16, 24, 24)},
    "flux": {"layers": 19, "single": 38, "heads": 24, "head_dim": 128, "side": 64, "text": 512, "axes": (16, 56, 56)},
    "one block": {"layers": 1, "single": 0, "heads": 2, "head_dim": 16, "side": 4, "text": 8, "axes": (4, 6, 6)},
}


def model_of(shape: dict[str, Any], device: str, dtype: torch.dtype) -> tuple[Any, dict[str, torch.Tensor]]:
    """A Flux transformer with random weights, made on the device, and the inputs of a call."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    width = shape["heads"] * shape["head_dim"]
    with torch.device(device):
        model = FluxTransformer2DModel(
            in_channels=64,
            num_layers=shape["layers"],
            num_single_layers=shape["single"],
            attention_head_dim=shape["head_dim"],
            num_attention_heads=shape["heads"],
            joint_attention_dim=width,
            pooled_projection_dim=256,
            axes_dims_rope=shape["axes"],
        )
        side, text = shape["side"], shape["text"]
        ids = torch.zeros(side, side, 3)
        ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)[None]
        inputs = {
            "hidden_states": torch.randn(1, side * side, 64),
            "encoder_hidden_states": torch.randn(1, text, width),
            "pooled_projections": torch.randn(1, 256),
            "timestep": torch.full((1,), 0.5),
            "img_ids": ids.flatten(0, 1),
            "txt_ids": torch.zeros(text, 3),
        }
    return model.to(dtype).eval(), {name: value.to(dtype) for name, value in inputs.items()}


def true_size(name: str, device: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """A model of `benchmarks/sizes.py` with random weights, made on the device, and the inputs of a call."""
    kind, config, grid, text, _, _ = MODELS[name]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # or there would be twice the memory for a while
    try:
        with torch.device(device):
            model = getattr(diffusers, kind).from_config(config).eval()
            inputs: dict[str, Any] = {
                name: torch.randn(part.shape) for name, part in arguments(kind, grid, text).items()
            }
            inputs["timestep"] = torch.full((1,), 0.5 if kind == FLUX else 500.0)
            frames, height, width = grid
            if kind == FLUX:
                ids = torch.zeros(height, width, 3)
                ids[..., 1], ids[..., 2] = torch.arange(height)[:, None], torch.arange(width)[None]
                inputs |= {"img_ids": ids.flatten(0, 1), "txt_ids": torch.zeros(text, 3)}
            elif config.get("use_rotary_positional_embeddings"):
                size, corners = (height, width), ((0, 0), (height, width))
                table = get_3d_rotary_pos_embed(config["attention_head_dim"], corners, size, frames, device=device)
                inputs["image_rotary_emb"] = table
    finally:
        torch.set_default_dtype(before)
    return model, inputs


class Bench:
    """The arms: each makes `forwards` calls of the model, a shape of `SHAPES` or the name of a true size."""

    def __init__(self, shape: dict[str, Any] | str, device: str, dtype: torch.dtype, forwards: int) -> None:
        make = true_size if isinstance(shape, str) else model_of
        self.model, self.inputs = make(shape, device, dtype)  # pyright: ignore[reportArgumentType]
        self.forwards, self.device = forwards, device
        self.concepts = torch.randn(len(WORDS), self.inputs["encoder_hidden_states"].shape[-1]).to(device, dtype)
        self.blocks = anatomy.find(self.model).blocks(self.model)

    def run(self) -> Any:
        with torch.no_grad():
            output = None
            for _ in range(self.forwards):
                output = self.model(**self.inputs, return_dict=False)[0]
        if self.device == "cuda":
            torch.cuda.synchronize()
        return output

    def traced(self, *, verify: Any = None, **options: Any) -> Callable[[], Any]:
        probe = ConceptAttention(WORDS, steps=range(self.forwards), **options)

        def arm() -> Any:
            with dp.trace(self.model, probe, concepts=self.concepts, verify=verify, progress=False) as trace:
                self.run()
            return trace

        return arm

    def hooks(self) -> Any:
        kept: list[Any] = []
        handles = [
            block.attention.register_forward_hook(lambda module, args, output: kept.append(output))
            for block in self.blocks
        ]
        self.run()
        for handle in handles:
            handle.remove()
        return kept

    def processor(self) -> Any:
        from diffusers.models import attention_dispatch

        kept: list[Any] = []
        plain = self.model.attn_processors

        class Keeping:
            def __init__(self, processor: Any) -> None:
                self.processor = processor

            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                return self.processor(*args, **kwargs)

        # The processors call the dispatcher; keeping its arguments is what a rewritten one would do.
        from diffusers.models.transformers import transformer_flux

        dispatch = attention_dispatch.dispatch_attention_fn

        def keeping(query: Any, key: Any, value: Any, **options: Any) -> Any:
            output = dispatch(query, key, value, **options)
            kept.append((query, key, value, output))
            return output

        self.model.set_attn_processor({name: Keeping(processor) for name, processor in plain.items()})
        transformer_flux.dispatch_attention_fn = keeping
        try:
            self.run()
        finally:
            transformer_flux.dispatch_attention_fn = dispatch
            self.model.set_attn_processor(plain)
        return kept

    def nnsight(self) -> Callable[[], Any]:
        from nnsight import NNsight

        wrapped = NNsight(self.model)
        modules = [wrapped.get(block.path) for block in self.blocks]

        def arm() -> Any:
            kept: list[Any] = []
            with torch.no_grad():
                for _ in range(self.forwards):
                    with wrapped.trace(**self.inputs, return_dict=False) as tracer:
                        cache = tracer.cache(modules=modules).save()
                    kept.append(cache)
            return kept

        return arm

    def residuals(self) -> Any:
        probe = dp.Probe(record=("x", "p"), layers="all", steps=range(self.forwards))
        with dp.trace(self.model, probe, verify=None, progress=False) as trace:
            self.run()
        return trace

    def reinvoke(self) -> Any:
        """Joint blocks called again with concepts in the text slot; scores of the output space at each."""
        scores: list[torch.Tensor] = []
        streams: dict[str, Any] = {}

        def again(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            if streams.get("busy"):
                return
            streams["busy"] = True
            rotary = kwargs["image_rotary_emb"]
            text = kwargs["encoder_hidden_states"].shape[1]
            cut = tuple(torch.cat([part[: len(WORDS)], part[text:]]) for part in rotary)
            c = streams.get("c")
            c = self.model.context_embedder(self.concepts)[None] if c is None else c
            seen: list[Any] = []
            handle = module.attn.register_forward_hook(lambda m, a, o: seen.append(o))
            c, _ = module(**{**kwargs, "encoder_hidden_states": c, "image_rotary_emb": cut})
            handle.remove()
            x, mine = seen[0][:2]
            scores.append(torch.einsum("rnd,rcd->rcn", x.float(), mine.float()))
            streams.update(c=c, busy=False)

        def reset(*_: Any) -> None:
            streams.clear()

        handles = [self.model.register_forward_pre_hook(reset)]
        handles += [b.module.register_forward_hook(again, with_kwargs=True) for b in self.blocks if b.kind == "joint"]
        self.run()
        for handle in handles:
            handle.remove()
        return scores

    def arms(self) -> dict[str, Callable[[], Any]]:
        one = {"record": (), "scores": ("output",)}
        found = {
            "plain": self.run,
            "hooks": self.hooks,
            "processor": self.processor,
            "nnsight": None,
            "x p": self.residuals,
            "scores": self.traced(**one),
            "scores, verified": self.traced(verify="first", **one),
            "three scores": self.traced(record=(), scores=("output", "value", "cross")),
            "o_x o_c": self.traced(record=("o_x", "o_c")),
            "everything": self.traced(record=[f"{letter}_{token}" for letter in "oqkv" for token in "xc"]),
            "reinvoke": self.reinvoke,
        }
        if importlib.util.find_spec("nnsight") is not None:
            found["nnsight"] = self.nnsight()
        if type(self.model).__name__ != FLUX:
            del found["processor"], found["reinvoke"]  # written for Flux
        return {name: arm for name, arm in found.items() if arm is not None}

    def counted(self, arm: Callable[[], Any], rates: tuple[float, float]) -> Count:
        """What an arm computes, moves, and cannot do faster."""
        count = Count(rates)
        with count:
            arm()
        return count


class Count(TorchDispatchMode):
    """Operations and bytes of all that runs inside, and the least seconds for them.

    Args:
        rates: floating-point operations and bytes a second.
    """

    def __init__(self, rates: tuple[float, float]) -> None:
        super().__init__()
        self.rates, self.flops, self.bytes, self.seconds = rates, 0, 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and not func.name().startswith(("aten::detach", "aten::_unsafe_view", "aten::empty")):
            formula = flop_registry.get(func.overloadpacket)
            flops = formula(*args, **(kwargs or {}), out_val=out) if formula is not None else 0
            moved = sum(part.nbytes for part in tree_leaves((args, kwargs, out)) if isinstance(part, torch.Tensor))
            self.flops, self.bytes = self.flops + flops, self.bytes + moved
            self.seconds += max(flops / self.rates[0], moved / self.rates[1])
        return out


def rates(device: str, dtype: torch.dtype, size: int) -> tuple[float, float]:
    """Floating-point operations of a large product and bytes of a large copy, each a second: the fastest of nine."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(64, 2**20, device=device)
    target = torch.empty_like(source)

    def fastest(call: Callable[[], Any]) -> float:
        taken = []
        for _ in range(9):
            began = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - began)
        return min(taken)

    return 2 * size**3 / fastest(lambda: a @ b), 2 * source.nbytes / fastest(lambda: target.copy_(source))


def peaks(arms: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The highest memory of every arm on a CUDA device, over that of the plain forward."""
    highest = {}
    for name, arm in arms.items():
        torch.cuda.reset_peak_memory_stats()
        arm()
        highest[name] = torch.cuda.max_memory_allocated()
    return {name: value / highest["plain"] for name, value in highest.items()}


def idle(rounds: int) -> dict[str, float]:
    """Milliseconds that an open trace adds to a call of a one-block model of which it records nothing."""
    bench = Bench(SHAPES["one block"], "cpu", torch.float32, 50)
    probe = ConceptAttention(WORDS, record=(), scores=("output",), steps=[10**6])

    def seconds() -> float:
        began = time.process_time()
        bench.run()
        return time.process_time() - began

    added = []
    for _ in range(rounds + 1):
        plain = seconds()
        # The step that is planned never comes, which the end of the trace complains of.
        trace = dp.trace(bench.model, probe, concepts=bench.concepts, verify=None, progress=False)
        with contextlib.suppress(dp.errors.DitProbeError), trace:
            bench.run()  # lays out the store
            traced = seconds()
        added.append(1000 * (traced - plain) / bench.forwards)
    return {"median": float(np.median(added[1:])), "lowest": min(added[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["small", *MODELS], default="small")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--forwards", type=int, default=4, help="calls of the model an arm and round")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    small = options.model == "small"
    device = "cuda" if not small and torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if small else torch.bfloat16
    bench = Bench(SHAPES["small"] if small else options.model, device, dtype, options.forwards)
    arms = bench.arms()
    plain = bench.run()
    assert torch.equal(plain, bench.run())
    speeds = rates(device, dtype, 8192 if device == "cuda" else 2048)
    counts = {name: bench.counted(arms[name], speeds) for name in COUNTED if name in arms}
    counted = {
        name: {kind: getattr(count, kind) / getattr(counts["plain"], kind) for kind in ("flops", "bytes", "seconds")}
        for name, count in counts.items()
    }
    times = measure(arms, options.rounds)
    ratios = {clock: times.ratios("plain", clock) for clock in ("cpu", "wall")}
    nothing = idle(options.rounds)
    for name in arms:
        line = "  ".join(f"{clock} {ratios[clock][name]['median']:.3f}" for clock in ratios)
        print(f"{name:18} {line}" + ("  counted " + str(counted[name]) if name in counted else ""))
    print(f"idle: {nothing['median']:.3f} ms a call")
    settings = {**vars(options), "device": device, "concepts": len(WORDS), "torch": torch.__version__}
    found = {"settings": settings, "ratios": ratios, "counted": counted, "rates": speeds, "idle, ms a call": nothing}
    if device == "cuda":
        found["peak memory over plain"] = memory = peaks(arms)
        print("peak memory over plain:", {name: round(value, 3) for name, value in memory.items()})
    found["seconds"] = {name: list(values) for name, values in times.cpu.items()}
    shown = {name: value for name, value in ratios["cpu"].items() if name != "plain"}
    write(
        f"overhead_{options.model}",
        "What tracing costs",
        f"Ratios to the plain forward in the same round. Counted, scores cost {counted['scores']['seconds']:.4f}. "
        f"A trace that records nothing adds {nothing['median']:.2f} ms to a call of a one-block model.",
        found,
        [Section("CPU time", "Median and quartiles over rounds.", [bars(shown, "CPU time over plain", {"plain": 1})])],
    )


if __name__ == "__main__":
    main()
