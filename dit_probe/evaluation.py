"""Run methods over a data set and keep a number for every image: resumable, with what failed and why.

A method is any callable ``(images, concepts) -> maps``: a list of ([frame,] y, x, 3) uint8 arrays and a list of words
in, an `xarray.DataArray` (image, concept, [frame,] y, x) with the words as coordinate ``concept`` out, of any grid and
units. It may say ``class_agnostic = True`` (the same map for every word: it is scored as a foreground, not among
classes) and have ``describe()``, a string with all that decides its maps: a run is continued only with methods that say
the same.

`noise`, `constant`, `centre_gaussian`, `image_saliency` look at nothing or at no word, a `random_twin` has not learned
anything: without their rows a table cannot be read. They stand in `dit_probe.methods`, as `concept_attention` does.
"""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import xarray as xr
import zarr
from tqdm import tqdm

from dit_probe import protocols
from dit_probe.datasets.samples import Dataset
from dit_probe.methods import centre_gaussian as centre_gaussian
from dit_probe.methods import concept_attention as concept_attention
from dit_probe.methods import constant as constant
from dit_probe.methods import image_saliency as image_saliency
from dit_probe.methods import noise as noise
from dit_probe.methods import random_twin as random_twin
from dit_probe.metrics import COUNTS
from dit_probe.protocols import RANKING, THRESHOLDED, EvaluationError, Protocol
from dit_probe.statistics import bootstrap
from dit_probe.store import location

Method = Callable[[list[np.ndarray], list[str]], xr.DataArray]

FORMAT = "dit-probe-evaluation"
_IMAGES_PER_CHUNK = 64  # a file for every number of every image would be 60,000 of them
_IN_STORE = {"name": "image"}  # a label of its dim, where xarray cannot write into labels
_LIBRARIES = ("dit-probe", "numpy", "xarray", "torch", "diffusers", "transformers")


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
        methods: name to callable, as this module says.
        dataset: of `dit_probe.datasets.segmentation`, or anything that has what `Dataset` lists.
        protocol: a name of `dit_probe.protocols.PROTOCOLS`, or a `Protocol`.
        concepts: words that methods are given beside the classes, instead of the protocol's background words.
        store: path, URL or Zarr store that numbers are written to, an image at a time; None: memory.
        resume: continue what is in the store: images without a number are done, those where a method failed are tried
            once more. False: start over.
        progress: show a bar.
        limit: the first so many images; a later run with the same store may go further.

    Returns:
        (method, image): a variable for each of `RANKING` and ``miou``; with (…, threshold) each of `THRESHOLDED`, and
        ``counts`` (…, threshold, count); ``intersection``, ``union`` (…, class); ``failed``, the reason why there is no
        number, or "". ``image`` has the names, ``target`` (image) the words that are in them. Attributes: ``dataset``
        (name, fingerprint, images), ``protocol`` (`concepts` are its background words), ``methods``, ``versions``, as
        JSON. xarray has its own ``sel(method=…)``: select with ``found.sel({"method": "noise"})``.

    Raises:
        EvaluationError: no methods or images; or a store of another data set, protocol or methods.

    Warns:
        EvaluationWarning: at the end, if methods raised, or gave maps with NaN or of other dims.

    Example:
        >>> from dit_probe.datasets.segmentation import PictureBook
        >>> found = evaluate({"constant": constant(), "noise": noise(0)}, PictureBook(3), progress=False)
        >>> dict(found.iou_macro.sizes), found.auroc.sel({"method": "constant"}).values.tolist()
        ({'method': 2, 'image': 3, 'threshold': 3}, [0.5, 0.5, 0.5])
    """
    protocol = protocols.find(protocol)
    if isinstance(concepts, str):
        raise EvaluationError(f"concepts={concepts!r} is a string; give a list of words, [{concepts!r}]")
    if concepts is not None:
        protocol = replace(protocol, background=tuple(concepts))
    total = len(dataset)
    count = total if limit is None else min(limit, total)
    if not methods or count < 1:
        raise EvaluationError(f"{len(methods)} methods, {total} images, limit={limit}: there is nothing to evaluate")
    table = _empty(methods, dataset, protocol)
    group = None if store is None else _stored(store, table, resume)
    done = table.scored[:, :count].all("method").values
    with tqdm(total=count, initial=int(done.sum()), unit="image", disable=not progress) as bar:
        for at in np.flatnonzero(~done).tolist():
            _image(methods, dataset, protocol, table, at)
            if group is not None:
                _write(group, table, at)
            bar.update()
    found = table.isel(image=slice(0, count))
    found = found.assign_coords(image=found["name"].values).drop_vars(["name", "scored"])
    _report(found)
    return found


def _image(methods: Mapping[str, Method], dataset: Dataset, protocol: Protocol, table: xr.Dataset, at: int) -> None:
    """Fill one image's row."""
    sample = dataset[at]
    words = protocols.words(protocol, sample, dataset.vocabulary, dataset.background)
    image = protocols.prepare(protocol, sample)[0]
    table["name"].values[at], table["target"].values[at] = sample.name, ", ".join(sample.target)
    for row, method in enumerate(methods.values()):
        if table.scored.values[row, at]:
            continue
        try:
            maps = _maps(method, image, words)
            found = protocols.score(protocol, maps, sample, vocabulary=dataset.vocabulary)
        except Exception as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), "no message")
            table.failed.values[row, at] = f"{type(error).__name__}: {reason}"
            continue
        for name, values in found.data_vars.items():
            table[name].values[row, at] = values.transpose(*table[name].dims[2:]).values
        table.failed.values[row, at], table.scored.values[row, at] = "", True


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


