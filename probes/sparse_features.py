"""What a sparse autoencoder finds in an activation: the largest features of every token."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

import dit_probe as dp


class Dictionary(Protocol):
    """A sparse autoencoder, trained elsewhere; one that reads another activation than it writes has no `decode`."""

    def encode(self, activation: Tensor, /) -> Tensor:
        """(row, token, width) to (row, token, feature), zero where a feature is not active."""
        ...

    def decode(self, features: Tensor, /) -> Tensor:
        """(row, token, feature) to (row, token, width)."""
        ...


@dataclass(frozen=True)
class SparseFeatures(dp.Probe):
    """Encode an activation with a sparse autoencoder, and keep the `k` features of every token that are largest.

        f = encode(a)
        feature_<site>_value, feature_<site>_index = the k entries of f that are largest in magnitude, and which
        feature_<site>_error = mean over tokens of |a - decode(f)|^2
        feature_<site>_variance = mean over tokens of |a - mean over tokens of a|^2

    The share of variance that is explained is ``1 - error / variance``; of several samples, of the means of both.
    Heads are merged, as the output projection reads them. The index of a rank is -1 where fewer features are active.
    `dit_probe.maps.features` shows where a feature is.

    Attributes:
        dictionary: a `Dictionary`, such as a module with these methods; a pair (encode, decode) of functions; or, of
            sites that have one each, layer to either, which then says the layers. What a module is given is on its
            device and in its precision.
        site: the activation, of image or prompt: ``x p q_x k_x v_x o_x q_p k_p v_p o_p``.
        k: features a token.

    Raises:
        ProbeError: a dictionary that cannot encode, or a site of the concept stream.

    Example:
        >>> class Signs(nn.Module):
        ...     def encode(self, a):
        ...         return torch.cat([a, -a], -1).relu()
        ...     def decode(self, features):
        ...         positive, negative = features.chunk(2, -1)
        ...         return positive - negative
        >>> from dit_probe.testing import tiny_pipeline
        >>> pipe, probe = tiny_pipeline("flux"), SparseFeatures(dictionary=Signs(), k=4, layers=[1])
        >>> with dp.trace(pipe, probe, edits=[probe.substitution()], progress=False) as run:
        ...     image = pipe("a sun in the sky", height=16, width=16, num_inference_steps=2).images[0]
        >>> dict(run.dataset.feature_x_value.sizes), float(run.dataset.feature_x_error.max())
        ({'sample': 1, 'step': 2, 'layer': 1, 'image_token': 16, 'rank': 4}, 0.0)
    """

    dictionary: Any = field(default=None, repr=False, kw_only=True)
    site: str = field(default="x", kw_only=True)
    k: int = field(default=32, kw_only=True)

    # Of an edit that was made and not yet observed, by branch: what it put in, and the features that this is made of.
    _made: ClassVar[dict[str, tuple[Tensor, dict[str, Tensor]]]]

    def __post_init__(self) -> None:
        if isinstance(self.dictionary, Mapping):
            if self.layers is not None or not all(isinstance(key, int) and key >= 0 for key in self.dictionary):
                raise dp.errors.ProbeError("a dictionary a layer says the layers: give {8: …, 12: …} and no layers")
            object.__setattr__(self, "layers", tuple(self.dictionary))
        super().__post_init__()
        if dp.schema.stream(self.site) == "c":
            raise dp.errors.ProbeError(
                f"site={self.site!r}; give an activation of image or prompt, such as 'x' or 'o_x'"
            )
        every = self.dictionary.values() if isinstance(self.dictionary, Mapping) else [self.dictionary]
        decodes = None not in [_functions(one)[1] for one in every]
        token = dp.schema.TOKEN_DIM[dp.schema.stream(self.site)]
        dims = {"value": (token, "rank"), "index": (token, "rank")} | ({"error": (), "variance": ()} if decodes else {})
        observes = {f"feature_{self.site}_{part}": dim for part, dim in dims.items()}
        own = {"observes": observes, "needs": (self.site,), "sizes": {"rank": self.k}, "_made": {}}
        for name, value in own.items():
            object.__setattr__(self, name, value)

    def observe(self, block: dp.Observation, activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Features of one block; where their reconstruction was put in, those that it was made of."""
        activation = activations[self.site]
        put, found = self._made.pop(block.branch, (None, {}))
        if put is not None and torch.equal(put, activation):
            return found
        return self._read(activation, block.layer)[0]

    def substitution(self, branch: str = "cond") -> dp.Edit:
        """The edit that puts the reconstruction, decode(encode(a)), in the activation's place.

        Traced beside the probe, ``trace(pipe, probe, edits=[probe.substitution()])``, what is recorded is of the
        activation that was there, while other probes record what the model goes on with.

        Args:
            branch: of guidance, as for `dit_probe.Edit`.

        Raises:
            ProbeError: the dictionary cannot decode.
        """
        if f"feature_{self.site}_error" not in self.observes:
            raise dp.errors.ProbeError("a dictionary without decode has no reconstruction to put in")

        def function(activation: Tensor, point: Any) -> Tensor:
            found, put = self._read(activation, point.layer)
            self._made[point.branch] = put.detach(), found
            return put

        return dp.Edit(self.site, function, layers=self.layers, steps=self.steps, branch=branch)

    def _read(self, activation: Tensor, layer: int) -> tuple[dict[str, Tensor], Tensor]:
        """What is recorded of an activation, and its reconstruction (or itself, if there is none)."""
        one = self.dictionary[layer] if isinstance(self.dictionary, Mapping) else self.dictionary
        encode, decode = _functions(one)
        like = next(one.parameters(), None) if isinstance(one, nn.Module) else None
        a = activation.flatten(2) if like is None else activation.flatten(2).to(like)
        features = encode(a)
        if features.shape[:-1] != a.shape[:-1] or features.shape[-1] < self.k:
            raise dp.errors.ProbeError(
                f"encode made {tuple(features.shape)} of {self.site} {tuple(a.shape)}; expected (row, token, feature) "
                f"with at least k={self.k} features"
            )
        index = features.abs().topk(self.k).indices
        value = features.gather(-1, index)
        found = {"value": value, "index": index.masked_fill(value == 0, -1)}
        put = activation
        if decode is not None:
            back, plain = decode(features), a.float()
            for part, other in (("error", back), ("variance", plain.mean(1, keepdim=True))):
                found[part] = (plain - other).square().sum(-1).mean(-1)
            put = back.reshape(activation.shape).to(activation)
        return {f"feature_{self.site}_{part}": tensor.detach() for part, tensor in found.items()}, put


def _functions(dictionary: Any) -> tuple[Callable[..., Tensor], Callable[..., Tensor] | None]:
    """What encodes and what decodes, of a module or a pair."""
    pair: Any = tuple(getattr(dictionary, name, None) for name in ("encode", "decode"))
    pair = dictionary if isinstance(dictionary, tuple) else pair
    if not callable(pair[0]):
        raise dp.errors.ProbeError(
            f"dictionary={type(dictionary).__name__} cannot encode; give a module with encode and decode, or a pair of "
            "functions (encode, decode), or {layer: either}"
        )
    return pair
