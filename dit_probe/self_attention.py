"""The image's attention to itself, from recorded q_x and k_x: a filter for any map, and a Markov chain over tokens.

    A[i, j] = mean over steps, layers and heads of softmax_j(q_x[i] . k_x[j] / sqrt(head_dim))

i and j are image tokens. Every softmax in the mean is the model's joint attention of eq. (1), restricted to image keys
and scaled up to sum to 1, for models that scale by 1 / sqrt(head_dim) and hide no image token from another.

| | computed | in words |
|---|---|---|
| `transitions` | A | one step of the chain: rows are distributions |
| `refine` | A^n S | every token takes the mean of the map over what it attends to, n times |
| `bounce` | v A^n | where attention that starts at v is after n steps |
| `token_rank` | pi = pi A | where it is after any number of steps, wherever it started |

`refine` once is what DiffSegmenter (2309.02773) does with self-attention, n times what iSeg (2409.03209) does, without
its entropy reduction. Chain, bounces, TokenRank and the weights ``lambda2`` are those of Attention (as Discrete-Time
Markov) Chains (2507.17657), here over image tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from operator import add
from typing import Any, Literal

import numpy as np
import xarray as xr

from dit_probe.errors import MapError
from dit_probe.maps import grid
from dit_probe.selection import Labels, select, select_heads

Heads = Literal["merged"] | Sequence[int]
Weights = Literal["lambda2"] | None

_SHARED = ("sample", "branch")
_QUERY, _KEY = "image_token", "attended_token"
# Maps may have a dim ``head`` of their own.
_CORES = [[_QUERY, "attending_head", "attending_dim"], [_KEY, "attending_head", "attending_dim"]]
_NUMBERS = 2**22  # of one head's attention at a time
_ITERATIONS = 1000


def transitions(
    ds: xr.Dataset, *, layers: Labels = None, steps: Labels = None, heads: Heads = "merged", weights: Weights = None
) -> xr.DataArray:
    """The image's mean attention to itself, row-stochastic: A of this module.

    With ``weights="lambda2"`` the mean is weighted by the modulus of the second largest eigenvalue of the matrix of
    each step, layer and head (`second_eigenvalue`): those that mix slowly, hence keep regions apart, count more.

    Args:
        ds: a trace with q_x and k_x (`dit_probe.open`), numpy or dask; the result is lazy when it is.
        layers: layer labels; None: all that were recorded.
        steps: step labels; None: all that were recorded.
        heads: ``merged``, or the numbers of heads to merge.
        weights: None: all count the same; or ``lambda2``, dozens of times slower.

    Returns:
        (sample, [branch,] image_token, attended_token), both in the trace's order, float32, or float64 where the input
        is: 64 MiB a sample for 4096 tokens in float32. Rows sum to 1.

    Raises:
        MapError: q_x and k_x, or a label, were not recorded; an unknown argument.

    Example:
        >>> dims = ("sample", "step", "layer", "image_token", "head", "head_dim")
        >>> ds = xr.Dataset({name: (dims, np.ones((1, 1, 1, 4, 2, 3))) for name in ("q_x", "k_x")})
        >>> A = transitions(ds)
        >>> A.sizes, A[0, 0].values.tolist()
        (Frozen({'sample': 1, 'image_token': 4, 'attended_token': 4}), [0.25, 0.25, 0.25, 0.25])
    """
    queries, keys = _recorded(ds, layers, steps, heads, weights)
    chain = _mixed(queries, keys)
    kept = {name: coord for name, coord in queries.coords.items() if coord.dims and {*coord.dims} <= {*chain.dims}}
    return chain.assign_coords(kept).rename("transitions").assign_attrs(queries.attrs)


def refine(
    maps: xr.DataArray,
    attention: xr.Dataset | xr.DataArray,
    power: int = 1,
    *,
    layers: Labels = None,
    steps: Labels = None,
    heads: Heads = "merged",
    weights: Weights = None,
) -> xr.DataArray:
    """Refine maps by the image's attention to itself, ``A^n S``.

    Every token's value becomes the mean of the map over the tokens that it attends to. Constant maps stay as they are,
    and nothing leaves the range of the map.

    Args:
        maps: (…, [frame,] y, x) on the trace's grid: of this trace, or of any other method on the same picture.
            ``sample`` and ``branch`` go with those of the trace, by label where both have labels (also where one is
            selected); along all other dims, ``layer`` and ``head`` among them, A is the same.
        attention: a trace with q_x and k_x, or what `transitions` made of one.
        power: n; 0 changes nothing.
        layers: of A, with a trace, see `transitions`.
        steps: likewise.
        heads: likewise.
        weights: likewise.

    Returns:
        As `maps`, with ``sample`` and ``branch`` in front where only the trace has them, lazy where maps or trace are.
        NaN anywhere in a map makes all of it NaN. Attributes ``refined_…`` say by what. From a trace, at power 1
        and without weights, A is never held as a whole.

    Raises:
        MapError: as `transitions`; maps on another grid, or of samples that the trace does not have.

    Example:
        >>> A = xr.DataArray([[0.5, 0.5], [0.0, 1.0]], dims=("image_token", "attended_token"), coords={
        ...     "patch_y": ("image_token", [0, 0]), "patch_x": ("image_token", [0, 1])})
        >>> refine(xr.DataArray([[0.0, 1.0]], dims=("y", "x")), A, power=2).values.tolist()
        [[0.75, 1.0]]
    """
    _check_count("power", power)
    if isinstance(attention, xr.DataArray):
        if any(choice is not None for choice in (layers, steps, weights)) or not isinstance(heads, str):
            raise MapError("layers, steps, heads and weights are what A is made of: give them to transitions(ds, …)")
        arrays = [_chain(attention)]
    else:
        arrays = _recorded(attention, layers, steps, heads, weights)
    made_of = {f"refined_{name}": value for name, value in arrays[0].attrs.items()}
    refined = _through(maps, arrays, [_KEY, _QUERY], power).rename(maps.name)
    return refined.assign_attrs(maps.attrs, refined_power=int(power), **made_of)


def bounce(start: xr.DataArray | Mapping[str, int], chain: xr.DataArray, bounces: int = 1) -> xr.DataArray:
    """Where attention that starts at some tokens is after n steps, ``v A^n`` (multi-bounce attention).

    One bounce from one token is that token's row of A: what it attends to. Who attends to the start within n steps is
    the transposed question, and ``refine(start, chain, power=n)`` its answer.

    Args:
        start: labels of a token, ``{"y": 3, "x": 5}``; or a map (…, [frame,] y, x) without negative values, a mask for
            instance: v is the map divided by its sum.
        chain: what `transitions` made of a trace.
        bounces: n; 0 gives v.

    Returns:
        (sample, [branch,] …, [frame,] y, x), sums to 1 over the grid; NaN where the start is 0 everywhere.

    Raises:
        MapError: as `refine`; a token that is not there; negative values.

    Example:
        >>> A = xr.DataArray([[0.5, 0.5], [0.0, 1.0]], dims=("image_token", "attended_token"), coords={
        ...     "patch_y": ("image_token", [0, 0]), "patch_x": ("image_token", [0, 1])})
        >>> [bounce({"y": 0, "x": 0}, A, n).values.tolist() for n in (0, 1, 2)]
        [[[1.0, 0.0]], [[0.5, 0.5]], [[0.25, 0.75]]]
    """
    _check_count("bounces", bounces)
    chain = _chain(chain)
    if isinstance(start, Mapping):
        token, start = dict(start), xr.zeros_like(grid(_places(chain)), chain.dtype)
        try:
            start.loc[token] = 1
        except (KeyError, ValueError):
            raise MapError(f"no token at {token}: the trace's grid is {dict(start.sizes)}. Give labels of it") from None
    found = _through(start, [chain], [_QUERY, _KEY], bounces)
    return found.rename("bounce").assign_attrs(chain.attrs, bounces=int(bounces))


def token_rank(chain: xr.DataArray, *, damping: float = 1.0, tolerance: float = 1e-6) -> xr.DataArray:
    """The stationary distribution of the image's attention, ``pi = pi A``: where all of it ends.

    By power iteration from the uniform distribution, until ``sum |pi A - pi| < tolerance``. A softmax leaves no weight
    at 0, so pi is unique unless weights underflow. Computed at once, also from dask.

    Args:
        chain: what `transitions` made of a trace.
        damping: alpha of ``pi = alpha pi A + (1 - alpha) / tokens``, 0 to 1. Below 1 pi is unique for any A, as in
            PageRank; the default of the paper's code is 0.99. 1 is A itself.
        tolerance: in units of probability; float32 reaches about 1e-7.

    Returns:
        (sample, [branch,] [frame,] y, x), sums to 1 over the grid. Attributes: ``iterations`` of the slowest sample,
        and the largest ``residual``.

    Raises:
        MapError: no convergence within 1000 iterations; what is no chain.

    Example:
        >>> A = xr.DataArray([[0.5, 0.5], [0.25, 0.75]], dims=("image_token", "attended_token"), coords={
        ...     "patch_y": ("image_token", [0, 0]), "patch_x": ("image_token", [0, 1])})
        >>> token_rank(A).values.round(4).tolist()
        [[0.3333, 0.6667]]
    """
    if not 0 <= damping <= 1:
        raise MapError(f"damping={damping!r} is not in 0..1; 1 is the chain itself, 0 the uniform distribution")
    chain = _chain(chain)
    matrix = chain.values
    count = matrix.shape[-1]
    ranks = np.full(matrix.shape[:-1], 1 / count, matrix.dtype)
    iterations, residual = 0, np.inf
    while residual >= tolerance:
        if iterations == _ITERATIONS:
            raise MapError(
                f"no stationary distribution after {iterations} iterations: the residual is {residual:.1e}, the "
                f"tolerance {tolerance:.1e}. Raise it (float32 reaches about 1e-7), or give damping=0.99"
            )
        moved = damping * (ranks[..., None, :] @ matrix)[..., 0, :] + (1 - damping) / count
        moved /= moved.sum(-1, keepdims=True)
        # A sample that is undefined stays so, and does not keep the others from an end.
        residual = float(np.nan_to_num(abs(moved - ranks)).sum(-1).max())
        ranks, iterations = moved, iterations + 1
    found = grid(chain.isel({_KEY: 0}, drop=True).copy(data=ranks)).rename("token_rank")
    return found.assign_attrs(damping=damping, iterations=iterations, residual=residual)


def second_eigenvalue(matrix: np.ndarray, tolerance: float = 1e-6) -> float:
    """Modulus of the second largest eigenvalue of a row-stochastic matrix: how slowly its chain forgets its start.

    A maps constants to constants, so its other eigenvalues are those of ``v -> A v - mean(A v)`` on vectors of mean 0.
    The largest of them is found by Arnoldi iteration, which is complete after as many steps as there are tokens.

    Args:
        matrix: (token, token), rows sum to 1.
        tolerance: largest residual ``|A v - lambda v|`` of the eigenvector v, of norm 1.

    Example:
        >>> round(second_eigenvalue(np.array([[0.9, 0.1], [0.3, 0.7]])), 6)
        0.6
    """
    count = len(matrix)
    vector = np.random.default_rng(0).normal(size=count).astype(matrix.dtype)
    vector -= vector.mean()
    basis, columns, left = np.zeros((0, count), matrix.dtype), [], np.linalg.norm(vector)
    for size in range(1, count):
        basis = np.vstack([basis, vector / left])
        vector = matrix @ basis[-1]
        vector -= vector.mean()
        column = np.zeros(count)
        for _ in range(2):  # once is orthogonal to rounding only where little is taken out
            along = basis @ vector
            vector -= along @ basis
            column[:size] += along
        left = column[size] = np.linalg.norm(vector)
        if np.isnan(left):
            return np.nan
        columns.append(column)
        if size % 8 == 0 or left <= tolerance or size == count - 1:
            values, vectors = np.linalg.eig(np.array(columns).T[:size])
            largest = abs(values).argmax()
            if left * abs(vectors[-1, largest]) <= tolerance or size == count - 1:
                return float(abs(values[largest]))
    return 0.0


def _recorded(ds: xr.Dataset, layers: Labels, steps: Labels, heads: Heads, weights: Weights) -> list[xr.DataArray]:
    """Queries and keys of the image, their dims renamed to `_CORES`, with the attributes of what is made of them."""
    if not isinstance(ds, xr.Dataset):
        raise MapError(f"expected a trace (an xarray.Dataset, as dit_probe.open returns), got {type(ds).__name__}")
    if weights not in (None, "lambda2"):
        raise MapError(f"weights={weights!r} is none of None, 'lambda2'")
    if isinstance(heads, str) and heads != "merged":
        raise MapError(f"heads={heads!r} is neither 'merged' nor head numbers; for one head alone give heads=[3]")
    wanted = ("q_x", "k_x")
    picked = select(ds, [wanted], layers, steps, purpose="self-attention", fix=f"record={wanted}")
    arrays = picked.arrays if isinstance(heads, str) else select_heads(picked.arrays, heads)
    attrs = {"layers": picked.layers, "steps": picked.steps, "weights": weights}
    attrs["heads"] = heads if isinstance(heads, str) else np.atleast_1d(heads).tolist()
    names = [dict(zip((_QUERY, "head", "head_dim"), core, strict=True)) for core in _CORES]
    return [array.rename(name).assign_attrs(attrs) for array, name in zip(arrays, names, strict=True)]


def _chain(chain: xr.DataArray) -> xr.DataArray:
    if not isinstance(chain, xr.DataArray) or not {_QUERY, _KEY} <= {*chain.dims}:
        found = f"a {type(chain).__name__} of dims {tuple(getattr(chain, 'dims', ()))}"
        raise MapError(f"expected the array (…, {_QUERY}, {_KEY}) that transitions(ds) returns, found {found}")
    return chain.transpose(..., _QUERY, _KEY)


def _mixed(queries: xr.DataArray, keys: xr.DataArray) -> xr.DataArray:
    kernel = partial(_over_heads, weighted=queries.attrs["weights"] is not None)
    mean = _over_cells(kernel, [queries, keys], _CORES, [_QUERY, _KEY])
    return _lazily(_distributions, [mean], [[_QUERY, _KEY]], [_QUERY, _KEY])


def _lazily(kernel: Callable[..., np.ndarray], arrays: Any, cores: Any, out: Any) -> xr.DataArray:
    """A function of the last dims, all of each in one chunk; coordinates that could contradict those of maps go."""
    bare = [array.drop_vars({*array.coords} - {*_SHARED}) for array in arrays]
    whole = [a if a.chunks is None else a.chunk(dict.fromkeys(core, -1)) for a, core in zip(bare, cores, strict=True)]
    options: Any = {"dask": "parallelized", "output_dtypes": [np.result_type(np.float32, *(a.dtype for a in bare))]}
    return xr.apply_ufunc(kernel, *whole, input_core_dims=cores, output_core_dims=[out], **options)


def _over_cells(kernel: Callable[..., np.ndarray], arrays: Sequence[xr.DataArray], cores: Any, out: Any) -> Any:
    """The mean over steps and layers, one after the other: all of them at once would not fit."""
    cells = [*np.ndindex(*(arrays[0].sizes.get(dim, 1) for dim in ("step", "layer")))]
    picked = ([a.isel(step=step, layer=layer, missing_dims="ignore") for a in arrays] for step, layer in cells)
    return reduce(add, (_lazily(kernel, one, cores, out) for one in picked)) / len(cells)


def _blocks(q: np.ndarray, k: np.ndarray, *, whole: bool = False) -> Iterator[Any]:
    """Attention (query, key) of one head after the other, some queries at a time: where it belongs, and its rows."""
    dtype = np.result_type(np.float32, q, k)
    count = q.shape[-3]
    step = count if whole else max(1, _NUMBERS // count)
    for *at, head in np.ndindex(*q.shape[:-3], q.shape[-2]):
        queries, keys = (part[*at, :, head].astype(dtype) for part in (q, k))
        queries *= q.shape[-1] ** -0.5
        for start in range(0, count, step):
            rows = slice(start, start + step)
            block = queries[rows] @ keys.T
            with np.errstate(invalid="ignore"):  # inf - inf: a logit that overflowed becomes NaN and shows as such
                block -= block.max(-1, keepdims=True)
            np.exp(block, out=block)
            block /= block.sum(-1, keepdims=True)
            yield tuple(at), rows, block


def _over_heads(q: np.ndarray, k: np.ndarray, *, weighted: bool) -> np.ndarray:
    """Attention summed over heads, (…, query, key)."""
    total = np.zeros((*q.shape[:-2], q.shape[-3]), np.result_type(np.float32, q, k))
    for at, rows, block in _blocks(q, k, whole=weighted):
        total[at][rows] += second_eigenvalue(block) * block if weighted else block
    return total


def _distributions(rows: np.ndarray) -> np.ndarray:
    if (rows < 0).any():
        raise MapError("the start of a bounce has negative values: give a mask, or a map that is not negative")
    with np.errstate(invalid="ignore"):
        return rows / rows.sum(-1, keepdims=True)


def _attended(q: np.ndarray, k: np.ndarray, s: np.ndarray) -> np.ndarray:
    """A S without A: maps (…, map, key) attended to by queries, mean over heads."""
    s = np.broadcast_to(s, q.shape[:-3] + s.shape[-2:])
    found = np.zeros(s.shape, np.result_type(np.float32, q, k, s))
    for at, rows, block in _blocks(q, k):
        found[at][:, rows] += s[at] @ block.T
    return found / q.shape[-2]


def _places(array: xr.DataArray) -> xr.DataArray:
    """The image tokens' numbers, with their coordinates on the grid."""
    names = ("patch_frame", "patch_y", "patch_x")
    coords = {name: array.coords[name].variable for name in names if name in array.coords}
    return xr.DataArray(np.arange(array.sizes[_QUERY]), coords, [_QUERY])


