"""Methods over images: what happens to each, and the report at the end."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import Any

import numpy as np
import xarray as xr
from tqdm import tqdm

from dit_probe import protocols
from dit_probe.datasets.samples import Dataset
from dit_probe.evaluation import results
from dit_probe.evaluation.results import Method
from dit_probe.protocols import EvaluationError, Protocol

_TWICE = "two samples are named {!r}, and numbers are found by name; give each a name of its own"
_NUMBERS = 2**22  # of maps at the mask's size, scored at a time: those of all methods would be gigabytes
_SECONDS = 3.0  # between writes of finished images: one costs about 50 ms, for every chunk is rewritten


class EvaluationWarning(UserWarning):
    """Some methods gave no map for some images."""


def evaluate(
    methods: Mapping[str, Method],
    dataset: Dataset,
    protocol: str | Protocol = "native",
    *,
    concepts: Sequence[str] | None = None,
    store: Any = None,
    resume: bool = True,
    progress: bool = True,
    limit: int | None = None,
) -> xr.Dataset:
    """Score every method on every image; the numbers of an image are `dit_probe.protocols.score`'s.

    Args:
        methods: name to callable, as `dit_probe.evaluation` says.
        dataset: of `dit_probe.datasets.segmentation`, or anything that has what `Dataset` lists.
        protocol: a name of `dit_probe.protocols.PROTOCOLS`, or a `Protocol`.
        concepts: words that methods are given beside the classes, instead of the protocol's background words.
        store: path, URL or Zarr store that numbers are written to, every few seconds and whenever the run ends, also by
            an error or Ctrl-C; None: memory.
        resume: continue what is in the store: images without a number are done, those where a method failed are tried
            once more, and methods that it does not have get rows of their own. Rows of methods that are not among
            `methods` stay as they are. False: start over.
        progress: show a bar.
        limit: the first so many images; a later run with the same store may go further.

    Returns:
        (method, image): a variable for each of `RANKING` and ``miou``; with (…, threshold) each of `THRESHOLDED`, and
        ``counts`` (…, threshold, count); ``intersection``, ``union`` (…, class); ``failed``, the reason why there is no
        number, or "". ``image`` has the names, ``target`` (image) the words that are in them. Attributes: ``dataset``
        (name, fingerprint, images), ``protocol`` (`concepts` are its background words), ``methods``, ``versions``, as
        JSON. xarray has its own ``sel(method=…)``: select with ``found.sel({"method": "noise"})``.

    Raises:
        EvaluationError: no methods or images, or two images of one name; a store of another data set or protocol, or
            of methods with the same names that say something else of themselves.

    Warns:
        EvaluationWarning: at the end, if methods raised, or gave maps with NaN or of other dims.

    Example:
        >>> from dit_probe.datasets.segmentation import PictureBook
        >>> from dit_probe.methods import constant, noise
        >>> found = evaluate({"constant": constant(), "noise": noise(0)}, PictureBook(3), progress=False)
        >>> dict(found.iou_macro.sizes), found.auroc.sel({"method": "constant"}).values.tolist()
        ({'method': 2, 'image': 3, 'threshold': 3}, [0.5, 0.5, 0.5])
    """
    protocol = with_words(protocol, concepts)
    total = len(dataset)
    count = total if limit is None else min(limit, total)
    check(methods, dataset, protocol, count)
    table = results.empty(methods, dataset, protocol)
    stored = None if store is None else results.opened(store, table, resume)
    done = table.scored[:, :count].all("method").values
    pending, last = list[int](), monotonic()
    with tqdm(total=count, initial=int(done.sum()), unit="image", disable=not progress) as bar:
        try:
            for at in np.flatnonzero(~done).tolist():
                score_image(methods, dataset, protocol, table, at)
                pending.append(at)
                if stored is not None and monotonic() - last > _SECONDS:
                    results.write(*stored, table, pending)
                    pending, last = [], monotonic()
                bar.update()
        finally:  # Ctrl-C, too, leaves all finished images in the store
            if stored is not None and pending:
                results.write(*stored, table, pending)
    found = table.isel(image=slice(0, count))
    found = found.assign_coords(image=found["name"].values).drop_vars(["name", "scored"])
    _report(found)
    return found


def with_words(protocol: str | Protocol, concepts: Sequence[str] | None) -> Protocol:
    """The protocol, with these words for the background."""
    found = protocols.find(protocol)
    if isinstance(concepts, str):
        raise EvaluationError(f"concepts={concepts!r} is a string; give a list of words, [{concepts!r}]")
    return found if concepts is None else replace(found, background=tuple(concepts))


def check(methods: Mapping[str, Method], dataset: Dataset, protocol: Protocol, count: int) -> None:
    """Refuse what cannot be evaluated."""
    if not methods or count < 1:
        raise EvaluationError(f"{len(methods)} methods, {count} of {len(dataset)} images: there is nothing to evaluate")
    if twice := [name for name, times in Counter(getattr(dataset, "names", ())).items() if times > 1]:
        raise EvaluationError(f"{dataset.name}: {_TWICE.format(twice[0])}")
    blind = [name for name, method in methods.items() if getattr(method, "class_agnostic", False)]
    if protocol.compete and blind:
        raise EvaluationError(
            f"{', '.join(blind)}: one map for all words, and protocol {protocol.name!r} asks which word is highest "
            "at a pixel. Leave class-agnostic methods out, or score their maps as a foreground: protocol='native'"
        )


def score_image(
    methods: Mapping[str, Method], dataset: Dataset, protocol: Protocol, table: xr.Dataset, at: int
) -> None:
    """Fill one image's row."""
    sample = dataset[at]
    if (table["name"].values == sample.name)[np.arange(len(table["name"])) != at].any():
        raise EvaluationError(f"{dataset.name}: {_TWICE.format(sample.name)}")
    words = protocols.words(protocol, sample, dataset.vocabulary, dataset.background)
    image, mask, _ = protocols.prepare(protocol, sample)
    table["name"].values[at], table["target"].values[at] = sample.name, ", ".join(sample.target)
    score = partial(protocols.score, protocol, sample=sample, vocabulary=dataset.vocabulary)
    groups: defaultdict[Any, dict[int, xr.DataArray]] = defaultdict(dict)
    for row, method in enumerate(methods.values()):
        if table.scored.values[row, at]:
            continue
        if not words:  # nothing to ask for: undefined, which is no failure
            table.scored.values[row, at] = True
            continue
        try:
            maps = _maps(method, image, words)
        except Exception as error:
            _fail(table, row, at, error)
            continue
        kind = maps.dims, maps.shape, maps.dtype
        groups[kind][row] = maps
        if (len(groups[kind]) + 1) * max(maps.size, len(words) * mask.size) > _NUMBERS:
            _fill(table, at, groups.pop(kind), score)
    for group in groups.values():
        _fill(table, at, group, score)


