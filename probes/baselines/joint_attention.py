"""Raw attention of MMDiTs between the image and the words of its prompt, head by head.

    A_l^h = softmax([q_p; q_x] [k_p; k_x]^T / sqrt(d)),    one softmax over prompt and image together

"Cross-attention" of a transformer that has none is read in three ways, all of them blocks of products of these q and k:

| reading | map of word c | |
|---|---|---|
| "image_to_text" | A[x, p_k], mean over the tokens k of c | DAAM for MMDiTs; per layer, Seg4Diff (2509.18096) |
| "text_to_image" | A[p_k, x], mean over the tokens k of c | where the word's own queries look |
| concept keys | q_x . k_c of a concept stream | code of ConceptAttention: ``methods.reference(pipe, "cross")`` |

The third is there already, for words that the prompt need not have: before rotary embedding, unscaled, a softmax over
concepts in every head. For other families than Flux.1 it is ``methods.concept_attention(pipe, space="cross")``: after
rotary embedding, over sqrt(d), heads averaged before the softmax. `JointAttention` gives the first two.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

import dit_probe as dp

READINGS = ("image_to_text", "text_to_image")

_NAMES = {"FluxTransformer2DModel": "Flux DiT", "CogVideoXTransformer3DModel": "CogVideoX DiT"}
_SPECIAL = re.compile(r"<.+>|\[.+\]")


@dataclass(frozen=True)
class WordAttention(dp.Probe):
    """The joint attention of `PromptAttention`, of some words and with its heads apart: a variable for every concept.

    What image tokens give to padding is passed on to the prompt's real tokens, in proportion, as there.

    Attributes:
        reading: whose queries: the image's, or the words'.
        places: concept to the positions of its tokens in the prompt, in the order of `concepts`; filled in when the
            prompt's tokens are known.

    Example:
        >>> WordAttention(["sun", "sky"]).observes
        {'word_0': ('head', 'image_token'), 'word_1': ('head', 'image_token')}
    """

    source: str = "joint attention, eq. (1)"
    reading: Literal["image_to_text", "text_to_image"] = "image_to_text"
    places: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        made = {f"word_{at}": ("head", "image_token") for at in range(len(self.concepts))}
        object.__setattr__(self, "observes", made)

    def observe(self, block: dp.Observation, activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Columns or rows of the words in one block, one head at a time: all heads at once would not fit."""
        heads = torch.stack([self._words(block, block.weights(head)) for head in range(block.heads)], 2)
        return dict(zip(self.observes, heads.unbind(1), strict=True))

    def _words(self, block: dp.Observation, weights: Tensor) -> Tensor:
        """Of one head, (row, word, image_token)."""
        if self.reading == "text_to_image":
            found = weights[:, block.prompt, block.image].mT
        else:
            found = weights[:, block.image, block.prompt]
            if block.prompt_pads is not None:
                real = found.masked_fill(block.prompt_pads.to(found.device)[:, None], 0.0)
                found = real * (found.sum(-1, keepdim=True) / real.sum(-1, keepdim=True))
        return torch.stack([found[..., list(place)].mean(-1) for place in self.places.values()], 1)


