"""How should concepts attend to image and concepts, eqs. (4) and (5)? Three forms of the same numbers, in turns.

    python benchmarks/attend.py

| form | |
|---|---|
| concatenated | keys and values of both in one tensor, made anew in every block: what `dit_probe.stream` does |
| buffer | the same, copied into one tensor that all blocks share |
| two parts | each part by itself, merged by their log-sum-exp: no copy of k_x and v_x, but the logits are a tensor |

Shapes are those of Flux and SD3.5 at 1024 x 1024 and of the Flux-like CPU model, six concepts.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from alternating import bars, measure, write
from torch import Tensor

from dit_probe.attention import attend
from dit_probe.report import Section

SHAPES = {"small": (1024, 8, 64), "SD3.5-large": (4096, 38, 64), "Flux": (4096, 24, 128)}
CONCEPTS = 6


def two_parts(q: Tensor, image: tuple[Tensor, Tensor], concepts: tuple[Tensor, Tensor], scale: float) -> Tensor:
    parts, sums = [], []
    for k, v in (image, concepts):
        logits = torch.einsum("rchd,rnhd->rhcn", q, k).float() * scale
        sums.append(logits.logsumexp(-1))
        parts.append(torch.einsum("rhcn,rnhd->rchd", logits.softmax(-1).to(v), v))
    share = torch.stack(sums).softmax(0).transpose(2, 3)[..., None].to(q)
    return share[0] * parts[0] + share[1] * parts[1]


def forms(tokens: int, heads: int, width: int, device: str, dtype: torch.dtype, calls: int) -> dict[str, Any]:
    torch.manual_seed(0)
    q, k_c, v_c = (torch.randn(1, CONCEPTS, heads, width, device=device, dtype=dtype) for _ in range(3))
    # As a model leaves them: a view of the joint sequence.
    k, v = (torch.randn(1, 512 + tokens, heads, width, device=device, dtype=dtype)[:, 512:] for _ in range(2))
    scale = width**-0.5
    room = [torch.empty(1, tokens + CONCEPTS, heads, width, device=device, dtype=dtype) for _ in range(2)]

    def buffered() -> Tensor:
        for whole, own, image in zip(room, (k_c, v_c), (k, v), strict=True):
            whole[:, :CONCEPTS], whole[:, CONCEPTS:] = own, image
        return attend(q, *room, scale=scale)

    found = {
        "concatenated": lambda: attend(q, torch.cat([k_c, k], 1), torch.cat([v_c, v], 1), scale=scale),
        "buffer": buffered,
        "two parts": lambda: two_parts(q, (k, v), (k_c, v_c), scale),
    }
    expected = found["concatenated"]().float()
    for name, form in found.items():
        off = (form().float() - expected).abs().max() / expected.abs().max()
        assert off < 8 * torch.finfo(dtype).eps + 1e-5, f"{name} is off by {off}"

    def repeated(form: Any) -> Any:
        def arm() -> None:
            for _ in range(calls):
                form()
            if device == "cuda":
                torch.cuda.synchronize()

        return arm

    return {name: repeated(form) for name, form in found.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=5, help="an arm and round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    clock = "wall" if device == "cuda" else "cpu"
    settings = {**vars(options), "device": device, "dtype": str(dtype), "concepts": CONCEPTS}
    found: dict[str, Any] = {"settings": settings}
    sections = []
    for name, shape in SHAPES.items():
        times = measure(forms(*shape, device, dtype, options.calls), options.rounds)
        ratios = times.ratios("concatenated", clock)
        milliseconds = getattr(times, clock)["concatenated"].min() / options.calls * 1000
        found[name] = {"ratios": ratios, "concatenated, ms": milliseconds}
        print(name, f"{milliseconds:.2f} ms", {form: round(value["median"], 2) for form, value in ratios.items()})
        text = f"{milliseconds:.2f} ms a call concatenated."
        sections.append(Section(name, text, [bars(ratios, "time over concatenated", {"concatenated": 1})]))
    write("attend", "Attention of concepts", "Three forms of eqs. (4) and (5).", found, sections)


if __name__ == "__main__":
    main()