def _empty(methods: Mapping[str, Method], dataset: Dataset, protocol: Protocol) -> xr.Dataset:
    """The table before anything is known."""
    classes = [protocols.BACKGROUND, *(word for word in dataset.vocabulary if word != protocols.BACKGROUND)]
    labels = {"threshold": protocol.labels, "count": list(COUNTS), "class": classes}
    shape = {"method": len(methods), "image": len(dataset)}

    def column(value: Any, dtype: Any, *dims: str) -> xr.Variable:
        sizes = [*shape.values(), *(len(labels[dim]) for dim in dims)]
        return xr.Variable((*shape, *dims), np.full(sizes, value, dtype))

    variables = {name: column(np.nan, float) for name in (*RANKING, "miou")}
    variables |= {name: column(np.nan, float, "threshold") for name in THRESHOLDED}
    variables |= {"counts": column(np.nan, float, "threshold", "count")}
    variables |= {name: column(np.nan, float, "class") for name in ("intersection", "union")}
    variables |= {"failed": column("", object), "scored": column(False, bool)}
    texts = {name: ("image", np.full(len(dataset), "", object)) for name in ("name", "target")}
    described = {name: _description(method) for name, method in methods.items()}
    facts = {
        "dataset": {"name": dataset.name, "fingerprint": dataset.fingerprint, "images": len(dataset)},
        "protocol": asdict(protocol),
        "methods": described,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
    }
    attrs = {"format": FORMAT, **{name: json.dumps(fact) for name, fact in facts.items()}}
    coords = {**labels, "method": list(methods), **texts}
    return xr.Dataset(variables, coords, attrs)


def _description(method: Method) -> str:
    describe = getattr(method, "describe", None)
    if callable(describe):
        return str(describe())
    named = method if hasattr(method, "__qualname__") else type(method)
    return f"{named.__module__}.{named.__qualname__}"


def _stored(store: Any, table: xr.Dataset, resume: bool) -> zarr.Group:
    """The group that rows are written to; what it holds already is read into the table."""
    place = location.locate(store)
    found = location.find(place)
    where = location.text(place)
    if isinstance(found, str) or (found is not None and found.attrs.get("format") != FORMAT):
        what = found if isinstance(found, str) else "a Zarr group of something else"
        raise EvaluationError(
            f"{where} is {what}, not the store of an evaluation; nothing was written. Use another path"
        )
    if found is None or not resume:
        return _created(place, table)
    lines = []
    for name in ("dataset", "protocol", "methods"):
        here, there = json.loads(table.attrs[name]), json.loads(str(found.attrs.get(name, "{}")))
        keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
        lines += [f"{name} {key}: {there.get(key, 'none')} in the store, {here.get(key, 'none')} now" for key in keys]
        if not keys and list(here) != list(there):
            lines.append(f"{name}: {', '.join(there)} in the store, in another order now")
    if lines:
        differences = "\n  ".join(lines)
        raise EvaluationError(
            f"{where} is of another evaluation:\n  {differences}\nUse another path, or resume=False to start over."
        )
    group = zarr.open_group(place, mode="r+", use_consolidated=False)
    for name in _rows(table):
        array: Any = group[_IN_STORE.get(name, name)]
        table[name].values[...] = array[...]
    table.attrs["versions"] = found.attrs["versions"]
    return group


