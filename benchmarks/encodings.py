"""Which encoding a trace's chunks should have: size and speed of each, as ratios to uncompressed within one run.

    python benchmarks/encodings.py            # table and JSON
    python benchmarks/encodings.py --json     # JSON only

Two kinds of data, both read as chunks of one (sample, step, layer):

* ``flux``: what the attention of a randomly initialised `FluxTransformer2DModel` produces for a smooth latent;
* ``smooth``: a low-rank field that varies slowly over the image, with channels of unequal scale and some noise.

Every codec writes the same chunks through the same zarr calls as `dit_probe.store`; rounds alternate over the codecs so
that a busy machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, ZstdCodec

from dit_probe.store.encoding import STORED

TOKENS, HEADS, HEAD_DIM = 1024, 24, 64
DTYPES = ("bfloat16", "float16", "float32")


def codecs(itemsize: int) -> dict[str, Any]:
    """Every codec that is compared, by name."""
    return {
        "none": None,
        "blosc-lz4-bitshuffle": BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=itemsize),
        "blosc-lz4-shuffle": BloscCodec(cname="lz4", clevel=5, shuffle="shuffle", typesize=itemsize),
        "blosc-zstd1-bitshuffle": BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle", typesize=itemsize),
        "zstd0": ZstdCodec(level=0),
    }


def smooth(chunks: int, seed: int = 0) -> np.ndarray:
    """Smooth low-rank fields, float32 (chunk, token, head, head_dim)."""
    random = np.random.default_rng(seed)
    side = int(TOKENS**0.5)
    y, x = np.meshgrid(np.linspace(0, 1, side), np.linspace(0, 1, side), indexing="ij")
    phase = random.uniform(0, 2 * np.pi, (chunks, 24, 1))
    waves = random.normal(0, 2, (chunks, 24, 2)) @ np.stack([y.ravel(), x.ravel()]) * np.pi
    field = np.cos(waves + phase)
    mixing = random.normal(0, 1, (chunks, 24, HEADS * HEAD_DIM)) * np.exp(random.normal(-1, 1, HEADS * HEAD_DIM))
    values = np.einsum("nrt,nrc->ntc", field, mixing) + random.normal(0, 0.1, (chunks, TOKENS, HEADS * HEAD_DIM))
    return values.reshape(chunks, TOKENS, HEADS, HEAD_DIM).astype(np.float32)


def flux(chunks: int, seed: int = 0) -> np.ndarray:
    """Attention outputs of the image tokens in a random Flux, float32 (chunk, token, head, head_dim)."""
    import torch
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=chunks,
        num_single_layers=0,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(16, 24, 24),
    ).eval()
    seen: list[np.ndarray] = []
    blocks: Any = model.transformer_blocks
    for block in blocks:
        block.attn.to_out[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].numpy().copy()))
    side = int(TOKENS**0.5)
    latent = torch.nn.functional.interpolate(torch.randn(1, 16, 6, 6), size=(side, side), mode="bicubic")
    ids = torch.zeros(side, side, 3)
    ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)[None]
    with torch.no_grad():
        model(
            hidden_states=latent.flatten(2).transpose(1, 2),
            encoder_hidden_states=torch.randn(1, 64, 32),
            pooled_projections=torch.randn(1, 16),
            timestep=torch.tensor([0.5]),
            img_ids=ids.reshape(-1, 3),
            txt_ids=torch.zeros(64, 3),
        )
    return np.stack(seen).reshape(chunks, TOKENS, HEADS, HEAD_DIM)


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """The array as it is handed to the store: bfloat16 as its bits."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def measure(values: np.ndarray, codec: Any) -> tuple[float, float, int]:
    """Seconds to write, seconds to read, bytes on disk."""
    with tempfile.TemporaryDirectory() as directory:
        array = zarr.create_array(
            directory,
            name="o_x",
            shape=values.shape,
            chunks=(1, *values.shape[1:]),
            dtype=values.dtype,
            compressors=codec,
            config={"write_empty_chunks": True},
        )
        start = time.perf_counter()
        for index in range(len(values)):
            array[index] = values[index]
        wrote = time.perf_counter() - start
        start = time.perf_counter()
        for index in range(len(values)):
            array[index]
        read = time.perf_counter() - start
        size = sum(path.stat().st_size for path in Path(directory, "o_x").rglob("*") if path.is_file())
    return wrote, read, size


def main() -> None:
    """Measure, print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=4, help="chunks per array")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON only")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for kind, source in (("flux", flux), ("smooth", smooth)):
        values = source(options.chunks)
        for dtype in DTYPES:
            stored = encode(values, dtype)
            assert stored.dtype == STORED[dtype]
            choices = codecs(stored.itemsize)
            times: dict[str, list[tuple[float, float, int]]] = {name: [] for name in choices}
            for _ in range(options.rounds):
                for name, codec in choices.items():
                    times[name].append(measure(stored, codec))
            plain = [statistics.median(column) for column in zip(*times["none"], strict=True)]
            for name, rounds in times.items():
                wrote, read, size = (statistics.median(column) for column in zip(*rounds, strict=True))
                rows.append(
                    {
                        "data": kind,
                        "dtype": dtype,
                        "codec": name,
                        "smaller": round(stored.nbytes / size, 3),
                        "write_speed": round(plain[0] / wrote, 2),
                        "read_speed": round(plain[1] / read, 2),
                        "write_MB_s": round(stored.nbytes / wrote / 1e6),
                    }
                )
    if not options.json:
        print(
            f"{'data':8}{'dtype':10}{'codec':24}{'smaller':>9}{'write':>8}{'read':>8}{'MB/s':>8}"
            "   (write, read: speed / none)"
        )
        for row in rows:
            print(
                "{data:8}{dtype:10}{codec:24}{smaller:9.3f}{write_speed:8.2f}{read_speed:8.2f}{write_MB_s:8d}".format(
                    **row
                )
            )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
