"""Protocols: what happens to picture, map and mask between a method and a number. Data, recorded with every result.

| | ``chefer`` | ``paper`` | ``paper_multiclass`` | ``native`` |
|---|---|---|---|---|
| picture that a method gets | 224 x 224, bilinear | 512 x 512, bicubic | 512 x 512, nearest | as it is |
| mask that is scored on | 224 x 224, nearest | 224 x 224, nearest | 64 x 64, nearest | as it is |
| map | enlarged bilinearly | enlarged, nearest | nearest: argmax is that of its own grid | bilinear to the mask |
| threshold | enlarged map's mean | mean on the map's own grid | likewise | enlarged map's mean, Otsu, 0.5 |
| void pixels | have a say in the threshold, count nowhere | likewise | likewise | unseen |

``chefer`` is the order of Chefer et al. (2021) and Gandelsman et al.; ``paper`` that of ConceptAttention's runners,
whose VAE enlarges the 512 pixels once more, and ``paper_multiclass`` of Table 3: of ``intersection`` I and ``union`` U,
summed over the pictures, mIoU is the mean of I / U over classes, Acc ``2 sum I / (sum I + sum U)``. Void pixels that a
class was predicted on are in the runners' U, and not in this one. ``native`` compares methods of different grids on the
annotated pixels. All of them give a method the words that are in the picture (``classes="present"``, an oracle) and the
background words of the data set; change a field with `dataclasses.replace`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy as np
import xarray as xr

from dit_probe import metrics, picture_metrics
from dit_probe.datasets.samples import Sample, masks, valid
from dit_probe.errors import DitProbeError, MetricError
from dit_probe.picture_metrics import BACKGROUND as BACKGROUND
from dit_probe.picture_metrics import RANKING as RANKING
from dit_probe.picture_metrics import THRESHOLDED as THRESHOLDED
from dit_probe.rows import Threshold

METRICS = (*RANKING, *THRESHOLDED, "miou")


class EvaluationError(DitProbeError):
    """A protocol, its methods, their maps or the store of their numbers do not fit together."""


@dataclass(frozen=True)
class Protocol:
    """What happens to picture, map and mask, and in which order.

    Attributes:
        name: of the protocol.
        order: ``upsample, threshold``: the map is brought to the mask's size, min-maxed and compared there;
            ``threshold, upsample``: it is min-maxed and compared on its own grid, and what came out is enlarged.
        thresholds: rules as for `dit_probe.metrics.score`: ``mean`` | ``otsu`` | a number in 0..1, each strict (>).
        map_interpolation: of maps to the mask's size.
        image_size: side in pixels that pictures are stretched to before a method sees them; None: as they are.
        image_interpolation: of pictures.
        mask_size: side in pixels that masks are stretched to, and scored at; None: as they are.
        mask_interpolation: of masks; labels have no values between them.
        void: ``unseen``: outside of minimum, maximum and threshold, too; ``uncounted``: there, but not counted.
        background: words for what is no class, given to methods beside the classes; None: those of the data set.
        classes: whose words a method is given: those ``present`` in the picture, or ``all20``, the whole vocabulary.
        absent: how many words that are not in the picture a method is given beside them, for ``auroc_absent``. Like
            all words, they change the maps of methods that normalise over words, and they are classes to the argmax.
        compete: is it asked which word is highest at a pixel? A method with one map for all words is then refused.

    Raises:
        EvaluationError: a field has a value that does not exist, or two contradict each other.

    Example:
        >>> from dataclasses import replace
        >>> replace(PROTOCOLS["paper"], background=("sky", "grass")).order
        'threshold, upsample'
    """

    name: str
    order: Literal["upsample, threshold", "threshold, upsample"] = "upsample, threshold"
    thresholds: tuple[Threshold, ...] = ("mean",)
    map_interpolation: Literal["nearest", "bilinear"] = "bilinear"
    image_size: int | None = None
    image_interpolation: Literal["nearest", "bilinear", "bicubic"] = "bicubic"
    mask_size: int | None = None
    mask_interpolation: Literal["nearest"] = "nearest"
    void: Literal["unseen", "uncounted"] = "unseen"
    background: tuple[str, ...] | None = None
    classes: Literal["present", "all20"] = "present"
    absent: int = 0
    compete: bool = False

    def __post_init__(self) -> None:
        choices = {
            "order": ("upsample, threshold", "threshold, upsample"),
            "map_interpolation": ("nearest", "bilinear"),
            "image_interpolation": ("nearest", "bilinear", "bicubic"),
            "mask_interpolation": ("nearest",),
            "void": ("unseen", "uncounted"),
            "classes": ("present", "all20"),
        }
        for field, allowed in choices.items():
            if (found := getattr(self, field)) not in allowed:
                wanted = ", ".join(map(repr, allowed))
                raise EvaluationError(f"protocol {self.name!r}: {field}={found!r}; choose one of {wanted}")
        early = self.order == "threshold, upsample"
        numbers = [t for t in self.thresholds if t not in ("mean", "otsu")]
        wrong = [t for t in numbers if isinstance(t, str) or not 0 <= t <= 1]
        if wrong or not self.thresholds:
            raise EvaluationError(
                f"protocol {self.name!r}: thresholds={self.thresholds!r}; give one or more of 'mean', 'otsu' and "
                "numbers in 0..1"
            )
        if early and (self.map_interpolation, self.void) != ("nearest", "uncounted"):
            raise EvaluationError(
                f"protocol {self.name!r}: order={self.order!r} with map_interpolation={self.map_interpolation!r} and "
                f"void={self.void!r}; a mask is enlarged by 'nearest', and tokens that are partly void are 'uncounted'"
            )
        if isinstance(self.background, str) or any(size is not None and size < 1 for size in self._sizes):
            raise EvaluationError(
                f"protocol {self.name!r}: background={self.background!r}, image_size={self.image_size}, "
                f"mask_size={self.mask_size}; give a tuple of words, and sides of 1 pixel or more"
            )
        if self.absent < 0:
            raise EvaluationError(f"protocol {self.name!r}: absent={self.absent}; give a number of words, 0 or more")

    @property
    def _sizes(self) -> tuple[int | None, int | None]:
        return self.image_size, self.mask_size

    @property
    def labels(self) -> list[str]:
        """The thresholds as labels of the dim ``threshold``."""
        return [str(threshold) for threshold in self.thresholds]


PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            Protocol("chefer", image_size=224, image_interpolation="bilinear", mask_size=224, void="uncounted"),
            Protocol(
                "paper", "threshold, upsample", ("mean",), "nearest", image_size=512, mask_size=224, void="uncounted"
            ),
            Protocol("native", thresholds=("mean", "otsu", 0.5)),
            Protocol(
                "paper_multiclass",
                "threshold, upsample",
                map_interpolation="nearest",
                image_size=512,
                image_interpolation="nearest",
                mask_size=64,
                void="uncounted",
                compete=True,
            ),
        )
    }
)


def find(protocol: str | Protocol) -> Protocol:
    """A protocol by its name.

    Raises:
        EvaluationError: there is none of that name.
    """
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise EvaluationError(f"no protocol {protocol!r}: use {', '.join(PROTOCOLS)}, or a Protocol of your own")
    return PROTOCOLS[protocol]


def words(
    protocol: str | Protocol, sample: Sample, vocabulary: Sequence[str] = (), background: Sequence[str] = ()
) -> list[str]:
    """The words that a method is given for a picture: classes, absent ones, then background words, each once.

    Args:
        protocol: whose `classes`, `absent` and `background`.
        sample: the picture. Its name, and nothing else, decides which absent words come first.
        vocabulary: class words of its data set, in whose order ``all20`` gives them. Absent are those that are not in
            `sample.target`; where the annotation looked for one object only, as in ImageNet-Segmentation, a few of
            them may be there after all.
        background: words of its data set, for a protocol that has none of its own.

    Example:
        >>> from dit_probe.datasets.segmentation import PictureBook
        >>> words("native", PictureBook(1, objects=["sun", "boat"])[0], background=["sky", "grass"])
        ['sun', 'boat', 'sky', 'grass']
    """
    protocol = find(protocol)
    background = background if protocol.background is None else protocol.background
    if protocol.classes == "all20":
        return list(dict.fromkeys([*vocabulary, *sample.target, *background]))

    def rank(word: str) -> bytes:
        return hashlib.sha256(f"{sample.name}\n{word}".encode()).digest()

    absent = sorted({*vocabulary} - {*sample.target, *background}, key=rank)[: protocol.absent]
    return list(dict.fromkeys([*sample.target, *absent, *background]))


def prepare(protocol: str | Protocol, sample: Sample) -> tuple[np.ndarray, xr.DataArray, xr.DataArray]:
    """The picture as a method gets it, the mask as it is scored on, and which of its pixels count.

    Args:
        protocol: which sizes and interpolations; proportions are not kept, as in the published code.
        sample: the picture or video, untouched.

    Returns:
        Image ([frame,] y, x, 3) uint8; labels ([frame,] y, x) int16; valid ([frame,] y, x) bool, False on void.

    Raises:
        EvaluationError: no protocol of that name.

    Example:
        >>> from dit_probe.datasets.segmentation import PictureBook
        >>> image, mask, valid = prepare("paper", PictureBook(1)[0])
        >>> image.shape, dict(mask.sizes), bool(valid.all())
        ((512, 512, 3), {'y': 224, 'x': 224}, True)
    """
    protocol = find(protocol)
    image = sample.image
    if protocol.image_size is not None:
        image = resize_image(image, protocol.image_size, protocol.image_interpolation)
    return image, *_annotation(protocol, sample)


def _annotation(protocol: Protocol, sample: Sample) -> tuple[xr.DataArray, xr.DataArray]:
    """Labels and which of them count, at the size that is scored."""
    dims, size = ("frame", "y", "x")[3 - sample.mask.ndim :], protocol.mask_size
    mask, counted = (xr.DataArray(array, dims=dims) for array in (sample.mask, valid(sample)))
    return (mask, counted) if size is None else (metrics.resize(mask, size, size), metrics.resize(counted, size, size))


def resize_image(image: np.ndarray, size: int, interpolation: str = "bicubic") -> np.ndarray:
    """Stretch a picture or all frames of a video, ([frame,] y, x, 3) uint8, to size x size pixels, by Pillow.

    Example:
        >>> resize_image(np.zeros((6, 8, 3), np.uint8), 4).shape
        (4, 4, 3)
    """
    from PIL import Image

    if image.ndim == 4:
        return np.stack([resize_image(frame, size, interpolation) for frame in image])
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling[interpolation.upper()]))


def score(
    protocol: str | Protocol, maps: xr.DataArray, sample: Sample, *, vocabulary: Sequence[str] | None = None
) -> xr.Dataset:
    """All numbers of one picture; `dit_probe.picture_metrics` has a table of them.

    Metrics of the foreground are those of `dit_probe.metrics.score`: each word of the picture, its map against its own
    pixels, and the mean over the words for which it is defined. Per class, each pixel goes to the concept with the
    highest map (shared among several highest), words outside of the vocabulary merged to `BACKGROUND`:

        intersection = sum of the predicted share over the class's pixels
        union        = predicted + annotated - intersection

    so that any mean IoU, over the picture or pooled over many, follows from their sums.

    Args:
        protocol: order of steps, thresholds, sizes, void.
        maps: ([method,] [concept,] [frame,] y, x) with the words as coordinate ``concept``, in any units. Without
            that dim the map is class-agnostic, one for all words, and nothing per class is defined. Several methods
            at once take less time than one after another, and memory for all of them.
        sample: the picture, untouched.
        vocabulary: class words; None: those that the annotation has a label for. Those that are not in the picture
            and have a map are the words of ``auroc_absent``.

    Returns:
        `RANKING` () and ``miou``, the mean of intersection / union over classes that have a union; `THRESHOLDED`
        (threshold); ``counts`` (threshold, count), pixels summed over the words; ``intersection``, ``union`` (class).
        All have the dim ``method`` if the maps have it. Undefined is NaN.

    Raises:
        EvaluationError: other dims, or a word of the picture without a map.
        MetricError: NaN or infinity in a map, or no numbers.

    Example:
        >>> from dit_probe.datasets.segmentation import PictureBook, masks
        >>> sample = PictureBook(1, objects=["sun", "boat"])[0]
        >>> perfect = xr.DataArray(masks(sample, sample.target).astype(float), dims=("concept", "y", "x"),
        ...                        coords={"concept": list(sample.target)})
        >>> found = score("native", perfect, sample)
        >>> float(found.auroc), found.iou_macro.values.tolist()
        (1.0, [1.0, 1.0, 1.0])
        >>> score("native", xr.concat([perfect, 1 - perfect], "method"), sample).auroc.values.tolist()
        [1.0, 0.0]
    """
    protocol = find(protocol)
    vocabulary = tuple(w for w, label in sample.labels.items() if label > 0) if vocabulary is None else vocabulary
    vocabulary = [word for word in vocabulary if word != BACKGROUND]
    labels, counted = _annotation(protocol, sample)
    _check(maps, sample, labels)
    tokens = _tokens(protocol, maps, counted)
    stretched = replace(sample, mask=labels.values)
    decided = [word for word in vocabulary if word in sample.labels]
    truth, annotated = (dict(zip(names, masks(stretched, names), strict=True)) for names in (sample.target, decided))
    absent = [word for word in vocabulary if word not in sample.target]
    numbers = {
        **picture_metrics.ranking(tokens, truth, absent),
        **picture_metrics.thresholded(protocol, tokens, truth),
        **picture_metrics.by_class(tokens, annotated, vocabulary),
    }
    found = xr.Dataset(
        numbers, {"threshold": protocol.labels, "count": list(metrics.COUNTS), "class": [BACKGROUND, *vocabulary]}
    )
    if "method" not in maps.dims:
        return found.isel(method=0)
    return found.assign_coords({name: coord for name, coord in maps.coords.items() if coord.dims == ("method",)})


def _tokens(protocol: Protocol, maps: xr.DataArray, counted: xr.DataArray) -> picture_metrics.Tokens:
    """Maps that are enlarged bilinearly have a token for each pixel; the others stay on their grid."""
    size = counted.sizes["y"], counted.sizes["x"]
    if protocol.map_interpolation == "bilinear":
        maps = metrics.resize(maps, *size, "bilinear")
    place = [dim for dim in counted.dims if dim in maps.dims]
    grid = [maps.sizes[dim] for dim in place]
    number = xr.DataArray(np.arange(math.prod(grid)).reshape(grid), dims=place)
    at = np.broadcast_to(metrics.resize(number, *size), counted.shape)
    lead = [dim for dim in ("method", "concept") if dim in maps.dims]
    values = maps.transpose(*lead, *place).values.astype(float)
    methods, concepts = (maps.sizes.get(dim, 1) for dim in ("method", "concept"))
    names = maps["concept"].values.tolist() if "concept" in lead else None
    return picture_metrics.Tokens(values.reshape(methods, concepts, -1), names, at, counted.values)


def _check(maps: xr.DataArray, sample: Sample, labels: xr.DataArray) -> None:
    """Refuse maps that are not of this picture."""
    allowed = {"concept", *map(str, labels.dims)}
    sizes = {dim: size for dim, size in maps.sizes.items() if dim != "method"}
    if sizes.keys() - allowed or {"y", "x"} - sizes.keys():
        raise EvaluationError(
            f"{sample.name}: a map has the dims {sizes}, expected y and x and, beside them, at "
            f"most {', '.join(sorted(allowed - {'y', 'x'}))}. Take one picture's map; average or select all else"
        )
    if "frame" in maps.dims and maps.sizes["frame"] != labels.sizes["frame"]:
        raise EvaluationError(
            f"{sample.name}: a map has {maps.sizes['frame']} frames, its mask {labels.sizes['frame']}. Give each frame "
            "of the video the map of the latent frame that shows it"
        )
    named = maps.coords["concept"].values.tolist() if "concept" in maps.coords else []
    if "concept" in maps.dims and (missing := [word for word in sample.target if word not in named]):
        raise EvaluationError(
            f"{sample.name}: no map of {', '.join(map(repr, missing))}, which the picture shows; there are "
            f"{', '.join(map(str, named)) or 'maps without labels'}. Label the dim concept with the words"
        )
    if maps.dtype.kind not in "biuf":
        raise MetricError(f"{sample.name}: a map is {maps.dtype}: give numbers")
    if not np.isfinite(maps).all():
        raise MetricError(f"{sample.name}: a map holds NaN or infinity: see its layer")