def _fill(
    table: xr.Dataset, at: int, group: Mapping[int, xr.DataArray], score: Callable[[xr.DataArray], xr.Dataset]
) -> None:
    """Score maps of one kind, of the methods in these rows, at once; if that fails, alone, to see whose fault it is."""
    rows, first = [*group], next(iter(group.values()))
    labels = {"concept": first["concept"]} if "concept" in first.dims else {}
    try:
        found = score(xr.DataArray(np.stack([maps.values for maps in group.values()]), labels, ("method", *first.dims)))
    except Exception as error:
        if len(rows) == 1:
            _fail(table, rows[0], at, error)
        else:
            for row, maps in group.items():
                _fill(table, at, {row: maps}, score)
        return
    for name, values in found.data_vars.items():
        table[name].values[rows, at] = values.transpose("method", *table[name].dims[2:]).values
    table.failed.values[rows, at], table.scored.values[rows, at] = "", True


def _fail(table: xr.Dataset, row: int, at: int, error: Exception) -> None:
    reason = next((line for line in str(error).splitlines() if line.strip()), "no message")
    table.failed.values[row, at] = f"{type(error).__name__}: {reason}"


def _maps(method: Method, image: np.ndarray, words: list[str]) -> xr.DataArray:
    """One image's maps, ([concept,] [frame,] y, x)."""
    maps = method([image], list(words))
    if not isinstance(maps, xr.DataArray) or maps.sizes.get("image") != 1 or "concept" not in maps.coords:
        found = dict(maps.sizes) if isinstance(maps, xr.DataArray) else type(maps).__name__
        raise EvaluationError(
            f"found {found}, expected a DataArray (image, concept, [frame,] y, x) of 1 image, labelled along concept"
        )
    if (named := maps.concept.values.tolist()) != words:
        raise EvaluationError(f"found maps of {named}, expected {words}: give one for every word, in this order")
    if not np.isfinite(maps).all():
        raise EvaluationError("found NaN or infinity in a map, expected numbers: see the precision of the model")
    one = maps.isel(image=0, drop=True)
    return one.isel(concept=0, drop=True) if getattr(method, "class_agnostic", False) else one


def _report(found: xr.Dataset) -> None:
    lines = []
    for row, name in enumerate(found.method.values):
        reasons = found.failed.values[row]
        if len(places := np.flatnonzero(reasons != "")):
            first = places[0]
            lines.append(
                f"{name}: {len(places)} of {len(reasons)}, first {found.image.values[first]}: {reasons[first]}"
            )
    if lines:
        text = "\n  ".join(lines)
        warnings.warn(f"images without a number, see 'failed':\n  {text}", EvaluationWarning, stacklevel=3)
