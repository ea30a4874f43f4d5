"""What the figures show, where they put it, and what they refuse."""

from __future__ import annotations

import base64
import io
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr
from PIL import Image

from dit_probe import figures, panels
from dit_probe.errors import MapError

NAMES = ["sun", "R&D <b>", "a big red hot-air balloon", "sky", "sea", "cat", "dog", "mat"]


def maps(*sizes: tuple[str, int], dtype="float32", **coords) -> xr.DataArray:
    dims, shape = zip(*sizes, ("y", 3), ("x", 4), strict=True)
    values = np.random.default_rng(0).random(shape).astype(dtype)
    names = {"concept": NAMES[: dict(sizes)["concept"]]} if "concept" in dims else {}
    attrs = {"space": "output", "softmax": "each"}
    return xr.DataArray(values, dims=dims, coords={**names, **coords}, attrs=attrs, name="saliency")


def picture(height=48, width=64) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 4, x * 3, (x + y) % 256], -1).astype("uint8")


def of(figure, kind: str) -> list:
    return [trace for trace in figure.data if trace.type == kind]


def texts(figure) -> list[str]:
    return [annotation.text for annotation in figure.layout.annotations]


def luminance(colour: str) -> float:
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def effect() -> xr.DataArray:
    """(order, share, sample), as `dit_probe.causal.curves` gives."""
    labels = {"order": ["deletion", "insertion", "random"], "share": [0, 0.25, 1]}
    values = np.random.default_rng(1).random((3, 3, 6))
    return xr.DataArray(values, labels, ("order", "share", "sample"), name="change", attrs={"units": "of 1"})


def every_figure() -> dict:
    table = xr.DataArray(np.random.default_rng(0).random((4, 3)), dims=("layer", "step"), name="mIoU")
    plain = maps(("concept", 3))
    return {
        "overlay": figures.overlay(picture(), plain),
        "small_multiples": figures.small_multiples(maps(("concept", 2), ("layer", 5)), "layer"),
        "spaces": figures.spaces(picture(), {"output": plain, "value": plain, "cross": plain}),
        "ablation": figures.ablation(table),
        "curves": figures.curves(effect()),
        "video": figures.video([picture()] * 5, maps(("concept", 2), ("frame", 3))),
    }


@pytest.mark.parametrize("name", ["overlay", "small_multiples", "spaces", "ablation", "curves", "video"])
def test_every_figure_reads_on_light_and_dark_pages(name, tmp_path):
    figure = every_figure()[name]
    assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0,0,0,0)"
    assert figure.layout.font.color == panels.INK
    assert "sendChartToCloud" in figure.layout.modebar.remove, "no button that uploads the figure"
    for trace in of(figure, "heatmap"):
        scale = trace.colorscale or figure.layout[trace.coloraxis].colorscale
        assert scale[0][1] == "#440154", "viridis"
    figure.write_html(tmp_path / "figure.html")
    page = (tmp_path / "figure.html").read_text()
    assert "plotly.js v" in page
    assert '<script src="http' not in page


def test_text_contrast():
    # The product of the two contrasts of any grey is 18.9, so no grey has 4.4 on both: WCAG AA goes to white.
    assert contrast(panels.INK, "#ffffff") >= 4.5
    assert contrast(panels.INK, "#111111") >= 4.1
    assert contrast("#ffffff", "#222222") >= 7


def test_overlay_shows_the_image_then_every_concept_over_it():
    values = maps(("sample", 1), ("concept", 3))
    figure = figures.overlay(Image.fromarray(picture()), values)
    assert len(of(figure, "image")) == 4
    heats = of(figure, "heatmap")
    for index, trace in enumerate(heats):
        np.testing.assert_array_equal(trace.z, values[0, index])
        assert (trace.xaxis, trace.yaxis) == (f"x{index + 2}", f"y{index + 2}")
        assert trace.opacity == 0.6
    assert "concept R&amp;D &lt;b&gt;<br>y %{y}, x %{x}<br><b>%{z:.4g}</b>" in heats[1].hovertemplate
    assert texts(figure)[:3] == ["image", "sun", "R&amp;D &lt;b&gt;"]
    axis = figure.layout.coloraxis
    assert (axis.cmin, axis.cmax) == (float(values.min()), float(values.max()))
    assert axis.colorbar.title.text == "output space<br>softmax over concepts"


