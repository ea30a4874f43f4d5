"""The choices of the authors' public evaluation code, which leave the paper's equations, as data and as a method."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import xarray as xr

from dit_probe import maps as concept_maps
from dit_probe.datasets.image_folders import VOC_BACKGROUND
from dit_probe.datasets.segmentation import IMAGENET_BACKGROUND
from dit_probe.methods.passes import check, described, joint_layers, own_size, plain, seeds, stacked, traced
from dit_probe.methods.trivial import blur
from dit_probe.probe import Probe
from dit_probe.protocols import EvaluationError, resize_image

REFERENCE_BACKGROUND = IMAGENET_BACKGROUND
"""Words that the code adds to the target on ImageNet-Segmentation: ``evaluate(…, concepts=REFERENCE_BACKGROUND)``."""
REFERENCE_VOC_BACKGROUND = VOC_BACKGROUND
"""Those that it adds on Pascal VOC."""

_LAYERS, _DEPTH = (14, 15, 16, 17), 19
_IMAGE = {"output": "o_x", "value": "v_x", "cross": "q_x_unrotated"}
_CONCEPT = {"output": "o_c", "value": "v_c", "cross": "k_c_unrotated"}
_START = "<start>"


@dataclass(frozen=True)
class ReferenceSettings:
    """What the authors' code does between a picture and a map; `reference` fills it in for a model.

    Attributes:
        space: "output" o_x . o_c; "value" v_x . v_c; "cross" q_x . k_c after qk-norm, before rotary, unscaled.
        layers: joint layers that are averaged.
        normalise: concept vectors, in every channel, less their minimum over concepts, over the sum of what is left;
            where nothing is left a channel counts nothing.
        heads: "merged", or a map of "each" that is averaged after the softmax.
        softmax: over concepts in "each" layer and head, or None.
        blur: sigma in tokens of the 3 x 3 Gaussian over the finished map, edges mirrored; None: not blurred.
        timestep: noise level, 0 to 1000.
        seeds: of the noise; the mean of their maps.
        pooled: pooled text vector that modulates concepts, "zero" or "prompt".
        prompt_pooled: that which modulates image and prompt.
        embed: concepts are the first T5 token of each word alone ("t5"), or the CLIP states of all words in one text
            ("clip"), whose start token is one more concept that has no map.
        image_attends: o_x is what the image reads from itself and the "prompt", or from itself and the "concepts".
        prompt: what the model is told; ``{}`` becomes the first concept.
        size: side in pixels that pictures are stretched to; None: as they are.
        interpolation: by which they are.
        max_sequence_length: T5 tokens that texts are padded to.

    Raises:
        EvaluationError: a field has a value that does not exist.
    """

    space: Literal["output", "value", "cross"]
    layers: tuple[int, ...]
    normalise: bool = True
    heads: Literal["merged", "each"] = "merged"
    softmax: Literal["each"] | None = "each"
    blur: float | None = 1.0
    timestep: float = 500
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    pooled: Literal["zero", "prompt"] = "zero"
    prompt_pooled: Literal["zero", "prompt"] = "zero"
    embed: Literal["t5", "clip"] = "t5"
    image_attends: Literal["prompt", "concepts"] = "prompt"
    prompt: str = "a {}"
    size: int | None = None
    interpolation: Literal["nearest", "lanczos"] = "nearest"
    max_sequence_length: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "seeds", seeds(self.seeds))
        choices = {
            "space": tuple(_IMAGE),
            "heads": ("merged", "each"),
            "softmax": ("each", None),
            "pooled": ("zero", "prompt"),
            "prompt_pooled": ("zero", "prompt"),
            "embed": ("t5", "clip"),
            "image_attends": ("prompt", "concepts"),
            "interpolation": ("nearest", "lanczos"),
        }
        for name, allowed in choices.items():
            if (found := getattr(self, name)) not in allowed:
                raise EvaluationError(f"{name}={found!r}; choose one of {', '.join(map(repr, allowed))}")


@dataclass(frozen=True)
class Reference:
    """Maps by the choices of the authors' code; `reference` makes it."""

    pipe: Any = field(repr=False)
    settings: ReferenceSettings

    def describe(self) -> str:
        """The pipeline and all settings, the layers among them."""
        return f"reference({described(self.pipe)}, {json.dumps(asdict(self.settings))})"

    @property
    def forwards(self) -> int:
        """Passes a picture."""
        return len(self.settings.seeds)

    def forward(self, image: np.ndarray) -> object:
        """The picture through autoencoder and transformer once, untraced."""
        own = self.settings
        picture = image if own.size is None else resize_image(image, own.size, own.interpolation)
        return plain(self.pipe, picture, own.timestep, {"max_sequence_length": own.max_sequence_length})

    def __call__(self, images: Sequence[np.ndarray], concepts: Sequence[str]) -> xr.DataArray:
        """Saliency, (image, concept, y, x)."""
        return stacked([self._picture(image, check(concepts)) for image in images], images, concepts)

    def _picture(self, image: np.ndarray, concepts: Sequence[str]) -> xr.DataArray:
        chosen = self.settings
        prompt = chosen.prompt.format(concepts[0])
        if chosen.size is not None:
            image = resize_image(image, chosen.size, chosen.interpolation)
        names, embeddings = concepts, None
        if chosen.embed == "clip":
            names = [_START, *concepts]
            embeddings = self._encoded(" ".join(concepts))[0][0, : len(names)]
        record = [_IMAGE[chosen.space], _CONCEPT[chosen.space]]
        if chosen.image_attends == "concepts":
            record += ["q_x", "k_x", "v_x", "k_c", "v_c"]
        probe = Probe(names, record=record, layers=chosen.layers, pooled=chosen.pooled)
        text, found = self._text(prompt), []
        for seed in chosen.seeds:  # the vectors of one pass in memory at a time
            ds = traced(self.pipe, probe, image, prompt, chosen.timestep, (seed,), text, embeddings)
            found.append(self._map(ds).isel(sample=0).load())
        mean: Any = xr.concat(found, "seed").mean("seed")
        return mean if chosen.blur is None else mean.copy(data=blur(mean.values, chosen.blur, 1, "reflect"))

    def _map(self, ds: xr.Dataset) -> xr.DataArray:
        """The trace with the concepts' vectors replaced by what the code makes of them, and the usual map of it."""
        chosen, name = self.settings, _CONCEPT[self.settings.space]
        if chosen.image_attends == "concepts":
            ds = ds.assign(o_x=_image_output(ds, self.pipe._execution_device))
        if chosen.embed == "clip":
            ds = ds.isel(concept=slice(1, None))
        vectors = ds[name]
        if chosen.normalise:
            vectors = normalised(vectors)
        if chosen.space == "cross":  # which `saliency` divides by it
            vectors = vectors * np.float32(math.sqrt(vectors.sizes["head_dim"]))
        how: Any = {"softmax": chosen.softmax, "heads": chosen.heads, "rotary": False}
        found = concept_maps.saliency(ds.assign({name: vectors}), chosen.space, **how)
        return found.mean("head") if chosen.heads == "each" else found

    def _text(self, prompt: str) -> Mapping[str, Any]:
        """What the pipeline's encode_prompt is given beside the prompt."""
        text = {"max_sequence_length": self.settings.max_sequence_length}
        if self.settings.prompt_pooled == "prompt":
            return text
        embeds, pooled = self._encoded(prompt)
        return {**text, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled.new_zeros(pooled.shape)}

    def _encoded(self, text: str) -> tuple[Any, Any]:
        """A text's embeddings and pooled vector, as the pipeline encodes a prompt."""
        import torch

        from dit_probe.anatomy import find

        pipe, length = self.pipe, self.settings.max_sequence_length
        with torch.no_grad():
            if find(pipe).family == "flux":
                found = pipe.encode_prompt([text], None, pipe._execution_device, max_sequence_length=length)
                return found[0], found[1]
            given = {"device": pipe._execution_device, "max_sequence_length": length}
            found = pipe.encode_prompt([text], None, None, do_classifier_free_guidance=False, **given)
            return found[0], found[2]


