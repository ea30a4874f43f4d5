"""The numbers that the paper prints, in percent, to stand beside what is measured.

Table 1 is a part of Table 2, with other names for the same rows. Figure 4 prints curves and no numbers.

What the columns are differs from data set to data set, see `MEANING`; seven rows of the ImageNet-Segmentation mIoU
(LRP, Partial-LRP, Rollout, ViT Attention, GradCAM, TextSpan, TransInterp) and two more (OVAM, ConceptAttention on
SD3.5) do not follow ``Acc / (2 - Acc)`` as all others do, and are another metric.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

Kind = Literal["imagenet", "voc", "voc_multi", "other"]
Numbers = tuple[float, ...]

MEANING: Mapping[Kind, Mapping[str, str]] = MappingProxyType(
    {
        "imagenet": {
            "Acc": "pixel_accuracy_pooled, mean",
            "mIoU": "iou_legacy_pooled, mean",
            "mAP": "ap_legacy",
        },
        "voc": {
            "Acc": "pixel_accuracy_void_as_error_pooled, mean",
            "mIoU": "iou_macro_pooled, mean",
            "mAP": "ap_legacy",
        },
        "voc_multi": {"Acc": "class_accuracy_pooled", "mIoU": "miou_pooled"},
    }
)
"""Data set to the printed columns, and which of `dit_probe.summary.summarise`'s metrics each of them is."""

_EXTENDED = """
LRP                  | CLIP ViT   | 51.09 32.89 55.68 48.77 31.44 52.89
Partial-LRP          | CLIP ViT   | 76.31 57.94 84.67 71.52 51.39 84.86
Rollout              | CLIP ViT   | 73.54 55.42 84.76 69.81 51.26 85.34
ViT Attention        | CLIP ViT   | 67.84 46.37 80.24 68.51 44.81 83.63
GradCAM              | CLIP ViT   | 64.44 40.82 71.60 70.44 44.90 76.80
TextSpan             | CLIP ViT   | 75.21 54.50 81.61 75.00 56.24 84.79
TransInterp          | CLIP ViT   | 79.70 61.95 86.03 76.90 57.08 86.74
CLIPasRNN            | CLIP ViT   | 74.05 58.80 84.80 61.76 41.48 76.57
OVAM                 | SDXL UNet  | 79.41 65.02 88.12 73.50 58.12 87.91
DINO SA              | DINO ViT   | 81.97 69.44 86.12 80.71 64.33 88.90
DINOv2 SA            | DINOv2 ViT | 77.39 63.12 84.19 79.65 57.61 87.26
DINOv2 Reg SA        | DINOv2 Reg | 72.04 56.31 80.83 77.16 56.60 86.35
iBOT SA              | iBOT ViT   | 76.34 61.73 82.04 74.96 55.80 85.26
DAAM                 | SDXL UNet  | 78.47 64.56 88.79 72.76 55.95 88.34
DAAM                 | SD2 UNet   | 64.52 47.62 78.01 64.28 45.01 83.04
Cross attention      | Flux DiT   | 74.92 59.90 87.23 80.37 54.77 89.08
Cross attention      | SD3.5 DiT  | 77.80 63.67 83.50 80.22 61.46 86.97
ConceptAttention     | SD3.5 DiT  | 81.92 67.47 90.79 83.90 69.93 90.02
ConceptAttention     | Flux DiT   | 83.07 71.04 90.45 87.85 76.45 90.19
"""
_IN_TABLE_1 = (
    "ViT Attention | CLIP ViT",  # there "CLIP SA"
    "TextSpan | CLIP ViT",
    "TransInterp | CLIP ViT",
    "CLIPasRNN | CLIP ViT",
    "DINOv2 SA | DINOv2 ViT",
    "DAAM | SDXL UNet",
    "Cross attention | SD3.5 DiT",
    "Cross attention | Flux DiT",
    "ConceptAttention | SD3.5 DiT",
    "ConceptAttention | Flux DiT",
)


def _parsed() -> dict[str, Numbers]:
    rows: dict[str, Numbers] = {}
    for line in _EXTENDED.strip().splitlines():
        method, model, numbers = (part.strip() for part in line.split("|"))
        rows[f"{method} | {model}"] = tuple(map(float, numbers.split()))
    return rows


_ROWS = _parsed()


def methods(table: Literal["table1", "table2"], kind: Kind) -> dict[str, Numbers]:
    """Rows "method | model" of Table 1 or 2: Acc, mIoU, mAP on ImageNet-Segmentation or single-class PascalVOC.

    Example:
        >>> methods("table1", "imagenet")["ConceptAttention | Flux DiT"], len(methods("table2", "voc"))
        ((83.07, 71.04, 90.45), 19)
    """
    start = {"imagenet": 0, "voc": 3}[kind]
    names = _IN_TABLE_1 if table == "table1" else tuple(_ROWS)
    return {name: _ROWS[name][start : start + 3] for name in names}


SEVERAL_CLASSES: Mapping[str, Numbers] = MappingProxyType(
    {
        "TextSpan | CLIP ViT": (73.84, 38.10),
        "DAAM | SDXL UNet": (62.89, 10.97),
        "Cross attention | Flux DiT": (79.52, 27.04),
        "ConceptAttention | Flux DiT": (86.99, 51.39),
    }
)
"""Table 3: Acc, mIoU on PascalVOC's pictures of all classes."""

SPACES: Mapping[str, Numbers] = MappingProxyType(
    {
        "cross": (66.59, 49.91, 73.17),
        "cross, softmax": (74.92, 59.90, 87.23),
        "value": (45.93, 29.81, 65.79),
        "value, softmax": (45.78, 29.68, 39.61),
        "output": (78.75, 64.95, 88.39),
        "output, softmax": (83.07, 71.04, 90.45),
    }
)
"""Table 4: Acc, mIoU, mAP on ImageNet-Segmentation, Flux."""

ATTENDS: Mapping[str, Numbers] = MappingProxyType(
    {
        "none": (52.63, 35.72, 70.21),
        "concepts": (51.68, 34.85, 69.36),
        "image": (76.51, 61.96, 86.73),
        "both": (83.07, 71.04, 90.45),
    }
)
"""Table 5: Acc, mIoU, mAP on ImageNet-Segmentation, Flux; what concepts attend to."""