def test_picture_and_map_cover_the_same_place():
    image = of(figures.overlay(picture(48, 64), maps(("concept", 2))), "image")[0]
    assert image.x0 - image.dx / 2 == pytest.approx(-0.5)
    assert image.x0 + 63.5 * image.dx == pytest.approx(3.5)
    assert image.y0 + 47.5 * image.dy == pytest.approx(2.5)
    # A picture too large to embed whole is embedded smaller and covers the same patches.
    large = of(figures.overlay(np.zeros((900, 1200, 3), "uint8"), maps(("concept", 2))), "image")[0]
    assert large.x0 + 511.5 * large.dx == pytest.approx(3.5)
    assert large.y0 + 383.5 * large.dy == pytest.approx(2.5)


@pytest.mark.parametrize(("shape", "ratio"), [((48, 64), 1.0), ((96, 64), 2.0)])
def test_picture_pixels_are_square(shape, ratio):
    layout = figures.overlay(picture(*shape), maps(("concept", 2))).layout
    assert layout.yaxis.scaleanchor == "x"
    assert layout.yaxis.scaleratio == pytest.approx(ratio)
    wide, high = layout.xaxis.domain, layout.yaxis.domain
    across = (wide[1] - wide[0]) * (layout.width - layout.margin.l - layout.margin.r)
    down = (high[1] - high[0]) * (layout.height - layout.margin.t - layout.margin.b)
    assert down / across == pytest.approx(shape[0] / shape[1], rel=0.02)


@pytest.mark.parametrize("concepts", range(1, 9))
def test_panels_wrap_and_never_overlap(concepts):
    layout = figures.overlay(picture(), maps(("concept", concepts))).layout
    boxes = []
    for panel in range(concepts + 1):
        number = "" if panel == 0 else panel + 1
        boxes.append((*layout[f"xaxis{number}"].domain, *layout[f"yaxis{number}"].domain))
    for index, (left, right, bottom, top) in enumerate(boxes):
        assert 0 <= left < right <= 1
        assert -1e-9 <= bottom < top <= 1
        for other in boxes[:index]:
            assert right <= other[0] or left >= other[1] or top <= other[2] or bottom >= other[3]
    assert layout.width <= 1200
    assert len({box[2] for box in boxes}) == (1 if concepts < 5 else 2)


def test_own_scales():
    values = maps(("concept", 2))
    figure = figures.overlay(picture(), values, shared=False)
    for index, trace in enumerate(of(figure, "heatmap")):
        assert (trace.zmin, trace.zmax) == (float(values[index].min()), float(values[index].max()))
        assert trace.showscale is False
    film = maps(("concept", 2), ("frame", 3))
    first = of(figures.video(None, film, shared=False), "heatmap")[0]
    assert (first.zmin, first.zmax) == (float(film[0].min()), float(film[0].max()))


def test_names_that_differ_by_sample():
    values = maps(("sample", 2), ("concept", 2)).drop_vars("concept")
    values = values.assign_coords(concept_name=(("sample", "concept"), [["sun", "sea"], ["cat", "dog"]]))
    assert texts(figures.overlay(None, values.isel(sample=1))) == ["cat", "dog"]
    assert texts(figures.overlay(None, values.isel(sample=1).drop_vars("concept_name"))) == ["concept 0", "concept 1"]


