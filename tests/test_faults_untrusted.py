"""Stores, data and models from somebody else: nothing is executed, and nothing is read beyond a bound."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_cases import sample, whole
from typer.testing import CliRunner

from dit_probe import store
from dit_probe.cli import app
from dit_probe.errors import ModelError, StoreError
from dit_probe.loading import load_pipeline
from dit_probe.store import limits


class Bomb:
    """What a pickle can do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    whole(tmp_path / "run.zarr")
    return tmp_path / "run.zarr"


def rewritten(path: Path, name: str, **changes: Any) -> None:
    """Change the metadata of an array where readers look: in the group, and in its own file."""
    group = json.loads((path / "zarr.json").read_text())
    group["consolidated_metadata"]["metadata"][name] |= changes
    (path / "zarr.json").write_text(json.dumps(group))
    (path / name / "zarr.json").write_text(json.dumps(group["consolidated_metadata"]["metadata"][name]))


def metadata(path: Path, name: str) -> dict[str, Any]:
    return json.loads((path / name / "zarr.json").read_text())


@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3 specification")
@pytest.mark.parametrize("codec", ["numcodecs.pickle", "pickle", "numcodecs.json2", "numcodecs.zlib", "nosuch"])
@pytest.mark.parametrize("name", ["prompt", "o_x"])
def test_codecs_are_those_of_our_stores(hostile: Path, codec: str, name: str):
    added = {"name": codec, "configuration": {}}
    rewritten(hostile, name, codecs=[*metadata(hostile, name)["codecs"], added])
    for read in (store.open, store.info, store.damaged):
        with pytest.raises(StoreError):
            read(hostile)


def test_objects_are_not_read(hostile: Path, tmp_path: Path):
    """Zarr's older format has them, as pickles."""
    bomb = pickle.dumps(np.array([Bomb(tmp_path / "executed")], dtype=object))
    old = {
        "zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "fill_value": 0, "order": "C", "compressor": None,
        "filters": [{"id": "pickle", "protocol": 5}],
    }  # fmt: skip
    old_store = tmp_path / "old"
    (old_store / "prompt").mkdir(parents=True)
    (old_store / ".zgroup").write_text('{"zarr_format": 2}')
    (old_store / ".zattrs").write_text('{"format": "dit-probe", "format_version": 1}')
    for folder in (hostile / "prompt", old_store / "prompt"):
        (folder / ".zarray").write_text(json.dumps(old))
        (folder / "0").write_bytes(bomb)
    store.open(hostile).load()
    with pytest.raises(StoreError, match="not a dit-probe store"):
        store.open(old_store)
    for dtype in ("|O", "object", {"name": "object"}, "vlen-bytes", "variable_length_bytes"):
        rewritten(hostile, "prompt", data_type=dtype)
        with pytest.raises(StoreError):
            store.open(hostile)
    assert not (tmp_path / "executed").exists()


def test_what_is_huge_stays_on_disk(hostile: Path):
    """Petabytes are declared, and a few records of them are there."""
    for name in ("o_x", "o_c"):
        found = metadata(hostile, name)
        found["chunk_grid"]["configuration"]["chunk_shape"][-1] = 2**22
        rewritten(hostile, name, shape=[*found["shape"][:-1], 10**12], chunk_grid=found["chunk_grid"])
    ds = store.open(hostile)
    assert ds.o_x.nbytes > 10**14 and ds.p.load().notnull().any()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("timestep", {"shape": [10**12]}, r"labels and coordinates of \d+ bytes; more than 1073741824"),
        ("prompt", {"shape": [10**12]}, r"labels and coordinates"),
        (
            "seed",
            {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [10**12]}}},
            "chunk of 'seed' has",
        ),
        (
            "o_x",
            {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, 1, 1, 10**6, 10**6, 1]}}},
            "a chunk of 'o_x' has 2000000000000 bytes; more than 4294967296 are not read",
        ),
    ],
)
def test_what_would_be_read_at_once_is_bounded(hostile: Path, name: str, changes: dict[str, Any], message: str):
    rewritten(hostile, name, **changes)
    for read in (store.open, store.info):
        with pytest.raises(StoreError, match=message):
            read(hostile)


