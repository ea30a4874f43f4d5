"""What a family file says about its models: where the blocks are and how the text stream runs through one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from PIL.Image import Image

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Grid:
    """Positions of the image tokens: one integer per token and axis, in the order of the image stream."""

    frame: tuple[int, ...]
    y: tuple[int, ...]
    x: tuple[int, ...]

    @classmethod
    def regular(cls, height: int, width: int, frames: int = 1) -> Grid:
        """Row-major grid of ``frames`` x ``height`` x ``width`` tokens."""
        where = [(f, y, x) for f in range(frames) for y in range(height) for x in range(width)]
        return cls(*(tuple(axis) for axis in zip(*where, strict=True)))

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Block:
    """One transformer block of a model.

    Attributes:
        layer: index among the blocks, joint ones first, counted from 0.
        kind: "joint" (two residual streams) or "single" (one sequence).
        path: module path within the transformer.
        module: the block.
        attention: the module inside it that makes the joint attention call.
        text_output: whether the block hands on a text stream; SD3's last one (context_pre_only) does not.
    """

    layer: int
    kind: str
    path: str
    module: Any
    attention: Any
    text_output: bool = True

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of one call by name; positional, keyword and gradient-checkpointing calls alike.

        The class's forward is read, because offloading libraries replace the one on the instance.
        """
        signature = inspect.signature(type(self.module).forward)
        return dict(signature.bind_partial(self.module, *args, **kwargs).arguments)


@dataclass(frozen=True)
class TextContext:
    """What the text side of a block needs beside its tokens.

    Attributes:
        block: the block.
        temb: modulation input (row, width): timestep, and pooled text where the family has it.
        rotary: (cos, sin), each (token, head_dim) or one row for all tokens; None when text is not rotated.
    """

    block: Block
    temb: Tensor
    rotary: Rotary | None


@dataclass(frozen=True)
class Projection:
    """Text tokens as the attention call of a block would see them, each (row, token, head, head_dim).

    `modulation` holds the gates, shifts and scales that `TextSide.update` needs again.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_unrotated: Tensor
    k_unrotated: Tensor
    modulation: tuple[Tensor, ...] = ()


class TextSide:
    """The text half of a joint block, applied to any tokens: the prompt's own, or concepts.

    Submodules are called as modules, never through their weights, so that LoRA, quantised and offloaded layers act
    on concepts exactly as on text.
    """

    def project(self, c: Tensor, context: TextContext) -> Projection:
        """Norm, modulation, projections, qk-norm and rotary embedding: the q, k and v of eqs. (2) and (3)."""
        raise NotImplementedError

    def update(self, c: Tensor, o: Tensor, projection: Projection, context: TextContext) -> Tensor:
        """Output projection, gates and MLP, eqs. (6) and (7): ``c`` after the block.

        Args:
            c: (row, token, width) before the block.
            o: (row, token, head, head_dim), what the attention operation produced.
            projection: what `project` returned for the same tokens.
            context: as in `project`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class TinyModel:
    """A random model of a family, small enough for tests, with one call's inputs."""

    transformer: nn.Module
    inputs: Mapping[str, Any]
    grid: Grid
    concepts: Tensor


class TinyParts(Protocol):
    """Small random tokenizers, text encoders and an image VAE for tests, made without a network."""

    t5_width: int
    clip_width: int

    def t5(self) -> tuple[Any, Any]:
        """A T5 tokenizer and encoder."""
        ...

    def clip(self, *, projection: bool = False) -> tuple[Any, Any]:
        """A CLIP tokenizer and text model, with the projection head if asked."""
        ...

    def vae(self) -> Any:
        """An `AutoencoderKL` of factor 2 and 4 latent channels."""
        ...