def reference(pipe: Any, space: Literal["output", "value", "cross"] = "output", **overrides: Any) -> Reference:
    """ConceptAttention by the choices of the authors' public evaluation code, where `concept_attention` is the paper's.

        map = blur(mean over seeds and layers of softmax over concepts of o_x . n(o_c))
        n(c) = (c - min over concepts) / sum over concepts of the same,    in every channel

    | setting | code, Flux.1 schnell | paper's text |
    |---|---|---|
    | `layers` | 14-17 of 19 | the last 10 of 19 |
    | `normalise` | yes ("output" and "value") | not mentioned |
    | `heads` | merged; "value" and "cross" each | not mentioned |
    | "cross" | concept keys . image queries, before rotary, unscaled | image keys . prompt queries |
    | `blur` | 3 x 3, sigma 1 | not mentioned |
    | `timestep` | 500 | 500 |
    | `seeds` | 5 | not mentioned |
    | `pooled`, `prompt_pooled` | zeros, for concepts, image and prompt | not mentioned |
    | `embed` | first T5 token of a word | T5 embedding of a word |
    | background words | `REFERENCE_BACKGROUND` | background, grass, sky |

    **Another depth** than 19 gets the layers at the same relative depth, which `describe` says.

    **VOC, single class**: ``reference(pipe, layers=range(14, 19), timestep=513, softmax=None, blur=None, seeds=0)``
    with `REFERENCE_VOC_BACKGROUND`. The code sums layers where this averages them, and takes the highest concept.

    **SD3.5** (space "output" alone): all layers; concepts are the CLIP states of all words in one text, and depend on
    their order; o_x is that of a second attention call, in which the image sees concepts in the place of the prompt;
    pooled vectors are the prompt's; timestep 602. How many seeds, and whether maps are blurred, is not known: one, and
    they are not.

    **What still differs from the code**: a seed's noise is drawn in float32 on the CPU, there in bfloat16 on the
    device; latents are the autoencoder's mode, there a sample; the precision is the pipeline's. Flux.1 dev has guidance
    3.5, there 0. SD3.5's cross-attention there, the prompt's third token under a softmax over text, is not a map of
    concepts and is left out.

    Args:
        pipe: a pipeline of Flux.1 or Stable Diffusion 3.
        space: "output", "value" or "cross" (Table 4).
        **overrides: other values for fields of `ReferenceSettings`. The demo models take ``max_sequence_length=32``.

    Raises:
        EvaluationError: another family, whose evaluation was not published; a value that does not exist, or that the
            family does not have.
        SiteError: a layer that does not exist.

    Example:
        >>> from dit_probe.testing import tiny_pipeline
        >>> method = reference(tiny_pipeline("flux"), size=16, max_sequence_length=16)
        >>> method.settings.layers, method.settings.pooled  # 14-17 of 19 are here the last of 3
        ((2,), 'zero')
        >>> method([np.zeros((16, 16, 3), np.uint8)], ["sun", "sky", "grass"]).shape
        (1, 3, 4, 4)
    """
    from dit_probe.anatomy import find, transformer_of

    anatomy, model = find(pipe), transformer_of(pipe)
    config: Any = model.config
    depth = sum(block.kind == "joint" for block in anatomy.blocks(model))
    fields: dict[str, Any] = {"size": own_size(pipe)}
    if anatomy.family == "flux":
        fields |= {"layers": sorted({round(layer * (depth - 1) / (_DEPTH - 1)) for layer in _LAYERS})}
        fields |= {"heads": "merged" if space == "output" else "each", "normalise": space != "cross"}
        fields |= {"max_sequence_length": 512 if config.guidance_embeds else 256}
    elif anatomy.family == "sd3" and space == "output":
        fields |= {"layers": range(depth), "timestep": 602, "seeds": 0, "blur": None, "interpolation": "lanczos"}
        fields |= {"pooled": "prompt", "prompt_pooled": "prompt", "embed": "clip", "image_attends": "concepts"}
    else:
        raise EvaluationError(
            f"space={space!r} of {type(pipe).__name__}: the authors evaluated Flux.1 (output, value, cross) and Stable "
            "Diffusion 3.5 (output). Use concept_attention"
        )
    fields |= overrides
    fields["layers"] = joint_layers(pipe, fields["layers"])
    settings = ReferenceSettings(space, **fields)
    if settings.embed == "clip" and anatomy.family == "flux":
        raise EvaluationError("embed='clip': the prompt of Flux.1 has no CLIP tokens. Use embed='t5'")
    return Reference(pipe, settings)