def test_metadata_is_bounded(hostile: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "METADATA_BYTES", 2000)
    with pytest.raises(StoreError, match=r"zarr\.json has \d+ bytes of metadata; more than 2000 are not read"):
        store.open(hostile)
    monkeypatch.undo()
    deep = '{"zarr_format": 3, "node_type": "group", "attributes": ' + '{"a":' * 100_000 + "1" + "}" * 100_001
    (hostile / "zarr.json").write_text(deep)
    with pytest.raises(StoreError, match="cannot be read"):
        store.open(hostile)
    for text in ("", "null", "[1]", '{"zarr_format": 3}', "\x00\xff"):
        (hostile / "zarr.json").write_text(text)
        with pytest.raises(StoreError):
            store.open(hostile)


def test_names_lead_nowhere_else(tmp_path: Path):
    """An array called ../secret is no file beside the store."""
    path = tmp_path / "run.zarr"
    whole(path)
    secret = tmp_path / "secret"
    whole(secret)
    group = json.loads((path / "zarr.json").read_text())
    inner = group["consolidated_metadata"]["metadata"]
    inner["../secret/o_c"] = inner.pop("o_c")
    (path / "zarr.json").write_text(json.dumps(group))
    try:
        ds = store.open(path)
    except (StoreError, ValueError):
        return
    assert not any(".." in str(name) for name in ds.variables)


def test_words_are_text_in_every_page(tmp_path: Path):
    word = "<script>alert(1)</script>"
    writer = store.create(tmp_path / "run.zarr", _scored())
    slots = writer.claim([sample(0, prompt=word, tokens=(), concepts=(word, "<img src=x onerror=alert(2)>"))])
    for layer in (0, 1):
        writer.write("score_output", np.eye(2, 6, dtype=np.float32), sample=0, step=0, layer=layer)
    writer.finish(slots)
    writer.close()
    page = tmp_path / "maps.html"
    result = CliRunner().invoke(app, ["maps", str(tmp_path / "run.zarr"), "--out", str(page)])
    assert result.exit_code == 0, result.output
    text = page.read_text()
    assert "alert(1)" in text
    assert word not in text and "<img src=x" not in text


def _scored() -> Any:
    from dit_probe.schema import Layout, Variable

    coords = {
        "step": (("step",), np.array([0])),
        "timestep": (("step",), np.array([500.0])),
        "layer": (("layer",), np.array([0, 1])),
        "kind": (("layer",), np.array(["joint", "joint"])),
        "patch_frame": (("image_token",), np.zeros(6, int)),
        "patch_y": (("image_token",), np.arange(6) // 3),
        "patch_x": (("image_token",), np.arange(6) % 3),
    }
    variable = Variable("score_output", ("concept", "image_token"), "float32", (0, 1))
    sizes = {"step": 1, "layer": 2, "concept": 2, "image_token": 6}
    return Layout((variable,), sizes, coords, {"identity": {"model": "toy", "family": "flux"}})


def test_weights_are_safetensors_alone(pipelines: Any, tmp_path: Path):
    folder = tmp_path / "model"
    pipelines("sd3").save_pretrained(folder, safe_serialization=True)
    for file in folder.rglob("*.safetensors"):
        file.with_name(file.name.replace("model.safetensors", "model.bin").replace(".safetensors", ".bin")).write_bytes(
            pickle.dumps(Bomb(tmp_path / "executed"))
        )
    load_pipeline(str(folder), "cpu")  # the pickles are there, and are not looked at
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(ModelError, match="could not be loaded"):
        load_pipeline(str(folder), "cpu")
    assert not (tmp_path / "executed").exists()


def test_a_store_of_a_later_version_is_refused(hostile: Path):
    group = json.loads((hostile / "zarr.json").read_text())
    group["attributes"] |= {"format_version": 2}
    (hostile / "zarr.json").write_text(json.dumps(group))
    for read in (store.open, store.info, lambda path: store.create(path, _scored(), mode="a")):
        with pytest.raises(StoreError, match="format version 2, this dit-probe reads up to 1"):
            read(hostile)
