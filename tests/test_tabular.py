"""What a notebook shows of a run, a plan, a probe and a verification."""

from __future__ import annotations

import re

import pytest

import dit_probe as dp
from dit_probe import verification
from dit_probe.tabular import Table
from dit_probe.testing import tiny_pipeline

EVIL = "<script>"


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("flux")


@pytest.fixture(scope="module")
def probe():
    return dp.Probe([EVIL, "sky"], record=["o_x", "o_c"], embed="mean_tokens")


def cells(html: str) -> list[str]:
    return re.findall(r"<t[dh]>(.*?)</t[dh]>", html)


def test_a_plan_is_a_table_with_its_price(pipe, probe):
    plan = probe.plan(pipe, height=16, width=16, steps=2)
    html = plan._repr_html_()
    assert {"variable", "o_x", "o_c", "0-2", "0-1"} <= set(cells(html))
    assert "1 sample(s), " in html and "before compression" in str(plan)


def test_a_probe_is_its_fields_and_names_stay_text(probe):
    html = (probe | dp.Probe(record=["x"]))._repr_html_()
    assert html.count("<table>") == 2 and "mean_tokens" in cells(html) and "Probe" in cells(html)
    assert EVIL not in html and "&lt;script&gt;" in html


def test_a_run_says_what_it_records_and_where(pipe, probe, tmp_path):
    run = dp.trace(pipe, probe, store=tmp_path / "run.zarr", progress=False)
    before = "of FluxTransformer2DModel", "Probe", "o_x o_c", str(tmp_path / "run.zarr"), "nothing yet"
    assert tuple(cells(run._repr_html_())[1::2]) == before
    with run:
        pipe("a sun", height=16, width=16, num_inference_steps=1)
    assert cells(run._repr_html_())[-1] == f"{dp.schema.human(run.bytes_written)} before compression"
    assert repr(run) == str(run) and "run.zarr" in repr(run)


def test_a_verification_is_a_row_a_layer():
    layer = verification.Layer(0, "joint", "blocks.0", {"replay_o": 1e-7, "equation": 1.0})
    found = verification.Verification("flux", "Toy", "float32", 1e-5, True, (layer,))
    html = found._repr_html_()
    assert cells(html)[:3] == ["layer", "kind", "path"] and "WRONG" in cells(html) and "1.0e-07" in cells(html)
    assert "<caption>Toy as flux" in html and "1 checks fail" in html


def test_rows_must_be_of_one_length():
    with pytest.raises(ValueError, match="zip"):
        Table([("a", "b"), ("c",)]).text()
