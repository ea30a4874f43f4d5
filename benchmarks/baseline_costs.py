"""What the methods of the paper's Table 2 cost, on models of the true shapes with random weights.

    python benchmarks/baseline_costs.py                    # all but sdxl, which needs 12 GiB and a GPU
    python benchmarks/baseline_costs.py clip dino          # some

Time and memory are in units of one plain pass of the row's own model, measured in turns on one picture and four words;
neither depends on weights. Rows of the studied pipeline are those of sd35-picturebook. Writes
results/baseline_costs.json, continued if it is there, and docs/other-methods.md: Table 2 with every row.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import dit_probe as dp
from dit_probe import methods
from dit_probe.demo.text import clip_tokenizer
from dit_probe.reproduce import facts, printed
from dit_probe.summary import markdown
from probes.baselines.clip_es import TEMPLATES
from probes.baselines.unet import UNet
from probes.baselines.vit import ViT

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results" / "baseline_costs.json", HERE.parent / "docs" / "other-methods.md"
WORDS = ["sun", "boat", "water", "sky"]
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
PIPELINE = "sd35-picturebook"
LEAD = """# Other people's methods

Table 2 of the paper with every row, and the rows that a reader would miss there. *One map for all words*: the map does
not know the word, and has no row where words compete. Passes and gradients are those of a picture. Time and memory are
those of a picture and four words in units of one plain pass of the row's own model, measured in turns on models of the
true shapes with random weights (ViT-B/16, ViT-L/14, ViT-S/8 at 480 pixels, DINOv2 base at 518, the UNet of Stable
Diffusion 2 at 256). Those of MMDiTs are of the demo model {pipeline}, whose pass takes so little that fixed costs
decide: of a released model they are far smaller. Rows of SDXL are not measured. The paper's numbers are percent: Acc,
mIoU and mAP on ImageNet-Segmentation, then on single-class PascalVOC. Scores where weights exist:
`dit-probe reproduce table2 --baseline clip=openai/clip-vit-base-patch16`.

The rows named CLIP ViT are those of a supervised ImageNet classifier in the paper, but for TextSpan and CLIPasRNN;
`vit-in1k` and `clip` are both here.

Maps are held against libraries by others, on tiny random models (`tests/test_baselines_against_libraries.py`): joint
attention of seven families and cross-attention of both UNets against attention-map-diffusers 1.0.0, GradCAM of tokens
against pytorch-grad-cam 1.5.7. The largest differences, in parts of a map's largest value, are 4e-7 and, in double
precision, 2e-6.
"""


def clip(vision: Mapping[str, int], patch: int, **settings: Any) -> ViT:
    tokenizer = clip_tokenizer()
    marks = {f"{mark}_token_id": getattr(tokenizer, f"{mark}_token_id") for mark in ("bos", "eos", "pad")}
    text = {"vocab_size": len(tokenizer), "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048}
    config = transformers.CLIPConfig(
        text_config=text | {"num_hidden_layers": 12, "max_position_embeddings": 77, **marks},
        vision_config={**vision, "patch_size": patch, "image_size": 224},
    )
    return ViT(transformers.CLIPModel(config).eval(), tokenizer, **settings)


def vit(kind: str, shape: Mapping[str, int], patch: int, size: int, **settings: Any) -> ViT:
    config = getattr(transformers, kind.replace("Model", "").replace("ForImageClassification", "") + "Config")
    extra = {"add_pooling_layer": False} if kind == "ViTModel" else {}
    made = getattr(transformers, kind)(config(**shape, patch_size=patch, image_size=size), **extra)
    return ViT(made.eval(), **settings)


def sd2() -> UNet:
    import diffusers

    tokenizer = clip_tokenizer()
    text = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=1024, intermediate_size=4096, num_hidden_layers=23,
        num_attention_heads=16, max_position_embeddings=77, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    tokenizer.model_max_length = 77
    unet = diffusers.UNet2DConditionModel(
        sample_size=32, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[128, 256, 512, 512], layers_per_block=2,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae, transformers.CLIPTextModel(text), tokenizer, unet, diffusers.DDIMScheduler(clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return UNet(pipe)


MODELS: dict[str, Callable[[], Any]] = {
    "vit-in1k": lambda: vit("ViTForImageClassification", BASE, 16, 224),
    "clip": lambda: clip(BASE, 16),
    "clip-as-rnn": lambda: (clip(BASE, 16, templates=TEMPLATES), clip(LARGE, 14)),
    "dino": lambda: vit("ViTModel", SMALL, 8, 480, architecture="DINO ViT"),
    "dinov2": lambda: vit("Dinov2Model", BASE, 14, 518),
    "dinov2-registers": lambda: vit("Dinov2WithRegistersModel", BASE, 14, 518),
    "ibot": lambda: vit("ViTModel", BASE, 16, 224, architecture="iBOT ViT"),
    "sd2": sd2,
    "pipeline": lambda: dp.demo.load(PIPELINE),
}


def rows(name: str) -> dict[str, Any]:
    host, model = methods.hosts()[name], MODELS[name]()
    if name != "pipeline":
        return {f"{method} | {name}": row for method, row in host.rows(model).items()}
    text = {"max_sequence_length": 32}
    passes = methods.Passes(model, **text)
    found = {f"{method} | {name}": row for method, row in host.rows(model, text=text).items()}
    own = {"ConceptAttention": passes.method("output"), "Cross attention": passes.method("cross")}
    return {f"{method} | {name}": row for method, row in own.items()} | found


def page(known: Mapping[str, facts.Facts]) -> str:
    columns = (
        "method",
        "weights",
        *facts.COLUMNS,
        *(f"{m}, {d}" for d in ("ImageNet-S", "VOC") for m in ("Acc", "mIoU", "mAP")),
    )
    papers = [printed.methods("table2", kind) for kind in ("imagenet", "voc")]
    lines, told = [list(columns)], set[str]()
    for row, cells in known.items():
        method, _, name = row.partition(" | ")
        model = "SD3.5 DiT" if name == "pipeline" else cells[0]
        paper = f"{method} | {'CLIP ViT' if name in ('vit-in1k', 'clip', 'clip-as-rnn') else model}"
        told.add(paper)
        lines.append([method, name, *cells, *_numbers(papers, paper)])
    for paper in papers[0]:
        if paper not in told:
            method, _, model = paper.partition(" | ")
            cells = facts.declared(model, method) or (model, "no", "1", "0", "", "")
            lines.append([method, "", *cells, *_numbers(papers, paper)])
    return LEAD.format(pipeline=PIPELINE) + "\n" + markdown(lines) + "\n"


def _numbers(papers: list[dict[str, printed.Numbers]], row: str) -> list[str]:
    return [f"{value:.2f}" for paper in papers for value in paper.get(row, ())] or [""] * 6


def main() -> None:
    torch.manual_seed(0)
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    for name in sys.argv[1:] or MODELS:
        facts.measured(rows(name), image, WORDS, "SD3.5 DiT", RESULTS)
        print(name, flush=True)
    known = {row: tuple(cells) for row, cells in json.loads(RESULTS.read_text()).items()}
    order = [*MODELS]
    known = dict(sorted(known.items(), key=lambda item: order.index(item[0].partition(" | ")[2])))
    PAGE.write_text(page(known), encoding="utf-8")


if __name__ == "__main__":
    main()