def normalised(vectors: xr.DataArray) -> xr.DataArray:
    """Concept vectors less their minimum over concepts, over the sum of what is left, in every channel.

    Example:
        >>> normalised(xr.DataArray([[1.0, 5.0], [4.0, 5.0], [2.0, 5.0]], dims=("concept", "width"))).values.tolist()
        [[0.0, 0.0], [0.75, 0.0], [0.25, 0.0]]
    """
    shifted = vectors - vectors.min("concept", skipna=False)
    total = shifted.sum("concept", skipna=False)
    return shifted / total.where(total != 0, 1)


def _image_output(ds: xr.Dataset, device: Any) -> xr.DataArray:
    """``softmax(q_x [k_x; k_c]^T / sqrt(d)) [v_x; v_c]``: o_x if the image saw concepts in the place of the prompt."""
    import torch

    layers = []
    for layer in ds.layer.values:
        one = ds.sel(layer=layer)
        q, k_x, v_x, k_c, v_c = (
            torch.from_numpy(one[name].values[0, 0]).to(device).transpose(0, 1)
            for name in ("q_x", "k_x", "v_x", "k_c", "v_c")
        )
        keys, values = torch.cat([k_x, k_c], 1), torch.cat([v_x, v_c], 1)
        attended = torch.nn.functional.scaled_dot_product_attention(q, keys, values)
        layers.append(attended.transpose(0, 1).cpu().numpy())
    return ds["q_x"].copy(data=np.stack(layers)[None, None])
