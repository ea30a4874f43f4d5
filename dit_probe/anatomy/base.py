"""What a family file says about its models: where the blocks are and how the text stream runs through one."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from dit_probe.anatomy.block import Block, Grid, Modulation, Places, Rotary, TextSide
from dit_probe.attention import AttentionCall, joint_call
from dit_probe.errors import ModelError

if TYPE_CHECKING:
    from PIL.Image import Image


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

    @property
    def words(self) -> tuple[str, ...]:
        """Words that prompts are made of, for tokenizers of whole words."""
        ...

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
        joint, single: attributes of the model that hold its joint and its single-stream blocks.
        attention: attribute of a block that holds its attention module.
        text: how the text stream runs through a joint block.
        single_text: how text tokens run through a single-stream block.
        text_first: whether text precedes the image in the joint attention sequence.
        returns_text_first: whether a block returns (prompt, image), not (image, prompt).
        pooled: whether a pooled text vector modulates the blocks.
        pooled_argument: which positional argument of the `conditioner` it is.
        encoder: pipeline attributes that hold the tokenizer and text encoder that concepts go through.
        timestep_scale: factor from the transformer's timestep argument to 0..1000.
        fast: whether the text side is described; if not, concepts are found by running the model itself on them.
        no_concepts: why there is no concept stream in these models, though all else of them is recorded.
        heads_first: whether the qk-norms of `unrotated` see (row, head, token, head_dim).
        unlabelled_calls: branches of the transformer calls of one step, in order, where the pipeline guides by two
            calls that it does not name (`cache_context`).
        halves: branches of the two halves of a call whose rows guidance doubles, in order.
        variants: names of the configurations that `tiny` offers.
        pipeline_variants: those that `tiny_pipeline` offers.
        tiny_call: arguments of a small call of `tiny_pipeline`'s pipeline, sizes above all.
        guided_call: arguments that turn classifier-free guidance on, where it is not on by itself.
    """

    family: str
    classes: tuple[str, ...]
    joint: str = "transformer_blocks"
    single: str = "single_transformer_blocks"
    attention: str = "attn"
    text: TextSide
    single_text: TextSide
    text_first: bool
    returns_text_first: bool = True
    pooled: bool = False
    pooled_argument: int = -1
    encoder: tuple[str, str] = ("tokenizer", "text_encoder")
    timestep_scale: float = 1.0
    heads_first: bool = False
    fast: bool = True
    no_concepts: str = ""
    unlabelled_calls: tuple[str, ...] = ("cond",)
    halves: tuple[str, str] = ("uncond", "cond")
    variants: tuple[str, ...] = ()
    pipeline_variants: tuple[str, ...] = ()
    tiny_call: Mapping[str, Any] = {}
    guided_call: Mapping[str, Any] = {}

    # --- where things are

    def blocks(self, model: nn.Module) -> tuple[Block, ...]:
        """Every block in running order, joint before single."""
        found: list[Block] = []
        for kind, name in (("joint", self.joint), ("single", self.single)):
            for index, module in enumerate(getattr(model, name, None) or ()):
                attention = getattr(module, self.attention)
                side = self.text if kind == "joint" else self.single_text
                output = not getattr(module, "context_pre_only", False)
                found.append(Block(len(found), kind, f"{name}.{index}", module, attention, side, output))
        return tuple(found)

    def refuse(self, model: nn.Module) -> str | None:
        """Why this very model cannot be traced truthfully, or None."""
        return None

    def heads(self, model: Any) -> tuple[int, int]:
        """Number of attention heads and their dimension."""
        return model.config.num_attention_heads, model.config.attention_head_dim

    def text_width(self, model: Any) -> int:
        """Width of the prompt stream; Mochi's is not the image stream's."""
        return math.prod(self.heads(model))

    def unrotated(self, block: Block, arguments: Mapping[str, Any]) -> dict[str, nn.Module]:
        """Modules whose outputs are the unrotated ``q_x k_x q_p k_p``, or ``q k`` of the joint sequence.

        Empty when the block rotates nothing: then they are what the attention call saw. What a stream holds beside the
        image's or the prompt's tokens is cut off.
        """
        return {}

    # --- one call of the transformer; `arguments` are its own, by name

    def aside(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the call is neither branch of a step: skip-layer guidance, or one that only fills a cache."""
        return arguments.get("skip_layers") is not None

    def rows(self, arguments: Mapping[str, Any]) -> int:
        """Number of rows, guidance included."""
        return len(arguments["hidden_states"])

    def time(self, arguments: Mapping[str, Any]) -> float:
        """The timestep, 0..1000."""
        return float(arguments["timestep"].flatten()[0]) * self.timestep_scale

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        """Positions of the image tokens."""
        raise NotImplementedError

    def prompt_embeddings(self, arguments: Mapping[str, Any]) -> Tensor:
        """The prompt as it comes from the text encoder, (row, token, text width); concepts come in the same form."""
        return arguments["encoder_hidden_states"]

    def prompt_tokens(self, model: Any, arguments: Mapping[str, Any]) -> int:
        """Length of the prompt stream."""
        return self.prompt_embeddings(arguments).shape[1]

    def places(self, model: Any, arguments: Mapping[str, Any]) -> Places:
        """Where image and prompt stand in the joint sequence."""
        image, prompt = len(self.grid(model, arguments)), self.prompt_tokens(model, arguments)
        return Places.of(image, prompt, text_first=self.text_first)

    def entry(self, model: Any) -> nn.Module:
        """The last module that text passes before the blocks; when it has run, concepts can be embedded."""
        raise NotImplementedError

    def embed(self, model: Any, embeddings: Tensor, arguments: Mapping[str, Any], rows: slice) -> Tensor:
        """Concept embeddings (row, concept, text width) to ``c`` before block 0 (row, concept, width).

        Every concept enters as if it were the whole prompt: none sees another before the first block. `rows` are the
        rows of the call that the embeddings belong to.
        """
        return self.entry(model)(embeddings)

    def feed(self, model: Any, block: Block, c: Tensor, embeddings: Tensor) -> Tensor:
        """``c`` as a block takes it in, where the model mixes text into the stream again before every block."""
        return c

    def conditioner(self, model: Any) -> nn.Module | None:
        """The module that makes the modulation input from the pooled text vector; None when there is none."""
        return None

    # --- one call of a block; `arguments` are its own, by name

    def streams(self, block: Block, arguments: Mapping[str, Any], places: Places) -> tuple[Tensor, Tensor]:
        """Image and prompt stream at the input of a block."""
        x, p = arguments["hidden_states"], arguments.get("encoder_hidden_states")
        return places.split(x) if p is None else (x, p)

    def outputs(self, block: Block, output: Any, places: Places) -> tuple[Tensor, Tensor | None]:
        """Image and prompt stream that a block returned."""
        if isinstance(output, Tensor):
            return places.split(output)
        return (output[1], output[0]) if self.returns_text_first else (output[0], output[1])

    def joint_call(self, calls: Sequence[AttentionCall], arguments: Mapping[str, Any], where: str, tokens: int) -> Any:
        """The block's joint attention, of the attention calls that were seen in it."""
        return joint_call(calls, tokens, where)

    def modulation(self, block: Block, arguments: Mapping[str, Any]) -> Modulation:
        """What modulates the text side: tensors whose first dim is the row (or 1 for all rows)."""
        return arguments["temb"]

    def text_rotary(self, block: Block, arguments: Mapping[str, Any], places: Places, at: slice) -> Rotary | None:
        """Rotary embedding of some of the prompt's tokens (`at`, in the prompt), or None when text is not rotated."""
        return None

    # --- pipelines

    def text_limit(self, pipe: Any) -> int:
        """How many tokens the pipeline gives a prompt unless told otherwise."""
        return inspect.signature(type(pipe).__call__).parameters["max_sequence_length"].default

    def encode_text(self, pipe: Any, texts: Sequence[str], limit: int) -> Tensor:
        """Texts as the pipeline encodes prompts: (text, token, text width), the first token the text's own first."""
        return pipe._get_t5_prompt_embeds(list(texts), max_sequence_length=limit, device=pipe._execution_device)

    def tokens(self, pipe: Any, prompt: str, length: int) -> tuple[list[str], list[bool]]:
        """Strings of the prompt stream's tokens, and which of them are padding."""
        tokenizer = getattr(pipe, self.encoder[0])
        encoded = tokenizer(prompt, padding="max_length", max_length=length, truncation=True)
        strings = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
        return strings, [not mask for mask in encoded["attention_mask"]]

    def pooled_vectors(self, pipe: Any, words: Sequence[str]) -> Tensor:
        """Pooled text vectors (word, width) by the pipeline's own encoder."""
        raise NotImplementedError

    def planned_grid(self, pipe: Any, height: int, width: int, frames: int) -> Grid:
        """Positions of the image tokens that a pipeline call of this size (pixels, frames) will have."""
        token = pipe.vae_scale_factor * 2
        return Grid.regular(height // token, width // token)

    def planned_prompt_tokens(self, pipe: Any, limit: int) -> int:
        """Length of the prompt stream when the text encoder gives `limit` tokens."""
        return limit

    def prepare(
        self, pipe: Any, pixels: Sequence[Sequence[Image]], prompts: Sequence[str], seed: int, **text: Any
    ) -> EncodeInputs:
        """Latents of real images or videos and the transformer call that reads them; `text` goes to encode_prompt."""
        raise ModelError(
            f"real images cannot be encoded for {self.family} models yet. Trace a generation, or call the transformer "
            "on latents of your own inside trace(pipe.transformer, ...)"
        )

    # --- tests

    def tiny(self, variant: str, batch: int) -> TinyModel:
        """A small random model for tests; `variants` lists what there is."""
        raise NotImplementedError

    def with_prompt(self, inputs: Mapping[str, Any], embeddings: Tensor) -> dict[str, Any]:
        """The same transformer call on other text (row, token, text width), every token at the first one's position."""
        return {**inputs, "encoder_hidden_states": embeddings}

    def with_streams(
        self, block: Block, arguments: Mapping[str, Any], x: Tensor, p: Tensor, places: Places
    ) -> dict[str, Any]:
        """The same block call on other streams."""
        if arguments.get("encoder_hidden_states") is not None:
            return {**arguments, "hidden_states": x, "encoder_hidden_states": p}
        joint = arguments["hidden_states"].clone()
        joint[:, places.image], joint[:, places.prompt] = x, p
        return {**arguments, "hidden_states": joint}

    def clamped_concepts(self, model: Any) -> int:
        """How many concepts the model takes as its prompt; fewer than a prompt's tokens where it lets us choose."""
        return 3

    def clamped_places(self, model: Any, arguments: Mapping[str, Any]) -> Places:
        """`places` in the model's run on concepts, of whose text stream `with_streams` has left nothing else."""
        image, prompt = len(self.grid(model, arguments)), self.places(model, arguments).prompt_tokens
        return Places.of(image, prompt, text_first=self.text_first)

    def clamp(self, block: Block, arguments: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
        """A block call of the model's run on concepts, put right for the comparison with the concept stream.

        Every text token at the first one's position, where `with_prompt` cannot say so; and, of the call that was
        made `before` on the prompt, whatever the prompt would otherwise reach the concepts through.
        """
        return dict(arguments)

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        """A small random pipeline, with the tokenizers and encoders of `parts`; see `pipeline_variants`."""
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


def draw_noise(latents: Tensor, seed: int) -> Tensor:
    """Standard normal noise like `latents`, the same for every row, so that no result depends on batching."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(latents.shape[1:], generator=generator)
    return row.expand(latents.shape).to(latents)
