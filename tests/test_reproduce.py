"""The paper's tables as commands: printed numbers, rows, resumption, pages."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from typer.testing import CliRunner

import dit_probe as dp
from dit_probe import reproduce
from dit_probe.cli import app
from dit_probe.datasets.samples import DatasetError
from dit_probe.datasets.segmentation import PictureBook, PictureBookClips
from dit_probe.protocols import EvaluationError
from dit_probe.reproduce import STUDIES, Setting, Source, printed
from dit_probe.testing import tiny_pipeline

OTHER_METRIC = ("LRP", "Partial-LRP", "Rollout", "ViT Attention", "GradCAM", "TextSpan", "TransInterp", "OVAM")
TRIVIAL = ("random weights", "noise", "constant", "centre Gaussian", "image saliency")


def pictures(objects: int | None = 1, count: int = 2) -> Source:
    parts = (PictureBook(2, 8, size=32, objects=objects), PictureBook(count, 7, size=32, objects=objects))
    return Source("other", *parts, drawn=True)


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    folder = tmp_path_factory.mktemp("numbers")
    pipe = tiny_pipeline("flux")
    pipe.default_sample_size = 32 // pipe.vae_scale_factor
    return Setting(pipe, [pictures()], [pictures(2)], folder, progress=False)


@pytest.fixture(scope="module", params=STUDIES)
def found(request, setting: Setting) -> reproduce.Reproduction:
    return reproduce.reproduce(request.param, setting)


def calls(pipe) -> list[int]:
    """A list that grows with every call of the transformer."""
    made: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: made.append(1))
    return made


def test_the_printed_miou_follows_from_the_printed_accuracy_where_the_notes_say_so():
    tables = [printed.methods("table2", "imagenet"), printed.SPACES, printed.ATTENDS]
    other = 0
    for name, (accuracy, iou, *_) in ((name, row) for table in tables for name, row in table.items()):
        pooled = 100 * (accuracy / 100) / (2 - accuracy / 100)
        if name.split(" | ")[0] in OTHER_METRIC or name == "ConceptAttention | SD3.5 DiT":
            assert abs(pooled - iou) > 0.5, name
            other += 1
        else:
            assert pooled == pytest.approx(iou, abs=0.03), name
    assert other == 9


def test_tables_share_the_rows_that_the_paper_shares():
    assert printed.methods("table1", "voc").items() <= printed.methods("table2", "voc").items()
    best = printed.methods("table1", "imagenet")["ConceptAttention | Flux DiT"]
    assert best == printed.SPACES["output, softmax"] == printed.ATTENDS["both"] == (83.07, 71.04, 90.45)
    cross = printed.methods("table1", "imagenet")["Cross attention | Flux DiT"]
    assert cross == printed.SPACES["cross, softmax"]


def test_every_study_has_trivial_rows_and_intervals(found: reproduce.Reproduction):
    assert found.panels
    for panel in found.panels:
        assert {"random weights", "noise"} <= set(panel.rows) or "background words" in panel.title
        cells = [panel.cell(row, metric) for row in panel.rows for metric in panel.columns.values()]
        assert all(cell["low"] <= cell["mean"] <= cell["high"] for cell in cells if cell["n"])
        assert sum(cell["n"] > 0 for cell in cells) > len(cells) / 2
        assert any("Drawn scenes stand in" in note for note in panel.notes)
        assert set(panel.beside) <= set(panel.rows)
        assert set(panel.beside.values()) <= set(panel.printed)


def test_every_study_is_a_table_a_csv_and_a_page(found: reproduce.Reproduction, tmp_path: Path):
    page = found.write(tmp_path)
    text, html = (tmp_path / f"{found.name}.md").read_text(), page.read_text()
    rows = list(csv.DictReader(io.StringIO((tmp_path / f"{found.name}.csv").read_text())))
    assert "Plotly.newPlot(" in html
    assert "<script src" not in html
    for panel in found.panels:
        assert panel.title in text
        assert panel.title in html
        for numbers in panel.printed.values():
            assert f"{numbers[0]:.2f}" in text
        of_panel = [row for row in rows if row["panel"] == panel.title]
        expected = len(panel.rows) + sum(row not in panel.beside.values() for row in panel.printed)
        assert len(of_panel) == expected * len(panel.columns)
        first = panel.rows[0]
        metric = next(iter(panel.columns.values()))
        row = next(row for row in of_panel if row["row"] == first and row["metric"] == metric)
        assert float(row["mean"]) == pytest.approx(panel.cell(first, metric)["mean"], rel=1e-5, nan_ok=True)


def test_a_study_that_is_known_runs_no_model(setting: Setting):
    for name in STUDIES:
        reproduce.reproduce(name, setting)
    made = calls(setting.pipe)
    for name in STUDIES:
        reproduce.reproduce(name, setting)
    assert not made


def test_rows_of_one_pass_and_of_one_study_are_computed_once(tmp_path: Path):
    pipe = tiny_pipeline("flux")
    pipe.default_sample_size = 32 // pipe.vae_scale_factor
    made = calls(pipe)
    setting = Setting(pipe, [pictures(count=3)], (), tmp_path, progress=False)
    reproduce.reproduce("table4", setting)
    # The random twin is a copy with weights and hooks of its own.
    assert len(made) == 3
    reproduce.reproduce("figure4", setting)
    timesteps, chosen, choosing = 5 * 3, 3, 5 * 2
    assert len(made) == 3 + timesteps + chosen + choosing


def test_an_interrupted_study_goes_on_where_it_stopped(tmp_path: Path, monkeypatch):
    pipe = tiny_pipeline("flux")
    pipe.default_sample_size = 32 // pipe.vae_scale_factor
    setting = Setting(pipe, (), [pictures(2, count=3)], tmp_path, progress=False)
    whole = reproduce.reproduce("specificity", Setting(pipe, (), setting.several, tmp_path / "whole", progress=False))
    read = PictureBook._read

    def stopped(self, position):
        if position == 2 and self.name.endswith("-7"):
            raise KeyboardInterrupt
        return read(self, position)

    with monkeypatch.context() as patch:
        patch.setattr(PictureBook, "_read", stopped)
        with pytest.raises(KeyboardInterrupt):
            reproduce.reproduce("specificity", setting)
    made = calls(pipe)
    assert reproduce.reproduce("specificity", setting).csv() == whole.csv()
    assert len(made) == 1


def test_a_folder_of_another_model_is_refused(setting: Setting):
    reproduce.reproduce("table5", setting)
    other = dp.testing.tiny_pipeline("sd3")
    with pytest.raises(EvaluationError, match="another evaluation"):
        reproduce.reproduce("table5", Setting(other, setting.single, (), setting.folder, progress=False))


def test_a_model_that_the_paper_does_not_have_stands_beside_no_printed_row(tmp_path: Path):
    clips = [PictureBookClips(count, seed, size=32, frames=5, objects=1) for count, seed in ((1, 8), (2, 7))]
    setting = Setting(tiny_pipeline("cogvideox"), [Source("other", *clips, drawn=True)], (), tmp_path, progress=False)
    (panel,) = reproduce.reproduce("table1", setting).panels
    assert not panel.beside
    assert "ConceptAttention, reference code" not in panel.rows
    assert panel.cell("ConceptAttention", "auroc")["n"] == 2


def test_what_cannot_be_reproduced_is_refused(setting: Setting, tmp_path: Path):
    with pytest.raises(EvaluationError, match="no study 'table6': there are table1"):
        reproduce.reproduce("table6", setting)
    with pytest.raises(EvaluationError, match="table3 needs pictures of several classes"):
        reproduce.reproduce("table3", Setting(setting.pipe, setting.single, (), tmp_path))
    with pytest.raises(DatasetError, match="no such file or folder"):
        reproduce.source("nowhere", several=True, count=3)


def test_a_data_set_of_files_is_split_into_pictures_to_choose_on_and_pictures_to_report(tmp_path: Path):
    for scene in PictureBook(30, objects=1):
        for folder, pixels in (("images", scene.image), ("masks", (scene.mask > 0).astype("uint8"))):
            (tmp_path / folder).mkdir(exist_ok=True)
            from PIL import Image

            Image.fromarray(pixels).save(tmp_path / folder / f"{scene.name.split('/')[1]}.png")
    found = reproduce.source(str(tmp_path), several=False, count=12, words="thing")
    names = [{part[k].name for k in range(len(part))} for part in (found.choosing, found.reported)]
    assert not names[0] & names[1]
    assert len(names[1]) == 12
    assert 0 < len(names[0]) < 12


def test_the_commands(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    result = runner.invoke(app, ["reproduce", "table5", "--model", "sd35-picturebook", "--count", "2"])
    assert result.exit_code == 0, result.output
    assert "83.07" in result.output
    assert (tmp_path / "reproduction" / "sd35-picturebook" / "table5.html").exists()
    arguments = ["evaluate", "numbers.zarr", "--model", "sd35-picturebook", "--count", "3", "--metrics", "auroc,ap"]
    result = runner.invoke(app, [*arguments, "--plan"])
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "numbers.zarr").exists()
    result = runner.invoke(app, [*arguments, "--csv", "means.csv"])
    assert result.exit_code == 0, result.output
    assert "centre Gaussian" in result.output
    assert (tmp_path / "means.csv").read_text().startswith("method,metric")
    assert runner.invoke(app, ["evaluate", "numbers.zarr", "--data", "nowhere"]).exit_code == 2
    assert runner.invoke(app, ["reproduce", "table9"]).exit_code == 2
