"""Vision transformers of the transformers library, and what one picture leaves in them.

`ViT` holds a model, knows how pictures and words enter it and where its parts are, and records a pass:

    A_l^h = softmax(q_l^h k_l^hT / sqrt d),   z_l^h = A_l^h v_l^h        for every layer l and head h

Under ``gradients=True`` recorded tensors are part of one graph, so that ``torch.autograd.grad(score, seen.attention)``
are the gradients of a score with respect to the attention of every layer.

While a pass is recorded, and only then, the vision side computes attention by a function of our own. It is
registered for masks, too: without that transformers would drop masks without a word.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import dit_probe as dp
from probes.baselines.vit_layout import LAYOUTS, block_of, part_of
from probes.baselines.vit_recording import LISTS, Recording, watch


class ViT:
    """A vision transformer, how pictures and words enter it, and where its parts are.

    The model must be in evaluation mode and must not change as long as this is used; every pass leaves it as it came.

    Args:
        model: of a class of `LAYOUTS`. A `ViTForImageClassification` explains the class that it sees, whatever the
            concepts are; models without a head have attention alone.
        tokenizer: of a CLIPModel.
        size: side in pixels that pictures are stretched to, brought down to a multiple of the patch; None: the model's
            own. Pictures are not cropped, because a map has to cover all of its picture. Positions are interpolated
            where the size is not the model's own.
        architecture: what tables call it, where its class does not say enough: "DINO ViT", "iBOT ViT".
        mean: of the colours, in 0..1; None: what its class was trained with.
        std: of the colours.
        templates: texts around a concept; several are averaged: t = norm(mean_i norm(text(template_i))).
        revision: commit of the weights, where they come from a hub.

    Attributes:
        patch: side of a patch in pixels.
        skip: tokens before the first patch: the class token and registers.
        heads: attention heads of a block.
        blocks: a `Block` a layer.
        convolution, final, head: of the patches; norm after the last block; linear layer after it, or None.

    Raises:
        ModelError: a class that is not known, or one that does not have the parts that transformers 5 gives it; a
            model in training mode; a CLIPModel without a tokenizer; a size below the patch.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=16)
        >>> vit = ViT(ViTModel(config, add_pooling_layer=False).eval(), size=32, architecture="DINO ViT")
        >>> seen = vit.record(np.zeros((20, 30, 3), np.uint8))
        >>> seen.grid, [tuple(layer.shape) for layer in seen.attention]
        ((2, 2), [(1, 2, 5, 5), (1, 2, 5, 5)])
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        size: int | None = None,
        architecture: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        templates: Sequence[str] = ("a photo of a {}.",),
        revision: str | None = None,
    ) -> None:
        name = next((kind.__name__ for kind in type(model).__mro__ if kind.__name__ in LAYOUTS), None)
        if name is None:
            raise dp.errors.ModelError(
                f"{type(model).__name__} is no vision transformer that is known here: give one of {', '.join(LAYOUTS)}"
            )
        layout = LAYOUTS[name]
        self.model, self.tokenizer = model, tokenizer
        self.is_clip, self.is_classifier = name == "CLIPModel", name == "ViTForImageClassification"
        self.architecture = architecture or layout.architecture
        self.mean, self.std = tuple(mean or layout.colours[0]), tuple(std or layout.colours[1])
        self.templates, self.revision = tuple(templates), revision or ""
        self.tower: Any = part_of(model, layout.tower)
        self.blocks = [block_of(module, layout) for module in part_of(self.tower, layout.blocks)]
        self.convolution, self.final = part_of(self.tower, layout.patches), part_of(self.tower, layout.final)
        self.head = part_of(model, layout.head) if layout.head else None
        config = self.tower.config
        self.heads: int = config.num_attention_heads
        self.skip: int = 1 + getattr(config, "num_register_tokens", 0)
        self.patch: int = self.convolution.kernel_size[0]
        wanted = size or config.image_size
        self.size = wanted - wanted % self.patch
        self._words: dict[str, Tensor] = {}
        self._ready()
        if self.is_clip and tokenizer is None:
            raise dp.errors.ModelError("a CLIPModel needs its tokenizer to read concepts: ViT(model, tokenizer)")
        if not self.size:
            raise dp.errors.ModelError(f"size={wanted} is below the patch of {self.patch} pixels; give a larger one")

    @classmethod
    def load(
        cls,
        path: str,
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> ViT:
        """Load a model from a folder or a hub: the class, tokenizer, mean and standard deviation that its files name.

        Args:
            path: a folder, or a name on the hub: "openai/clip-vit-base-patch16", "google/vit-base-patch16-224",
                "facebook/dino-vits8" (with ``architecture="DINO ViT", size=480``), "facebook/dinov2-base".
            revision: branch, tag or commit of the hub.
            device: where the model goes.
            dtype: of its weights.
            **settings: for `ViT`.

        Raises:
            ModelError: the files are of another class, or as `ViT` says.
        """
        import transformers
        from transformers.utils.hub import cached_file

        where: dict[str, Any] = {"revision": revision}
        config = transformers.AutoConfig.from_pretrained(path, **where)
        named = {"clip": "CLIPModel", "dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
        classifier = "ViTForImageClassification" in (config.architectures or ())
        named["vit"] = "ViTForImageClassification" if classifier else "ViTModel"
        if config.model_type not in named:
            raise dp.errors.ModelError(f"{path} has a model of type {config.model_type!r}; give one of {sorted(named)}")
        name = named[config.model_type]
        # A pooling layer that a checkpoint lacks would be random, and is not used.
        extra: dict[str, Any] = {"add_pooling_layer": False} if name == "ViTModel" else {}
        model = getattr(transformers, name).from_pretrained(path, dtype=dtype, **extra, **where)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **where) if name == "CLIPModel" else None
        found = cached_file(path, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False, **where)
        if found is not None:
            with open(found, encoding="utf-8") as file:
                says = json.load(file)
            settings = {"mean": says.get("image_mean"), "std": says.get("image_std")} | settings
        commit = getattr(config, "_commit_hash", None) or revision
        return cls(model.to(device), tokenizer, revision=commit, **settings)

    @property
    def attrs(self) -> dict[str, str | int]:
        """Model, revision, checksum of the weights, preprocessing and size, for the attributes of scores."""
        colours = f"mean {self.mean}, std {self.std}"
        return {
            "architecture": self.architecture,
            "model": str(getattr(self.model, "name_or_path", "")) or type(self.model).__name__,
            "revision": self.revision,
            "weights": dp.methods.checksum(model=self.model),
            "size": self.size,
            "preprocessing": f"stretched to {self.size} x {self.size} pixels, bicubic, {colours}",
            **({"templates": json.dumps(self.templates)} if self.is_clip else {}),
        }

    def describe(self) -> str:
        """Class, architecture, path, revision, weights, preprocessing and templates."""
        return f"{type(self.model).__name__}({json.dumps(self.attrs)})"

    def pixels(self, image: np.ndarray) -> Tensor:
        """A picture, (y, x, 3) uint8, as the model takes it: (1, 3, size, size)."""
        from PIL import Image

        small = Image.fromarray(image).resize((self.size, self.size), Image.Resampling.BICUBIC)
        values = (np.asarray(small) / 255 - self.mean) / self.std
        return torch.from_numpy(values).permute(2, 0, 1)[None].to(self.model.device, self.model.dtype)

    def texts(self, concepts: Sequence[str]) -> Tensor:
        """Unit vectors of concepts, (concept, embedding), of a CLIPModel; each word is encoded once."""
        if not self.is_clip:
            raise dp.errors.ModelError(f"{type(self.model).__name__} reads no words; concepts need a CLIPModel")
        with torch.inference_mode(False), torch.no_grad():
            for word in concepts:
                if word not in self._words:
                    sentences = [template.format(word) for template in self.templates]
                    tokens = self.tokenizer(sentences, padding=True, return_tensors="pt").to(self.model.device)
                    found = self.model.get_text_features(**tokens).pooler_output
                    mean = nn.functional.normalize(found, dim=-1).mean(0)
                    self._words[word] = nn.functional.normalize(mean, dim=-1)
        return torch.stack([self._words[word] for word in concepts])

    def embed(self, states: Tensor) -> Tensor:
        """The final norm and the head on a residual stream: (..., width) to (..., embedding or class)."""
        if self.head is None:
            raise dp.errors.ModelError(
                f"{type(self.model).__name__} has no score to explain: give a CLIPModel or a ViTForImageClassification"
            )
        return self.head(self.final(states))

    def logits(self, states: Tensor, texts: Tensor | None = None) -> Tensor:
        """Scores of a residual stream: (..., width) to (..., concept) for CLIP, (..., class) for a classifier.

        s_c = exp(logit scale) <norm(P LN(x)), t_c>, CLIP's ``logits_per_image``, with `texts` t of `ViT.texts`.
        """
        found = self.embed(states)
        if texts is None:
            return found
        return nn.functional.normalize(found, dim=-1) @ texts.mT * self.model.logit_scale.exp()

    def record(
        self, image: np.ndarray, *, gradients: bool = False, keep: Collection[str] = LISTS, class_only: bool = False
    ) -> Recording:
        """Pass a picture through the vision side once.

        Args:
            image: (y, x, 3) uint8.
            gradients: build a graph, from the pixels on, of which all tensors recorded are part.
            keep: the lists of `Recording` that are wanted; others stay empty.
            class_only: attention of the class token alone; it is then not computed for other tokens (of a picture of
                480 pixels in patches of 8, twelve layers have gigabytes).

        Raises:
            ModelError: the model is in training mode.
        """
        self._ready()
        side = self.size // self.patch
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            seen = Recording((side, side), self.skip, self.pixels(image).requires_grad_(gradients))
            with watch(self.tower, self.blocks, seen, keep, class_only):
                self._run(seen.pixels)
        return seen

    @torch.no_grad()
    def forward(self, image: np.ndarray) -> Any:
        """Pass a picture through the vision side once, with the model's own attention."""
        return self._run(self.pixels(image))

    def _run(self, pixels: Tensor) -> Any:
        # DINOv2 interpolates its positions unasked.
        asked = {} if self.tower.config.model_type.startswith("dinov2") else {"interpolate_pos_encoding": True}
        return self.tower(pixel_values=pixels, **asked)

    def _ready(self) -> None:
        if self.model.training:
            raise dp.errors.ModelError(
                f"{type(self.model).__name__} is in training mode, where dropout changes every map: call model.eval()"
            )