def test_small_multiples_by_layer_and_step():
    values = maps(("layer", 5), ("concept", 2), layer=[3, 4, 5, 6, 9])
    figure = figures.small_multiples(values)
    assert len(figure.data) == 10
    np.testing.assert_array_equal(figure.data[7].z, values.isel(layer=2, concept=1))
    assert "layer 5" in figure.data[7].hovertemplate
    assert texts(figure) == ["sun", "R&amp;D &lt;b&gt;", "3", "4", "5", "6", "9", "<i>layer</i>"]
    timed = maps(("concept", 2), ("step", 2), step=[0, 3], timestep=("step", [999.0, 250.5]))
    figure = figures.small_multiples(timed, "step")
    assert "3<br>t 250.5" in texts(figure)
    assert "step 3 (t 250.5)" in figure.data[1].hovertemplate
    assert len(figures.small_multiples(maps(("concept", 2), ("layer", 1))).data) == 2


def test_spaces_scale_each_space_by_itself():
    chosen = {"output": maps(("concept", 2)), "cross": maps(("concept", 2)) * 50 - 9}
    figure = figures.spaces(picture(), chosen)
    assert len(of(figure, "image")) == 6
    heats = of(figure, "heatmap")
    assert [trace.coloraxis for trace in heats] == ["coloraxis", "coloraxis2"] * 2
    assert figure.layout.coloraxis2.cmin == float(chosen["cross"].min())
    assert heats[3].xaxis == "x6"
    assert "space cross<br>concept R&amp;D" in heats[3].hovertemplate
    constant = xr.full_like(chosen["output"], 0.5)
    assert figures.spaces(None, {"output": constant}).layout.coloraxis.colorbar.ticktext == ("0.50", "0.50")
    with pytest.raises(MapError, match="Compare the same concepts"):
        figures.spaces(picture(), {"output": maps(("concept", 2)), "cross": maps(("concept", 3))})
    with pytest.raises(MapError, match="no maps to compare"):
        figures.spaces(picture(), {})


def test_ablation_leaves_gaps_and_averages_what_is_there():
    values = np.arange(12.0).reshape(4, 3)
    values[1], values[2, 0] = np.nan, np.nan
    coords = {"layer": [0, 5, 6, 9], "timestep": ("step", [900.0, 500.0, 100.0])}
    table = xr.DataArray(values, dims=("layer", "step"), coords=coords, name="AUROC", attrs={"units": "%"})
    heat, over_steps, over_layers = figures.ablation(table).data
    np.testing.assert_array_equal(heat.z, values.T)
    assert heat.x == ("0", "5", "6", "9")
    assert figures.ablation(table).layout.xaxis.type == "category"
    np.testing.assert_allclose(over_steps.y, [1.0, np.nan, 7.5, 10.0])
    np.testing.assert_allclose(over_layers.x, np.nanmean(values, 0))
    assert heat.colorbar.title.text == "AUROC [%]"
    assert figures.ablation(table.assign_coords(step=[0, 1, 2])).data[0].y[0] == "0 (t 900)"
    figures.ablation(table.isel(step=[0]))


def test_curves_have_a_line_and_a_band_an_order():
    score = effect()
    score[0, 1, 2:] = np.nan  # samples without the concept are left out of the mean
    figure = figures.curves(score)
    bands, lines = figure.data[::2], figure.data[1::2]
    assert [line.name for line in lines] == ["deletion", "insertion", "random"]
    for band, line, values in zip(bands, lines, score.values, strict=True):
        assert list(line.x) == [0, 0.25, 1]
        np.testing.assert_allclose(line.y, np.nanmean(values, axis=1))
        low, high = np.split(np.asarray(band.y), 2)
        assert (low < line.y).all() and (line.y < high[::-1]).all()
        assert contrast(line_colour(line), "#ffffff") >= 3 and contrast(line_colour(line), "#111111") >= 3
    assert figure.layout.yaxis.title.text == "change [of 1]"
    alone = figures.curves(score.isel(sample=0, drop=True))
    np.testing.assert_array_equal(alone.data[1].y, score[0, :, 0])
    with pytest.raises(MapError, match=r"several along region \(2\)"):
        figures.curves(score.expand_dims(region=["inside", "outside"]))


def line_colour(line) -> str:
    return "#" + "".join(f"{int(part):02x}" for part in line.line.color[4:-1].split(","))