@dataclass(frozen=True)
class JointAttention(dp.methods.Baseline):
    """What the joint attention of an MMDiT gives to the words of its prompt, for a real picture or video.

        M_c = mean over t, l, h and tokens k of c of  A_l^h[x, p_k]   or   A_l^h[p_k, x]

    All concepts are words of one prompt, "a sun, a sky", as in DAAM: they compete with each other in the softmax, and
    another order gives other maps. A word of several tokens or occurrences is the mean over all of them. SD3 reads the
    prompt by CLIP and by T5, and both count; a word beyond CLIP's 77 tokens counts by T5 alone. There is one pass a
    timestep, told the prompt, without guidance.

    What image tokens give to padding, which draws much of their attention, is passed on to the prompt's real tokens
    (`probes.PromptAttention`), so that the length of the padding decides less.

    Attributes:
        pipe: a pipeline of a known family, which must not change as long as this is used.
        reading: "image_to_text" or "text_to_image", see the table of this module.
        layers: as of `Probe`: None, every joint block; indices, negative ones from the last joint block (Seg4Diff takes
            a single one of them); "single", "all".
        timesteps: noise levels in 0..1000, at a pass each.
        seed: of the noise, the same for every picture.
        size: side in pixels that pictures are stretched to; None: the pipeline's own where it has one.
        form: of a concept in the prompt.
        separator: between concepts.
        text: for the pipeline's ``encode_prompt``: ``{"max_sequence_length": 256}``.

    Raises:
        ModelError: not a pipeline, or of no known family.
        ProbeError: an unknown reading.
        SiteError: a layer that does not exist.
        TraceError: no timestep, or one that is not in 0..1000.

    Example:
        >>> from dit_probe.testing import tiny_pipeline
        >>> method = JointAttention(tiny_pipeline("flux"), size=16, text={"max_sequence_length": 16})
        >>> method.prompt(["sun", "sky"])
        'a sun, a sky'
        >>> picture = np.zeros((20, 30, 3), np.uint8)
        >>> method.scores([picture], ["sun", "sky"]).sizes
        Frozen({'image': 1, 'concept': 2, 'timestep': 1, 'layer': 3, 'head': 2, 'y': 4, 'x': 4})
        >>> method([picture], ["sun", "sky"]).dims
        ('image', 'concept', 'y', 'x')
    """

    pipe: Any = field(repr=False)
    reading: Literal["image_to_text", "text_to_image"] = "image_to_text"
    layers: Sequence[int] | str | None = None
    timesteps: tuple[float, ...] = (500.0,)
    seed: int = 0
    size: int | None = None
    form: str = "a {}"
    separator: str = ", "
    text: Mapping[str, Any] = field(default_factory=dict)

    kind: ClassVar = "probability"

    def __post_init__(self) -> None:
        if self.reading not in READINGS:
            raise dp.errors.ProbeError(f"reading={self.reading!r}; choose one of {', '.join(READINGS)}")
        timesteps = tuple(float(t) for t in self.timesteps)
        if not timesteps or not all(0 <= t <= 1000 for t in timesteps):
            raise dp.errors.TraceError(f"timesteps={self.timesteps}: give noise levels from 0 (clean) to 1000 (noise)")
        if not hasattr(self.pipe, "transformer"):
            found = type(self.pipe).__name__
            raise dp.errors.ModelError(
                f"{found} is no pipeline with a transformer, whose VAE and text encoders are used"
            )
        dp.trace(self.pipe, WordAttention(["word"], layers=self.layers))  # not entered: refuses families and layers
        own, size = getattr(self.pipe, "default_sample_size", None), self.size
        if size is None and isinstance(own, int):
            size = own * self.pipe.vae_scale_factor
        model = self.pipe.transformer
        name = type(model).__name__
        if name == "SD3Transformer2DModel":
            architecture = "SD3.5 DiT" if model.config.qk_norm else "SD3 DiT"
        else:
            architecture = _NAMES.get(name, name)
        layers = self.layers if self.layers is None or isinstance(self.layers, str) else tuple(self.layers)
        # Class attributes of `Baseline` that hang on the settings here.
        derived = {"architecture": architecture, "forwards": len(timesteps)}
        for key, value in (derived | {"timesteps": timesteps, "size": size, "layers": layers}).items():
            object.__setattr__(self, key, value)

    @property
    def attrs(self) -> dict[str, Any]:
        """Model, revision, checksum of the weights, preprocessing and size, for the attributes of scores."""
        pipe, path = self.pipe, str(self.pipe.transformer.config.get("_name_or_path") or "")
        cached, size = re.search(r"snapshots/(\w+)", path), self.size
        modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        pixels = "size as it is" if size is None else f"stretched to {size} x {size} pixels, bicubic"
        return {
            "architecture": self.architecture,
            "model": str(pipe.config.get("_name_or_path") or type(pipe).__name__),
            "revision": cached[1] if cached else "",
            "weights": dp.methods.checksum(**modules),
            "size": "" if size is None else size,
            "preprocessing": f"{pixels}; mode of the autoencoder",
        }

    def describe(self) -> str:
        """Model, weights, preprocessing, timesteps and texts."""
        settings = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "pipe"}
        return f"JointAttention({json.dumps(self.attrs | settings, default=str)})"

    def prompt(self, concepts: Sequence[str]) -> str:
        """What the model is told."""
        return self.separator.join(self.form.format(concept) for concept in concepts)

    def forward(self, image: np.ndarray) -> object:
        """The picture through autoencoder and transformer once, told nothing and not traced."""
        return dp.encode(self.pipe, self._picture(image), "", 500, self.seed, **self.text)

    def scores(self, images: Sequence[np.ndarray], concepts: Sequence[str]) -> xr.DataArray:
        """Mean attention of a concept's tokens, (image, concept, timestep, layer, head, [frame,] y, x), float32.

        Args:
            images: ([frame,] y, x, 3) uint8.
            concepts: words.

        Raises:
            ConceptError: no concept, one that comes twice, or one that has no tokens in the prompt.
            TraceError: no picture, something else than pictures, or pictures whose maps have different grids.
        """
        if isinstance(concepts, str) or not len(concepts):
            raise dp.errors.ConceptError(f"concepts={concepts!r}: give a list of one word or more")
        if isinstance(images, np.ndarray) or not len(images):
            raise dp.errors.TraceError("images: give a list of one picture or more")
        for image in images:
            if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[-1:] != (3,):
                kind = f"{getattr(image, 'dtype', type(image).__name__)} {getattr(image, 'shape', '')}"
                raise dp.errors.TraceError(f"found {kind}, expected a picture ([frame,] y, x, 3) of uint8")
        found = []
        for image in images:
            passes: Any = xr.concat([self._pass(image, concepts, t) for t in self.timesteps], "timestep")
            found.append(passes.transpose("concept", "timestep", "layer", "head", ...))
        if len(grids := {one.shape for one in found}) > 1:
            raise dp.errors.TraceError(f"pictures give maps of different grids, {sorted(grids)}: give size=")
        joined: Any = xr.concat(found, "image").assign_coords(timestep=list(self.timesteps))
        joined.attrs = self.attrs
        return joined

    def _pass(self, image: np.ndarray, concepts: Sequence[str], timestep: float) -> xr.DataArray:
        """One pass, (layer, head, concept, [frame,] y, x)."""
        prompt = self.prompt(concepts)
        probe = WordAttention(concepts, layers=self.layers, reading=self.reading)
        with ExitStack() as undo:
            run = undo.enter_context(dp.trace(self.pipe, probe, progress=False))

            def name_tokens(*call: Any) -> None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", dp.errors.IncompleteWarning)  # the pass is still to come
                    tokens = run.dataset["token"].values[0].tolist()
                probe.places.update(word_places(tokens, concepts, prompt))

            # After the trace's own hook, which is told the prompt's tokens, and before the first block.
            undo.callback(self.pipe.transformer.register_forward_pre_hook(name_tokens).remove)
            dp.encode(self.pipe, self._picture(image), prompt, timestep, self.seed, **self.text)
        ds = run.dataset.isel(sample=0, step=0, drop=True)
        words: Any = xr.concat([ds[name] for name in probe.observes], "concept")
        found = dp.maps.grid(words.compute()).reset_coords(drop=True).drop_vars(("frame", "y", "x"), errors="ignore")
        found = found.assign_coords(concept=list(concepts), head=range(found.sizes["head"])).rename(None)
        return _each_frame(found, len(image)) if image.ndim == 4 else found

    def _picture(self, image: np.ndarray) -> Any:
        from PIL import Image

        frames = [Image.fromarray(frame) for frame in image.reshape(-1, *image.shape[-3:])]
        if self.size is not None:
            frames = [frame.resize((self.size, self.size), Image.Resampling.BICUBIC) for frame in frames]
        return frames if image.ndim == 4 else frames[0]


