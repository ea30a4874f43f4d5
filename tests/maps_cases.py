"""Traces of random activations, and the equations of scores and maps written out in plain numpy, in float64."""

import numpy as np
import xarray as xr

SAMPLES, STEPS, LAYERS, HEADS, HEAD_DIM, CONCEPTS, HEIGHT, WIDTH = 2, 3, 4, 2, 5, 3, 2, 4
LEADING = ("sample", "step", "layer")
STEP_LABELS, LAYER_LABELS = [0, 2, 5], [1, 3, 4, 7]
SPACES = ["output", "value", "cross"]


def make(dtype="float64", *, frames=1, concepts=CONCEPTS, branches=0, order=None, seed=0) -> xr.Dataset:
    """A trace of random activations: everything that `maps` reads."""
    random = np.random.default_rng(seed)
    tokens = frames * HEIGHT * WIDTH
    leading = (SAMPLES, STEPS, LAYERS) if not branches else (SAMPLES, branches, STEPS, LAYERS)
    dims = LEADING if not branches else ("sample", "branch", "step", "layer")
    names = ["o_{}", "v_{}", "q_{}", "k_{}", "q_{}_unrotated", "k_{}_unrotated"]
    variables = {}
    for stream, dim, count in (("x", "image_token", tokens), ("c", "concept", concepts)):
        for name in names:
            values = random.normal(size=(*leading, count, HEADS, HEAD_DIM)).astype(dtype)
            variables[name.format(stream)] = ((*dims, dim, "head", "head_dim"), values)
    frame, y, x = (index.ravel() for index in np.indices((frames, HEIGHT, WIDTH)))
    coords = {
        "step": STEP_LABELS,
        "layer": LAYER_LABELS,
        "timestep": ("step", [900.0, 500.0, 100.0]),
        "concept": [f"concept {i}" for i in range(concepts)],
        "patch_frame": ("image_token", frame),
        "patch_y": ("image_token", y),
        "patch_x": ("image_token", x),
    }
    ds = xr.Dataset(variables, coords)
    return ds if order is None else ds.isel(image_token=order)


def softmax(values: np.ndarray, axis: int) -> np.ndarray:
    weights = np.exp(values - values.max(axis=axis, keepdims=True))
    return weights / weights.sum(axis=axis, keepdims=True)


def expected_scores(ds: xr.Dataset, space: str, direction: str = "image_to_concept", rotary: bool = True) -> np.ndarray:
    """(sample, step, layer, head, concept, image_token): dot products of every head, by the definition."""
    image, concept = {"output": ("o_x", "o_c"), "value": ("v_x", "v_c")}.get(
        space, ("q_x", "k_c") if direction == "image_to_concept" else ("k_x", "q_c")
    )
    suffix = "" if rotary or space != "cross" else "_unrotated"
    products = np.einsum(
        "stlihd,stlchd->stlhci",
        ds[image + suffix].values.astype("float64"),
        ds[concept + suffix].values.astype("float64"),
    )
    return products / np.sqrt(HEAD_DIM) if space == "cross" else products


def merged(values: np.ndarray, space: str) -> np.ndarray:
    return values.mean(3) if space == "cross" else values.sum(3)


def in_flight(ds: xr.Dataset) -> xr.Dataset:
    """The same trace with its activations reduced to scores while running."""
    dims = (*LEADING, "concept", "image_token")
    arrays = {
        "score_output": merged(expected_scores(ds, "output"), "output"),
        "score_value": merged(expected_scores(ds, "value"), "value"),
        "score_cross": merged(expected_scores(ds, "cross"), "cross"),
        "score_cross_concept_to_image": merged(expected_scores(ds, "cross", "concept_to_image"), "cross"),
    }
    variables = {name: (dims, values.astype("float32")) for name, values in arrays.items()}
    return xr.Dataset(variables, ds.coords)
