"""Concept embeddings are what the pipeline's own text encoder makes of a word that is its whole prompt."""

import contextlib

import pytest
import torch
from torch import nn
from tracing_cases import generate

from dit_probe import anatomy, testing
from dit_probe.anatomy import Anatomy
from dit_probe.anatomy.block import arguments_of
from dit_probe.concepts import embed_words

WORD, TWO_TOKENS = "sun", "red boat"
# One pipeline of each family: variants differ in their transformers.
CASES = dict(reversed(testing.pipeline_cases()))


@pytest.fixture(params=sorted(CASES.items()), ids="-".join)
def pipe(request, pipelines):
    return pipelines(*request.param)


@contextlib.contextmanager
def called(module):
    """Arguments of every call of a module while inside."""
    calls = []
    handle = module.register_forward_pre_hook(lambda module, *call: calls.append(call), with_kwargs=True)
    yield calls
    handle.remove()


def hidden_states(encoder, args, kwargs):
    """Every layer's hidden states, and the last's before the final norm too: (text, token, width) each."""
    before_norm = []
    layers = [layer for layers in encoder.modules() if isinstance(layers, nn.ModuleList) for layer in layers]
    handles = [layer.register_forward_hook(lambda module, args, output: before_norm.append(output)) for layer in layers]
    *earlier, last = encoder(*args, **{**kwargs, "output_hidden_states": True, "return_dict": True}).hidden_states
    for handle in handles:
        handle.remove()
    found = before_norm[-1]
    return [*earlier, found[0] if isinstance(found, tuple) else found, last]


def as_prompt(pipe, text):
    """A text as the pipeline's prompt: hidden states of its own tokens, and what the transformer is given of it all.

    Returns:
        (layer, token, width), by tokenizer and encoder called by hand, and (token, text width).
    """
    family = anatomy.find(pipe)
    tokenizer, encoder = (getattr(pipe, name) for name in family.encoder)
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    # GLM-Image encodes nothing but what stands in quotation marks.
    for prompt in (text, f'"{text}"'):
        with called(encoder) as encoded, called(pipe.transformer) as given:
            generate(pipe, prompt, steps=1)
        for call in encoded:
            ids = arguments_of(encoder, *call)["input_ids"].tolist()
            places = [
                (row, at) for row, line in enumerate(ids) for at in range(len(line)) if own == line[at:][: len(own)]
            ]
            if places:
                ((row, start),) = places
                states = [layer[row, start : start + len(own)] for layer in hidden_states(encoder, *call)]
                prompts = [family.prompt_embeddings(arguments_of(pipe.transformer, *call)) for call in given]
                return torch.stack(states), torch.cat([rows.flatten(0, 1) for rows in prompts])
    raise AssertionError(f"the text encoder was not given {text!r}")


@torch.no_grad()
def test_embeddings_are_hidden_states_of_the_words_own_tokens(pipe):
    family = anatomy.find(pipe)
    states, given = as_prompt(pipe, TWO_TOKENS)
    limit = family.tiny_call.get("max_sequence_length") or family.text_limit(pipe)
    first, mean = (
        embed_words(family, pipe, [WORD, TWO_TOKENS], [None], embed=embed, limit=limit)[0, 1]
        for embed in ("first_token", "mean_tokens")
    )
    # Some models read several layers side by side.
    parts = first.unflatten(-1, (-1, states.shape[-1]))
    layers = (parts[:, None] - states[:, 0]).abs().amax(-1).argmin(-1)
    torch.testing.assert_close(first, states[layers, 0].flatten(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mean, states[layers].mean(1).flatten(), atol=1e-5, rtol=1e-5)
    # They are the layers that the transformer reads of prompts.
    assert (given - first).abs().amax(-1).min() < 1e-5
    if type(family).encode_text is Anatomy.encode_text:
        assert layers.tolist() == [len(states) - 1]