class Anatomy:
    """Description of one model family. A family file subclasses this and fills in what is peculiar to it.

    Attributes:
        family: short name, as in the store's attrs.
        classes: transformer class names in diffusers.
        text: how the text stream runs through a joint block.
        text_first: whether text precedes the image in the joint attention sequence.
        pooled: whether a pooled text vector modulates the blocks.
        t5: pipeline attributes that hold the T5 tokenizer and encoder.
        timestep_scale: factor from the transformer's ``timestep`` argument to 0..1000.
        heads_first: whether the qk-norms of `unrotated` see (row, head, token, head_dim).
    """

    family: str
    classes: tuple[str, ...]
    text: TextSide
    text_first: bool
    pooled: bool
    t5: tuple[str, str]
    timestep_scale: float = 1.0
    heads_first: bool = False
    variants: tuple[str, ...] = ()

    def blocks(self, model: nn.Module) -> tuple[Block, ...]:
        """Every block in running order, joint before single."""
        raise NotImplementedError

    def refuse(self, model: nn.Module) -> str | None:
        """Why this very model cannot be traced truthfully, or None."""
        return None

    def streams(self, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Image and prompt stream at the input of a block."""
        return arguments["hidden_states"], arguments["encoder_hidden_states"]

    def outputs(self, output: Any) -> tuple[Tensor, Tensor | None]:
        """Image and prompt stream that a block returned."""
        p, x = output
        return x, p

    def text_rotary(self, arguments: Mapping[str, Any], tokens: int) -> Rotary | None:
        """Rotary embedding of the prompt's tokens (token, head_dim), or None when text is not rotated."""
        return None

    def unrotated(self, block: Block, arguments: Mapping[str, Any]) -> dict[str, nn.Module]:
        """Modules whose outputs are the unrotated ``q_x k_x q_p k_p``, or ``q k`` of the joint sequence.

        Empty when the block rotates nothing: then they are what the attention call saw.
        """
        return {}

    def entry(self, model: nn.Module) -> nn.Module:
        """The module that takes text embeddings into the prompt stream."""
        raise NotImplementedError

    def embed(self, model: nn.Module, embeddings: Tensor) -> Tensor:
        """Concept embeddings (row, concept, text width) to ``c`` before block 0 (row, concept, width)."""
        return self.entry(model)(embeddings)

    def conditioner(self, model: nn.Module) -> nn.Module | None:
        """The module that makes ``temb``, called with the pooled text vector last; None when there is none."""
        return None

    def grid(self, model: nn.Module, arguments: Mapping[str, Any]) -> Grid:
        """Positions of the image tokens, read from one transformer call."""
        raise NotImplementedError

    def planned_grid(self, pipe: Any, height: int, width: int, frames: int) -> Grid:
        """Positions of the image tokens that a pipeline call of this size (pixels, frames) will have."""
        raise NotImplementedError

    def heads(self, model: Any) -> tuple[int, int]:
        """Number of attention heads and their dimension."""
        return model.config.num_attention_heads, model.config.attention_head_dim

    def prompt_tokens(self, t5_tokens: int) -> int:
        """Length of the prompt stream when T5 gives `t5_tokens`."""
        return t5_tokens

    def tokens(self, pipe: Any, prompt: str, length: int) -> tuple[list[str], list[bool]]:
        """Strings of the prompt stream's tokens, and which of them are padding."""
        tokenizer = getattr(pipe, self.t5[0])
        encoded = tokenizer(prompt, padding="max_length", max_length=length, truncation=True)
        strings = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
        return strings, [not mask for mask in encoded["attention_mask"]]

    def pooled_vectors(self, pipe: Any, words: Sequence[str]) -> Tensor:
        """Pooled text vectors (word, width) by the pipeline's own encoder."""
        raise NotImplementedError

    def prepare(
        self, pipe: Any, pixels: Sequence[Sequence[Image]], prompts: Sequence[str], seed: int, **text: Any
    ) -> EncodeInputs:
        """Latents of real images or videos and the transformer call that reads them; `text` goes to encode_prompt."""
        raise NotImplementedError

    def tiny(self, variant: str, batch: int) -> TinyModel:
        """A small random model for tests; `variants` lists what there is."""
        raise NotImplementedError

    def with_prompt(self, inputs: Mapping[str, Any], embeddings: Tensor) -> dict[str, Any]:
        """The same call on other text (row, token, text width), every token at the first one's position."""
        return {**inputs, "encoder_hidden_states": embeddings}

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        """A small random pipeline around `tiny`'s model, with the tokenizers and encoders of `parts`."""
        raise NotImplementedError


@dataclass(frozen=True)
class EncodeInputs:
    """A clean latent, noise for it, and how to call the transformer on their mixture.

    Attributes:
        latents: clean latents as the transformer takes them.
        noise: standard normal, of the same shape.
        call: transformer keyword arguments other than the latents and the timestep.
    """

    latents: Tensor
    noise: Tensor
    call: Mapping[str, Any]


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotary embedding on interleaved pairs of (row, token, head, head_dim), in float32.

    Example:
        >>> x = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
        >>> quarter = (torch.zeros(1, 2), torch.ones(1, 2))
        >>> rotate(x, quarter).flatten().tolist()
        [0.0, 1.0]
    """
    cos, sin = (part.to(x.device)[None, :, None, :] for part in rotary)
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def draw_noise(latents: Tensor, seed: int) -> Tensor:
    """Standard normal noise like `latents`, the same for every row, so that no result depends on batching."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(latents.shape[1:], generator=generator)
    return row.expand(latents.shape).to(latents)
