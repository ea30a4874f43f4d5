"""Evaluation: runs that stop, go on and grow, methods that fail, what is stored."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr

import dit_probe as dp
from dit_probe import protocols
from dit_probe.datasets.segmentation import Part, PictureBook, Sample
from dit_probe.evaluation import EvaluationWarning, evaluate, plan, results
from dit_probe.methods import centre_gaussian, constant, image_saliency, noise
from dit_probe.protocols import EvaluationError

TRIVIAL = {"noise": noise(1), "constant": constant(), "centre": centre_gaussian(), "saliency": image_saliency()}


class Counting:
    """Noise that counts its calls; somebody presses Ctrl-C at one of them."""

    def __init__(self, stop_at: int = 0) -> None:
        self.calls, self.stop_at = 0, stop_at

    def __call__(self, images, concepts):
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        return noise(2)(images, concepts)

    def describe(self) -> str:
        return "noise, sometimes"


class Bare:
    """Samples without `names`, in the way a user's own data set may come."""

    name, vocabulary, background, fingerprint = "bare", ("sun", "boat"), (), "sha256:0"

    def __init__(self, *samples: Sample) -> None:
        self.samples, self.read = samples, 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int, /) -> Sample:
        self.read += 1
        return self.samples[index]


def run(methods, data, **options) -> xr.Dataset:
    return evaluate(methods, data, progress=False, **options)


def same(a: xr.Dataset, b: xr.Dataset) -> None:
    xr.testing.assert_identical(a.drop_attrs(deep=False), b.drop_attrs(deep=False))
    assert a.attrs == b.attrs


def test_interrupted_and_rerun_is_the_same_as_straight(tmp_path):
    data, method, store = PictureBook(5), Counting(stop_at=3), tmp_path / "run.zarr"
    methods = {"constant": constant(), "noise": method}
    with pytest.raises(KeyboardInterrupt):
        run(methods, data, store=store)
    half = xr.open_zarr(store)
    assert half.scored.values.sum(1).tolist() == [2, 2]
    resumed = run(methods, data, store=store)
    assert method.calls == 3 + 3
    same(resumed, run(methods, data))
    again = run(methods, data, store=store)
    assert method.calls == 3 + 3 + 5
    same(resumed, again)
    stored = xr.open_zarr(store).load()
    assert stored.image.values.tolist() == resumed.image.values.tolist()
    np.testing.assert_array_equal(stored.iou_macro, resumed.iou_macro)
    assert stored.iou_macro.dims == ("method", "image", "threshold")


@pytest.mark.parametrize(("seconds", "writes"), [(0, [4]), (1.1, [3, 1]), (9, [1, 1, 1, 1])])
def test_finished_images_are_written_now_and_then_and_at_any_end(tmp_path, monkeypatch, seconds, writes):
    data, calls, write = PictureBook(9), [], results.write
    monkeypatch.setattr("dit_probe.evaluation.running.monotonic", partial(next, count(0, seconds)))
    monkeypatch.setattr(results, "write", lambda *args: (calls.append(len(args[3])), write(*args)))
    with pytest.raises(KeyboardInterrupt):
        run({"it": Counting(stop_at=5)}, data, store=tmp_path / "run.zarr")
    stored = xr.open_zarr(tmp_path / "run.zarr").load()
    assert calls == writes and stored.scored.values.tolist() == [[True] * 4 + [False] * 5]
    np.testing.assert_array_equal(stored.auroc[:, :4], run({"it": Counting()}, data, limit=4).auroc)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_methods_are_scored_together_and_fail_alone(monkeypatch, most):
    data, sizes, score = PictureBook(1), [], protocols.score
    fine = {"noise": noise(1), "small": noise(1, grid=5), "more": noise(3), **TRIVIAL}
    expected = xr.concat([run({name: method}, data) for name, method in fine.items()], "method")
    values = 64 * 64 * len(protocols.words("native", data[0], data.vocabulary, data.background))
    monkeypatch.setattr("dit_probe.evaluation.running._NUMBERS", most * values)

    def picky(protocol, maps, sample, vocabulary):
        sizes.append(maps.sizes["method"])
        if (maps == 7).any():
            raise ValueError("a seven")
        return score(protocol, maps, sample, vocabulary=vocabulary)

    monkeypatch.setattr(protocols, "score", picky)
    with pytest.warns(EvaluationWarning, match="sevens: 1 of 1, first scene/00000: ValueError: a seven"):
        found = run({"noise": noise(1), "sevens": lambda *given: noise(2)(*given) * 0 + 7, **fine}, data)
    assert max(sizes) == most and found.auroc.sel({"method": "sevens"}).isnull().all()
    xr.testing.assert_allclose(found.sel({"method": list(fine)}), expected, rtol=1e-12, atol=0)


