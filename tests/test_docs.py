"""The manual: every Python snippet of a page runs, in the order and in the folder of a reader who types it in."""

from __future__ import annotations

import importlib.util
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_probe.errors import ConceptWarning

DOCS = Path(__file__).parent.parent / "docs"
_FENCE = re.compile(r"^```python.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)

TRACED = """
import dit_probe as dp
from probes import ConceptAttention, SparseFeatures
pipe = dp.demo.load("flux-picturebook")
words = ["sun", "boat", "water"]
with dp.trace(pipe, ConceptAttention(words) | dp.Probe(record=["q_p", "k_p"]), store="run.zarr", progress=False):
    image = pipe("a sun and a boat on water", num_inference_steps=4, max_sequence_length=32).images[0]
ds = dp.open("run.zarr")
"""
TINY = """
tiny = dp.testing.tiny_model("flux")
transformer, inputs, embeddings = tiny.transformer, tiny.inputs, tiny.concepts
"""
BEFORE = {
    "tracing.md": TRACED.replace("run.zarr", "first.zarr") + TINY + "photograph = image\nautoencoder = Autoencoder()",
    "store.md": TRACED,
    "explorer.md": TRACED + "other, mask = ds, image_mask",
    "diagnostics.md": TRACED,
    "self_attention.md": TRACED,
    "evaluation.md": "import dit_probe as dp\npipe = dp.testing.tiny_pipeline('flux')\npipe.default_sample_size = 8",
}
"""What a page takes for granted."""

IN_BETWEEN = {
    "causal.md": """
import xarray as xr
image, images = whole[0], whole
mask = image_mask[::4, ::4]
masks, maps = xr.DataArray(image_mask[None], dims=("sample", "y", "x")), boat
"""
}
"""What a page takes for granted after its first snippet."""

WORDS = {"fox": "boat", "snow": "water"}
INSTEAD = {
    "tracing.md": WORDS | {"layers=[12]": "layers=[3]", "16, 17, 18": "2, 3, 4", "steps=4).images": "steps=1).images"},
    "causal.md": {'steps": 10, "guidance_scale": 3.0': 'steps": 1, "guidance_scale": 1.0',
                  "  pipe(prompt": "  whole = pipe(prompt",
                  "**call)\nboat": "**call).images\nboat", "boat, k=16": "boat, draws=1, k=16",
                  ", maps)\ncurves": ", maps, shares=(0, 0.5, 1), draws=1)\ncurves"},
    "datasets.md": WORDS | {"range(1000)": "range(2)", "FluxPipeline.from_pretrained": "flux_picturebook"},
    "explorer.md": {".run()": ""},
    "evaluation.md": {"range(19)": "range(3)", "import PascalVOC, split": "import PictureBook, split",
                      'PascalVOC("VOCdevkit", subset="single_class")': "PictureBook(4, objects=2)"},
}  # fmt: skip
"""What a reader with a larger model, or data, has and the tests have not."""

ELSEWHERE = ("dask_jobqueue", "dask_kubernetes", "openai/clip")
"""Snippets that need a cluster or weights: they are compiled and not run."""


class Autoencoder(torch.nn.Module):
    """A sparse autoencoder of flux-picturebook's residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.randn(120, 2048) / 11)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.weights)

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        return f @ self.weights.T


def snippets() -> dict[str, list[str]]:
    """Pages with snippets, by their path."""
    found = {str(page.relative_to(DOCS)): _FENCE.findall(page.read_text()) for page in sorted(DOCS.rglob("*.md"))}
    return {page: blocks for page, blocks in found.items() if blocks}


@pytest.mark.parametrize("page", snippets())
def test_every_snippet_of_a_page_runs(page: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = Path(page).name
    mask = np.zeros((64, 64), bool)
    mask[16:32, 16:32] = True
    names = {"__name__": "page", "Autoencoder": Autoencoder, "image_mask": mask, "flux_picturebook": _load}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConceptWarning)
        exec(BEFORE.get(name, ""), names)
        for number, block in enumerate(snippets()[page]):
            for theirs, ours in INSTEAD.get(name, {}).items():
                block = block.replace(theirs, ours)
            source = tmp_path / f"snippet_{number + 1}.py"  # nnsight reads what it runs
            source.write_text(block)
            code = compile(block, str(source), "exec")
            if not any(word in block for word in ELSEWHERE):
                exec(code, names)
            if number == 0:
                exec(IN_BETWEEN.get(name, ""), names)


def test_what_the_tests_replace_is_there():
    text = {Path(page).name: "\n".join(blocks) for page, blocks in snippets().items()}
    for name, pairs in INSTEAD.items():
        for theirs in pairs:
            assert theirs in text[name], f"{name}: {theirs!r}"
    assert all(any(word in blocks for blocks in text.values()) for word in ELSEWHERE)


def hook(name: str):
    """A module of the folder docs."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_command_is_on_the_page_of_commands():
    from dit_probe.cli import app

    page = hook("commands").on_page_markdown((DOCS / "api" / "cli.md").read_text(), None, None, None)
    for command in app.registered_commands:
        assert f"## {command.callback.__name__.replace('_', '-')}\n" in page
    for row in (
        "| `--seed` | `0` | Of the starting noise. |",
        "| `PICTURES` | **needed** |",
        "| `MODEL` | **needed** |",
        "| `--space` | `output` | Where image and concepts are compared. One of `output`, `value`, `cross`. |",
    ):
        assert row in page


def test_measured_numbers_come_from_the_files():
    measured = hook("measured")
    page = measured.on_page_markdown((DOCS / "benchmarks.md").read_text(), None, None, None)
    assert "<!--" not in page
    assert "| plain | 1 | 1 | 1 |" in page
    with pytest.raises(KeyError):
        measured.on_page_markdown("<!-- attend.json Flux/ratios: speed -->", None, None, None)


def _load(*_, **__):
    """In the place of a download: a demo model, that a snippet may move to a device that is not there."""
    import dit_probe as dp

    pipe = dp.demo.load("flux-picturebook")
    pipe.to = lambda *_: pipe
    return pipe