def word_places(tokens: Sequence[str], words: Sequence[str], prompt: str) -> dict[str, tuple[int, ...]]:
    """Where words stand among the tokens of a prompt: all tokens, all occurrences, as whole words.

    Args:
        tokens: strings of the prompt's tokens, with the marks of SentencePiece, CLIP or byte-level vocabularies.
        words: to look for.
        prompt: for the message.

    Raises:
        ConceptError: a word is not there, or was cut off with its end.

    Example:
        >>> word_places(["▁a", "▁sun", ",", "▁a", "▁sunset", "▁z", "oo", "</s>", "<pad>"], ["sun", "zoo"], "…")
        {'sun': (1,), 'zoo': (5, 6)}
    """
    read, owners = "", list[int]()
    for at, token in enumerate(tokens):
        piece = " " if _SPECIAL.fullmatch(token) else re.sub("▁|Ġ|</w>", " ", token).lower()
        read, owners = read + piece, owners + [at] * len(piece)
    places = {}
    for word in words:
        parts = r"\s*".join(map(re.escape, re.findall(r"\w+|[^\w\s]", word.lower())))
        spans = [range(*found.span()) for found in re.finditer(rf"(?<!\w){parts}(?!\w)", read)]
        if not spans:
            raise dp.errors.ConceptError(
                f"{word!r} is not among the {len(tokens)} tokens of {prompt!r}, of which the text encoder read "
                f"{' '.join(read.split())!r}: give fewer words at once, a longer max_sequence_length or another form"
            )
        places[word] = tuple(sorted({owners[at] for span in spans for at in span if not read[at].isspace()}))
    return places


def _each_frame(found: xr.DataArray, count: int) -> xr.DataArray:
    """The map of every frame of a video, of whose latents each but the first stands for several frames."""
    latents = found.sizes.get("frame", 1)
    if latents in (1, count):
        return found
    if (count - 1) % (latents - 1):
        raise dp.errors.TraceError(f"{latents} latent frames for {count} frames: give a length that the model takes")
    return found.isel(frame=-(-np.arange(count) * (latents - 1) // (count - 1)))