def test_what_was_being_written_at_the_interruption_is_no_number(tmp_path):
    data, store = PictureBook(2), tmp_path / "run.zarr"
    second = data[1].image.tobytes()

    def method(images, concepts):
        if images[0].tobytes() == second:
            raise RuntimeError("out of memory")
        return noise(0)(images, concepts)

    run({"it": method}, data, store=store, limit=1)
    auroc: Any = zarr.open_group(store, mode="r+")["auroc"]
    auroc[0, 1] = 0.9
    with pytest.warns(EvaluationWarning, match="it: 1 of 2"):
        found = run({"it": method}, data, store=store)
    assert found.auroc.notnull().values.tolist() == [[True, False]]


def test_a_limit_may_be_raised_later_and_lowered(tmp_path):
    data, store, counting = PictureBook(4), tmp_path / "run.zarr", Counting()
    methods = {"counting": counting}
    assert run(methods, data, store=store, limit=2).sizes["image"] == 2
    same(run(methods, data, store=store), run({"counting": Counting()}, data))
    same(run(methods, data, store=store, limit=3), run({"counting": Counting()}, data, limit=3))
    assert run(methods, data, store=store, limit=9).sizes["image"] == 4
    assert counting.calls == 4


def test_a_store_takes_more_methods(tmp_path):
    data, store, old = PictureBook(4), tmp_path / "run.zarr", Counting()
    run({"old": old, "constant": constant()}, data, store=store, limit=3)
    more = {"centre": centre_gaussian(), "old": old, "saliency": image_saliency(), "constant": constant()}
    grown = run(more, data, store=store)
    assert old.calls == 4  # once for every image
    same(grown, run({**more, "old": Counting()}, data))
    stored = xr.open_zarr(store).load()
    assert stored["method"].values.tolist() == ["old", "constant", "centre", "saliency"]
    assert list(json.loads(stored.attrs["methods"])) == stored["method"].values.tolist()
    for name in ("auroc", "counts", "intersection", "failed", "scored"):
        if name in grown:
            np.testing.assert_array_equal(stored[name].sel({"method": list(more)}), grown[name])
    assert stored.scored.all()


def test_a_run_with_some_of_the_methods_leaves_the_others(tmp_path):
    data, store, other = PictureBook(3), tmp_path / "run.zarr", Counting()
    run({"constant": constant(), "other": other}, data, store=store, limit=1)
    found = run({"other": other}, data, store=store)
    assert (other.calls, found["method"].values.tolist()) == (3, ["other"])
    stored = xr.open_zarr(store).load()
    assert stored.scored.values.tolist() == [[True, False, False], [True, True, True]]
    assert stored.auroc.notnull().values.tolist() == stored.scored.values.tolist()


def test_an_added_method_may_be_interrupted(tmp_path):
    data, store, added = PictureBook(4), tmp_path / "run.zarr", Counting(stop_at=3)
    methods = {"constant": constant()}
    first = run(methods, data, store=store)
    with pytest.raises(KeyboardInterrupt):
        run(methods | {"added": added}, data, store=store)
    same(run(methods, data, store=store), first)
    same(run(methods | {"added": added}, data, store=store), run(methods | {"added": Counting()}, data))
    assert added.calls == 3 + 2


@pytest.mark.parametrize("place", ["resize", "names", "lengths", "attributes"])
def test_stopped_while_room_is_made_for_more_methods(tmp_path, monkeypatch, place):
    data, store, methods = PictureBook(2), tmp_path / "run.zarr", {"noise": noise(1)}
    first = run(methods, data, store=store)
    calls = []

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    def stop_at_the_third(array, shape, resize=zarr.Array.resize):
        calls.append(shape)
        return stop() if len(calls) == 3 else resize(array, shape)

    target, function = {
        "resize": ("zarr.Array.resize", stop_at_the_third),
        "names": ("zarr.Array.__setitem__", stop),
        "lengths": ("dit_probe.store.location.commit", stop),
        "attributes": ("zarr.Group.update_attributes", stop),
    }[place]
    with monkeypatch.context() as patched:
        patched.setattr(target, function)
        with pytest.raises(KeyboardInterrupt):
            run(methods | {"lost": constant(), "too": constant()}, data, store=store)
    seen = xr.open_zarr(store).load()
    np.testing.assert_array_equal(seen.auroc.sel({"method": ["noise"]}), first.auroc)
    assert seen.scored.sum() == 2
    same(run(methods, data, store=store), first)
    more = methods | {"centre": centre_gaussian()}
    same(run(more, data, store=store), run(more, data))
    stored = xr.open_zarr(store).load()
    assert stored["method"].values.tolist() == list(more) and stored.scored.all()