def _through(maps: xr.DataArray, attention: list[xr.DataArray], dims: list[str], count: int) -> xr.DataArray:
    """Maps times A, or times what queries and keys make of it, so many times, summed over the first of its `dims`."""
    places = _places(attention[0])
    index = grid(places)
    if not isinstance(maps, xr.DataArray):
        raise MapError(f"expected maps (an xarray.DataArray with the dims {index.dims}), got {type(maps).__name__}")
    for dim, size in index.sizes.items():
        if maps.sizes.get(dim) != size or not np.array_equal(maps.coords.get(dim, index[dim]), index[dim]):
            raise MapError(
                f"maps of {dict(maps.sizes)} differ in {dim} from the trace's grid, {dict(index.sizes)}. Bring them "
                f"there, with dit_probe.metrics.resize(maps, y={index.sizes['y']}, x={index.sizes['x']}) for instance; "
                f"where only the labels differ, drop them: maps.drop_vars({dim!r})"
            )
    shared = [dim for dim in maps.dims if dim in _SHARED and dim in attention[0].dims]
    alone = [dim for dim in maps.dims if dim not in shared and dim not in index.dims]
    data = maps.transpose(*shared, *alone, *index.dims).astype(np.result_type(np.float32, maps.dtype)).data
    rows = data.reshape(*data.shape[: len(shared)], -1, index.size)[..., np.argsort(index.values, axis=None)]
    labels = {dim: maps.coords[dim] for dim in shared if dim in maps.coords}
    matched = [_same_pictures(array, maps) for array in attention]
    values = xr.DataArray(rows, labels, [*shared, "map", dims[0]])
    if dims[0] == _QUERY:
        values = _lazily(_distributions, [values], [[_QUERY]], [_QUERY])
    if len(matched) == 2 and (count > 1 or attention[0].attrs["weights"]):
        matched = [_mixed(*matched)]
    for _ in range(count):
        if len(matched) == 2:
            values = _over_cells(_attended, [*matched, values], [*_CORES, ["map", _KEY]], ["map", _QUERY])
        else:
            values = _lazily(np.matmul, [values, *matched], [["map", dims[0]], dims], ["map", dims[1]])
        values = values.rename({dims[1]: dims[0]})
    data = values.data.reshape(*values.shape[:-2], *(maps.sizes[dim] for dim in alone), index.size)
    kept = {name: coord for name, coord in maps.coords.items() if not {*coord.dims} & {*index.dims}}
    found = xr.DataArray(data, {**values.coords, **kept, **places.coords}, [*values.dims[:-2], *alone, _QUERY])
    return grid(found).transpose(..., *maps.dims)


def _same_pictures(array: xr.DataArray, maps: xr.DataArray) -> xr.DataArray:
    """Queries, keys or A of the samples and branches that the maps are of."""
    for dim in _SHARED:
        if dim in array.indexes and dim in maps.coords:
            wanted, there = maps[dim].values, array[dim].values
            if not np.isin(wanted, there).all():
                raise MapError(f"maps of {dim} {wanted.tolist()}; the trace has {there.tolist()}. Select among those")
            array = array if np.array_equal(wanted, there) else array.sel({dim: wanted})
        elif dim in array.dims and maps.sizes.get(dim, array.sizes[dim]) != array.sizes[dim]:
            raise MapError(f"{dim}: {maps.sizes[dim]} in the maps, {array.sizes[dim]} in the trace; select the same")
    return array


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        raise MapError(f"{name}={value!r} is no number of steps: give 0, 1, 2 …")