def test_video_shows_the_map_nearest_in_time():
    values = maps(("concept", 2), ("frame", 4))
    frames = [np.full((12, 16, 3), 10 * index, "uint8") for index in range(13)]
    figure = figures.video(frames, values)
    assert len(figure.frames) == 13
    assert [step.label for step in figure.layout.sliders[0].steps] == [str(index) for index in range(13)]
    for index, nearest in {0: 0, 1: 0, 3: 1, 4: 1, 6: 2, 11: 3, 12: 3}.items():
        heats = of(figure.frames[index], "heatmap")
        np.testing.assert_array_equal(heats[1].z, values[1, nearest])
        shown = of(figure.frames[index], "image")[0].source
        with Image.open(io.BytesIO(base64.b64decode(shown.split(",")[1]))) as image:
            assert image.getpixel((0, 0)) == (10 * index,) * 3
    assert [trace.type for trace in figure.data] == [trace.type for trace in figure.frames[0].data]
    assert len(figures.video(None, values).frames) == 4
    with pytest.raises(MapError, match="3 frames for 4 frames of maps"):
        figures.video(frames[:3], values)


def test_images_of_every_kind():
    expected = picture()
    floats = (expected / 255).astype("float32")
    with_sample = xr.DataArray(expected[None], dims=("sample", "image_y", "image_x", "channel"))
    opaque = np.dstack([expected, np.full((48, 64), 255, "uint8")])
    for image in (expected, floats, with_sample, opaque, Image.fromarray(expected)):
        np.testing.assert_array_equal(panels.pixels(image), expected)
    grey = panels.pixels(Image.fromarray(expected[..., 0]))
    np.testing.assert_array_equal(grey, panels.pixels(expected[..., 0]))
    with pytest.raises(MapError, match=r"must be \(y, x, 3\), found \(3, 48, 64\)"):
        panels.pixels(expected.transpose(2, 0, 1))
    with pytest.raises(MapError, match=r"floats in 0\.\.1; found float32 in 0\.\.189"):
        panels.pixels(floats * 255)
    with pytest.raises(MapError, match=r"found int64"):
        panels.pixels(expected.astype("int64"))


def test_embedded_pictures_are_lossless_while_small():
    def decoded(uri):
        return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))

    np.testing.assert_array_equal(np.asarray(decoded(panels.data_uri(picture()))), picture())
    noise = np.random.default_rng(0).integers(0, 256, (700, 1400, 3), dtype="uint8")
    uri = panels.data_uri(noise)
    assert uri.startswith("data:image/jpeg")
    assert decoded(uri).size == (512, 256)


def test_what_no_figure_can_show_is_refused():
    with pytest.raises(MapError, match=r"several along sample \(2\).*\.isel\(sample=0\)"):
        figures.overlay(picture(), maps(("sample", 2), ("concept", 2)))
    with pytest.raises(MapError, match=r"dit_probe\.figures\.video"):
        figures.overlay(picture(), maps(("concept", 2), ("frame", 3)))
    with pytest.raises(MapError, match=r"without layer; it needs \(concept, layer, y, x\)"):
        figures.small_multiples(maps(("concept", 2)), "layer")
    with pytest.raises(MapError, match=r"must be an xarray\.DataArray"):
        figures.overlay(picture(), np.zeros((2, 3, 4)))
    with pytest.raises(MapError, match="nothing but NaN"):
        figures.overlay(picture(), maps(("concept", 2)) * np.nan)
    with pytest.raises(MapError, match="table has dims"):
        figures.ablation(maps(("concept", 2)))
    partly = maps(("concept", 2))
    partly[0] = np.nan
    figures.overlay(picture(), partly)
    figures.overlay(picture(), partly, shared=False)


def test_lazy_maps_are_loaded():
    lazy = maps(("concept", 2)).chunk({"concept": 1})
    assert len(figures.overlay(picture(), lazy).data) == 5


def test_figures_need_no_torch():
    code = (
        "import sys, types; package = types.ModuleType('dit_probe'); package.__path__ = ['dit_probe']\n"
        "sys.modules['dit_probe'] = package; import dit_probe.figures\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