def test_a_store_of_something_else_is_refused(tmp_path):
    store, data = tmp_path / "run.zarr", PictureBook(2)
    methods = {"noise": noise(1), "constant": constant()}
    first = run(methods, data, store=store)
    given: dict[str, Any] = {"methods": methods, "dataset": data, "store": store, "progress": False}
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"dataset": PictureBook(2, seed=3)}, "dataset fingerprint: sha256"),
        ({"dataset": Part(data, [0, 1], "part")}, "dataset name: picture-book-scenes-1 in the store, part now"),
        ({"protocol": "paper"}, "protocol name: native in the store, paper now"),
        ({"concepts": ["sky"]}, "protocol background"),
        ({"methods": {"noise": noise(2), "more": noise(3)}}, "methods noise: noise.seed=1, grid=64. in the store"),
    )
    for change, said in changes:
        with pytest.raises(EvaluationError, match=said):
            evaluate(**given | change)
    same(run(methods, data, store=store), first)
    assert run(methods, PictureBook(3, seed=3), store=store, resume=False).sizes["image"] == 3
    del zarr.open_group(store, mode="r+")["auroc"]
    with pytest.raises(EvaluationError, match="auroc: none in the store"):
        run(methods, PictureBook(3, seed=3), store=store)


def test_what_is_no_evaluation_is_not_overwritten(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    for resume in (True, False):
        with pytest.raises(EvaluationError, match=r"a directory that holds a\.txt"):
            run(TRIVIAL, PictureBook(1), store=tmp_path / "notes", resume=resume)
    with pytest.raises(EvaluationError, match="nothing to evaluate"):
        run({}, PictureBook(1))
    with pytest.raises(EvaluationError, match="0 of 1 images: there is nothing"):
        run(TRIVIAL, PictureBook(1), limit=0)
    with pytest.raises(EvaluationError, match=r"concepts='sky' is a string; give a list of words, \['sky'\]"):
        run(TRIVIAL, PictureBook(1), concepts="sky")


def test_two_samples_of_one_name_are_refused():
    counting, sample = Counting(), PictureBook(1)[0]
    data = PictureBook(3)
    data._names = ("a", "b", "a")
    with pytest.raises(EvaluationError, match="two samples are named 'a'"):
        run({"it": counting}, data)
    assert counting.calls == 0  # the names are known beforehand
    with pytest.raises(EvaluationError, match="bare: two samples are named 'scene/00000'"):
        run({"it": counting}, Bare(sample, sample))


def test_a_picture_without_words_is_undefined_and_no_failure():
    sample, counting = PictureBook(1)[0], Counting()
    bare = Bare(replace(sample, name="bare", mask=sample.mask * 0, target=()), sample)
    found = run({"constant": constant(), "it": counting}, bare)
    assert counting.calls == 1 and (found.failed == "").all()
    assert found.auroc.notnull().values.tolist() == [[False, True]] * 2
    assert found.counts.isel(image=0).isnull().all() and found.target.values[0] == ""


def test_failures_have_a_reason_and_no_number(tmp_path):
    data = PictureBook(3)
    second, healed = data[1].image.tobytes(), []

    def raises(images, concepts):
        if images[0].tobytes() == second and not healed:
            raise RuntimeError("out of memory")
        return noise(0)(images, concepts)

    def with_nan(images, concepts):
        return noise(0)(images, concepts).where(lambda values: values < 0.9)

    def bare(images, concepts):
        return noise(0)(images, concepts).values

    def fewer(images, concepts):
        return noise(0)(images, concepts).isel(concept=slice(1, None))

    methods = {"raises": raises, "NaN": with_nan, "bare": bare, "fewer": fewer, "fine": noise(0)}
    with pytest.warns(EvaluationWarning, match=r"raises: 1 of 3, first scene/00001: RuntimeError: out of memory"):
        found = run(methods, data, store=tmp_path / "run.zarr")
    assert found.failed.sel({"method": "raises"}).values.tolist() == ["", "RuntimeError: out of memory", ""]
    assert "NaN or infinity" in str(found.failed.sel({"method": "NaN"}).values[0])
    assert "found ndarray, expected a DataArray (image" in str(found.failed.sel({"method": "bare"}).values[0])
    assert "give one for every word" in str(found.failed.sel({"method": "fewer"}).values[0])
    for name in protocols.METRICS:
        assert bool(found[name].sel({"method": ["NaN", "bare", "fewer"]}).isnull().all()), name
        assert bool(found[name].sel({"method": "raises"}).isel(image=1).isnull().all()), name
    assert found.auroc.sel({"method": "fine"}).notnull().all()

    healed.append(True)  # a failure is tried again
    with pytest.warns(EvaluationWarning, match="NaN: 3 of 3"):
        again = run(methods, data, store=tmp_path / "run.zarr")
    np.testing.assert_array_equal(again.auroc.sel({"method": "raises"}), again.auroc.sel({"method": "fine"}))


def test_what_was_run_stands_in_the_result():
    data = PictureBook(1)
    found = run(TRIVIAL, data, protocol="paper")
    assert json.loads(found.attrs["dataset"]) == {
        "name": "picture-book-scenes-1",
        "fingerprint": data.fingerprint,
        "images": 1,
    }
    assert json.loads(found.attrs["protocol"])["order"] == "threshold, upsample"
    assert json.loads(found.attrs["methods"])["noise"] == "noise(seed=1, grid=64)"
    assert json.loads(found.attrs["versions"])["dit-probe"] == dp.__version__
    assert found.target.values.tolist() == [", ".join(data[0].target)]


# --- the price


class Clock:
    """Stands still unless something is said to take time."""

    def __init__(self, monkeypatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("dit_probe.evaluation.pricing.perf_counter", lambda: self.now)

    def taking(self, seconds, method):
        """The method, whose calls take these seconds, the last of them ever after."""

        def slow(images, concepts):
            self.now += seconds.pop(0) if len(seconds) > 1 else seconds[0]
            return method(images, concepts)

        return slow


class Slow(PictureBook):
    """Pictures that take 5 ms to read."""

    clock: Clock

    def _read(self, position: int) -> Sample:
        assert position < 4, "the price is measured on the first pictures"
        self.clock.now += 0.005
        return super()._read(position)


@pytest.mark.parametrize("images", [930, 4276])
def test_the_price_of_a_run(monkeypatch, images):
    clock = Clock(monkeypatch)

    def broken(pictures, concepts):
        raise RuntimeError("out of memory")

    data = Slow(images)
    data.clock = clock
    methods = {
        "model": clock.taking([3.0, 0.021, 0.5, 0.02], noise(0)),
        "centre": clock.taking([0.001], centre_gaussian()),
        "broken": broken,
    }
    price = plan(methods, data, images=4)
    assert (price.images, price.measured) == (images, 4)
    assert price.first == pytest.approx({"model": 3.0, "centre": 0.001, "broken": 0})
    assert price.later == pytest.approx({"model": 0.021, "centre": 0.001, "broken": 0})
    assert price.rest == pytest.approx(0.005)
    assert price.total == pytest.approx(3 + 0.021 * (images - 1) + images * 0.006)
    assert price.failed == {"broken": "RuntimeError: out of memory"}
    lines = str(price).splitlines()
    assert lines[0] == f"{images} images of picture-book-scenes-1, from the first 4"
    assert lines[2].split("  ")[-1].strip() == {930: "23 s", 4276: "93 s"}[images]
    assert lines[6].split() == ["(the", "run)", *{930: ("28", "s"), 4276: ("118", "s")}[images]]
    assert lines[-1] == "failed: broken, RuntimeError: out of memory"


def test_the_only_call_stands_for_all(monkeypatch):
    clock = Clock(monkeypatch)
    price = plan({"it": clock.taking([7200.0, 1], constant())}, PictureBook(10), images=1)
    assert price.seconds("it") == 72_000 and "20 h 0 min" in str(price)
    with pytest.raises(EvaluationError, match="0 of 10 images"):
        plan({"it": constant()}, PictureBook(10), images=0)


def test_a_store_is_no_larger_than_its_price(tmp_path):
    data = PictureBook(66)
    price = plan(TRIVIAL, data)
    run(TRIVIAL, data, store=tmp_path / "run.zarr", limit=5)
    group = zarr.open_group(tmp_path / "run.zarr", mode="r+")
    for _, array in group.arrays():
        if array.dtype.kind == "f":  # what compresses worst
            array[...] = np.random.default_rng(0).normal(size=array.shape)
    files = [path for path in Path(tmp_path).rglob("*") if path.is_file() and path.name != "zarr.json"]
    assert 0.3 * price.nbytes < sum(path.stat().st_size for path in files) < price.nbytes
    assert price.memory > 0
