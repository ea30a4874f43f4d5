"""How numbers of each precision are kept in Zarr: without loss, and as the measurement says.

``benchmarks/encodings.py`` writes and reads the same chunks (3 MiB as bfloat16) with every codec in one run. Ratios to
uncompressed on two busy CPU cores, median of 5 rounds, attention outputs of a random Flux / smooth low-rank fields with
noise (a second run gave the same sizes, and speeds within 0.3; "-": disturbed):

| dtype | codec | smaller | write speed | read speed |
|---|---|---|---|---|
| bfloat16 | **blosc-lz4-bitshuffle** | 1.40 / 1.16 | 0.53 / 0.52 (0.87 GB/s) | 0.51 / 0.52 |
| bfloat16 | blosc-lz4-shuffle | 1.21 / 1.05 | 0.29 / 0.44 | 0.49 / 0.53 |
| bfloat16 | blosc-zstd1-bitshuffle | 1.43 / 1.03 | 0.26 / 0.25 | 0.27 / 0.25 |
| bfloat16 | zstd0, Zarr's default | 1.29 / 1.24 | 0.34 / 0.36 | 0.27 / 0.28 |
| float16 | **none** | 1 | 1 (1.7 GB/s) | 1 |
| float16 | blosc-lz4-bitshuffle | 1.11 / 1.00 | 0.49 / 0.52 | 0.49 / 0.49 |
| float16 | zstd0 | 1.09 / 1.06 | 0.36 / 0.37 | 0.27 / 0.21 |
| float32 | **none** | 1 | 1 (2.0 GB/s) | 1 |
| float32 | blosc-lz4-bitshuffle | 1.17 / 1.08 | 0.45 / - | 0.45 / 0.49 |
| float32 | zstd0 | 1.08 / 1.07 | 0.30 / - | 0.26 / 0.27 |

So bfloat16, the precision of large models and large traces, is compressed with lz4 after bitshuffle (1.34 on real
activations in an earlier measurement), and float16 and float32 are not: 0-14 % of space is not worth half the speed.

Every chunk ends with its crc32c, so that a flipped bit is an error where it is read and never a number. A store in
memory holds the numbers as they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

STORED = {
    "float32": np.dtype("float32"),
    "float16": np.dtype("float16"),
    "float64": np.dtype("float64"),
    "bfloat16": np.dtype("uint16"),  # Zarr has no bfloat16: its bits
    "uint8": np.dtype("uint8"),
}
FILL = {"float32": np.nan, "float16": np.nan, "float64": np.nan, "bfloat16": 0x7FC0, "uint8": 0}
COMPRESSORS = {"bfloat16": BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=2)}
CHECKSUM = Crc32cCodec()
LABELS: Any = (ZstdCodec(level=0), CHECKSUM)
"""Of labels and coordinates: small, and of Zarr's own kind."""

# Without this, Zarr compares every chunk with the fill value before it writes it, at a third of the speed.
CONFIG: Any = {"write_empty_chunks": True}

PART = 2**16

_EXPONENT = {"float16": np.uint16(0x7C00), "bfloat16": np.uint16(0x7F80)}


def compressors(dtype: str) -> Any:
    """The codecs of a variable's chunks, after the bytes of its numbers.

    Example:
        >>> [type(codec).__name__ for codec in compressors("bfloat16")]
        ['BloscCodec', 'Crc32cCodec']
    """
    return (*((COMPRESSORS[dtype],) if dtype in COMPRESSORS else ()), CHECKSUM)


def finite(values: np.ndarray, dtype: str) -> bool:
    """Whether no value is infinite or not a number; bfloat16 comes as its bits.

    Example:
        >>> finite(np.array([0x3F80, 0x7F80], np.uint16), "bfloat16")
        False
    """
    if dtype not in _EXPONENT:
        return bool(np.isfinite(values).all())
    # On the bits, since numpy's isfinite is several times slower on float16 and does not know bfloat16; in parts that
    # stay in the cache.
    flat, mask = np.ascontiguousarray(values).reshape(-1).view(np.uint16), _EXPONENT[dtype]
    return all((flat[at : at + PART] & mask).max() != mask for at in range(0, flat.size, PART))


def float32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits as float32, exactly: they are its upper half.

    Example:
        >>> float32(np.array([0x3F80, 0xC000], np.uint16))
        array([ 1., -2.], dtype=float32)
    """
    return (bits.astype(np.uint32) << 16).view(np.float32)
