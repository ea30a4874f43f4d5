"""Which method of the paper's tables runs on which model, and how the model is loaded."""

from __future__ import annotations

from functools import partial
from typing import Any

import dit_probe as dp
from probes.baselines.clip_as_rnn import ClipAsRNN
from probes.baselines.clip_es import TEMPLATES, ClipES
from probes.baselines.daam import DAAM
from probes.baselines.dense_clip import DenseCLIP
from probes.baselines.gradients import GenericAttention, GradCAM, LeGrad
from probes.baselines.ibot import ibot
from probes.baselines.joint_attention import JointAttention
from probes.baselines.ovam import OVAM
from probes.baselines.relevance import LRP, PartialLRP, TransInterp
from probes.baselines.textspan import TextSpan
from probes.baselines.unet import UNet
from probes.baselines.vit import ViT
from probes.baselines.vit_attention import Rollout, ViTAttention

_EXPLAINED: dict[str, Any] = {
    "LRP": LRP,
    "Partial-LRP": PartialLRP,
    "Rollout": Rollout,
    "ViT Attention": ViTAttention,
    "GradCAM": GradCAM,
    "GradCAM, tokens": partial(GradCAM, form="token"),
    "TransInterp": TransInterp,
    "TransInterp, gradient times attention": GenericAttention,
    "LeGrad": LeGrad,
}


def load_ibot(path: str, *, device: Any = "cpu", dtype: Any = None, revision: str | None = None) -> ViT:
    """IBOT's published checkpoint, a file of PyTorch's, as a vision transformer."""
    import torch

    saved = torch.load(path, map_location="cpu", weights_only=True)
    model = ibot(saved.get("state_dict", saved)).to(device, dtype)
    return ViT(model, architecture="iBOT ViT", revision=revision)


def load_pair(path: str, **where: Any) -> tuple[ViT, ViT]:
    """The proposer, with the texts of CLIP-ES, and the classifier: two paths with a comma between them.

    Raises:
        ModelError: not two paths.
    """
    paths = path.split(",")
    if len(paths) != 2:
        raise dp.errors.ModelError(f"{path!r}: CLIPasRNN needs two CLIPs; give PROPOSER,CLASSIFIER")
    return ViT.load(paths[0], templates=TEMPLATES, **where), ViT.load(paths[1], **where)


def recurrence(pair: tuple[ViT, ViT]) -> ClipAsRNN:
    """CLIP as RNN on a proposer and a classifier."""
    return ClipAsRNN(pair[1], ClipES(pair[0]))


VIT_IN1K = dp.methods.Host("CLIP ViT", ViT.load, _EXPLAINED)
"""A supervised ImageNet classifier: what the paper's rows named CLIP ViT are, but for TextSpan and CLIPasRNN."""
CLIP = dp.methods.Host(
    "CLIP ViT",
    ViT.load,
    _EXPLAINED
    | {
        "TextSpan": TextSpan,
        "SCLIP": partial(DenseCLIP, attention="sclip"),
        "NACLIP": partial(DenseCLIP, attention="naclip"),
        "CLIP-ES": ClipES,
    },
)
CLIP_PAIR = dp.methods.Host("CLIP ViT", load_pair, {"CLIPasRNN": recurrence})
"""Two CLIPs, "PROPOSER,CLASSIFIER": openai/clip-vit-base-patch16 and openai/clip-vit-large-patch14 in the paper."""
PIPELINE = dp.methods.Host(
    "",
    None,
    {
        "image-to-text attention": JointAttention,
        "text-to-image attention": partial(JointAttention, reading="text_to_image"),
    },
)
"""The pipeline that is studied."""
DINO = dp.methods.Host("DINO ViT", partial(ViT.load, architecture="DINO ViT", size=480), {"DINO SA": ViTAttention})
DINOV2 = dp.methods.Host("DINOv2 ViT", ViT.load, {"DINOv2 SA": ViTAttention})
DINOV2_REGISTERS = dp.methods.Host("DINOv2 Reg", ViT.load, {"DINOv2 Reg SA": ViTAttention})
IBOT = dp.methods.Host("iBOT ViT", load_ibot, {"iBOT SA": ViTAttention})
SD2 = dp.methods.Host("SD2 UNet", UNet.load, {"DAAM": DAAM, "OVAM": OVAM})
SDXL = dp.methods.Host("SDXL UNet", UNet.load, {"DAAM": DAAM, "OVAM": OVAM})