def _created(place: Any, table: xr.Dataset) -> zarr.Group:
    group = zarr.create_group(place, overwrite=True, attributes={**table.attrs, "coordinates": "target"})
    for name, variable in table.variables.items():
        text = variable.dtype.kind in "OUT"
        sizes = dict(variable.sizes)
        array = group.create_array(
            _IN_STORE.get(str(name), str(name)),
            shape=variable.shape,
            chunks=tuple(min(_IMAGES_PER_CHUNK, size) if dim == "image" else size for dim, size in sizes.items()),
            dtype="string" if text else variable.dtype,
            fill_value="" if text else False if variable.dtype == bool else np.nan,
            dimension_names=[str(dim) for dim in variable.dims],
        )
        if "image" not in variable.dims:
            array[...] = variable.values.astype(np.dtypes.StringDType())
    location.commit(place)
    return zarr.open_group(place, mode="r+", use_consolidated=False)


def _rows(table: xr.Dataset) -> list[str]:
    """Names of what has a row an image; ``scored``, which makes the row count, last."""
    return sorted((str(name) for name, v in table.variables.items() if "image" in v.dims), key=lambda n: n == "scored")


def _write(group: zarr.Group, table: xr.Dataset, at: int) -> None:
    for name in _rows(table):
        array: Any = group[_IN_STORE.get(name, name)]
        index = tuple(slice(at, at + 1) if dim == "image" else slice(None) for dim in table[name].dims)
        values = table[name].values[index]
        array[index] = values.astype(np.dtypes.StringDType()) if values.dtype == object else values


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


def summarise(results: xr.Dataset, over: str = "image") -> xr.Dataset:
    """Means over images with 95 % bootstrap intervals (`dit_probe.statistics.bootstrap`).

    Args:
        results: of `evaluate`, or a selection of it.
        over: the dim of the images.

    Returns:
        ``mean``, ``low``, ``high`` in the units of each metric, ``n`` and ``undefined``, images that count and that do
        not, (method, metric). A metric that depends on a threshold has a row for each: "iou_macro, otsu".

    Raises:
        EvaluationError: no metric in it.

    Example:
        >>> from dit_probe.datasets.segmentation import PictureBook
        >>> found = summarise(evaluate({"constant": constant()}, PictureBook(3), "chefer", progress=False))
        >>> float(found["mean"].sel({"method": "constant", "metric": "auroc"}))
        0.5
    """
    rows: dict[str, xr.DataArray] = {}
    for name in (name for name in protocols.METRICS if name in results):
        if "threshold" in results[name].dims:
            rows |= {f"{name}, {t}": results[name].sel(threshold=t, drop=True) for t in results.threshold.values}
        else:
            rows[name] = results[name]
    if not rows:
        raise EvaluationError(f"nothing to sum up: found {', '.join(map(str, results)) or 'nothing'}, no metric")
    joined: Any = xr.concat(list(rows.values()), xr.Variable("metric", list(rows)), coords="minimal", compat="override")
    found = bootstrap(joined.drop_vars("threshold", errors="ignore"), over)
    return found.transpose("method", "metric", ...).assign_attrs(results.attrs)


def table(summary: xr.Dataset, kind: Literal["markdown", "csv"] = "markdown") -> str:
    """A summary as text: Markdown, a row a method and a column a metric; or CSV, a row for each of both.

    Raises:
        EvaluationError: another `kind`.

    Example:
        >>> from dit_probe.datasets.segmentation import PictureBook
        >>> results = evaluate({"constant": constant()}, PictureBook(3), progress=False)
        >>> print(table(summarise(results).sel(metric=["auroc"])))
        | method   | auroc                |
        |----------|----------------------|
        | constant | 0.500 [0.500, 0.500] |
    """
    if kind not in ("markdown", "csv"):
        raise EvaluationError(f"kind={kind!r}; choose markdown or csv")
    if kind == "csv":
        columns = ["mean", "low", "high", "n", "undefined"]
        return summary[columns].to_dataframe(dim_order=["method", "metric"])[columns].to_csv()
    rows = [["method", *summary.metric.values.tolist()]]
    for at, method in enumerate(summary.method.values.tolist()):
        cells = zip(*(summary[name].values[at] for name in ("mean", "low", "high", "n", "undefined")), strict=True)
        rows.append([method, *map(_shown, cells)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _shown(cell: Sequence[float]) -> str:
    mean, low, high, n, undefined = cell
    left_out = f" ({int(undefined)} undefined)" if undefined else ""
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]{left_out}" if n else "undefined"
