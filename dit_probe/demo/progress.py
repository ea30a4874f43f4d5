"""How a training goes, as one page: the loss and what the averaged model draws."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import torch

from dit_probe.demo.denoiser import Denoiser, sample
from dit_probe.panels import Sheet
from dit_probe.report import Section, page

STEPS, SCALES = 16, (1.0, 3.0)
"""Sampling steps, and classifier-free guidance of each row of pictures (1 is off)."""


@torch.no_grad()
def contact_sheet(model: Denoiser, vae: object, prompts: Sequence[str], shape: tuple[int, ...]) -> np.ndarray:
    """Draw prompts, a column each; a row for each guidance, of clips a row for the first, middle and last frame.

    Args:
        model: What draws.
        vae: Its autoencoder.
        prompts: What to draw.
        shape: Of one sample's latents.

    Returns:
        (y, x, 3) uint8.
    """
    rows = []
    for scale in SCALES:
        drawn = model.decode(vae, sample(model, list(prompts), shape, STEPS, seed=0, scale=scale))
        shown = sorted({0, drawn.shape[1] // 2, drawn.shape[1] - 1})
        rows += [torch.cat(list(drawn[:, frame]), dim=1) for frame in shown]
    return torch.cat(rows, dim=0).numpy()


def write_page(
    file: Path, name: str, history: Sequence[tuple[int, float, float]], sheet: np.ndarray, prompts: Sequence[str]
) -> None:
    """Write the page of a training.

    Args:
        file: HTML file.
        name: Of the model.
        history: (step, minutes, mean loss since the last entry).
        sheet: What `contact_sheet` returned.
        prompts: Its columns.
    """
    steps, minutes, losses = np.array(history).reshape(-1, 3).T
    curve = go.Figure(go.Scatter(x=steps, y=losses, customdata=minutes, mode="lines"))
    curve.update_traces(hovertemplate="step %{x}, %{customdata:.1f} min<br>loss %{y:.4f}<extra></extra>")
    curve.update_layout(Sheet.page(1080, 320, {"l": 60, "r": 20, "t": 20, "b": 45}))
    curve.update_xaxes(title="optimiser step").update_yaxes(title="training loss", type="log")
    side = sheet.shape[1] // len(prompts)
    grid = go.Figure(go.Image(z=sheet.repeat(2, axis=0).repeat(2, axis=1)))
    middles = [2 * side * (k + 0.5) for k in range(len(prompts))]
    grid.update_xaxes(tickvals=middles, ticktext=list(prompts), tickangle=-40).update_yaxes(visible=False)
    grid.update_layout(Sheet.page(1080, 2 * sheet.shape[0] + 210, {"l": 10, "r": 10, "t": 30, "b": 170}))
    sections = [
        Section("Loss", "Mean over the batches since the last entry; the two resolutions are not comparable.", [curve]),
        Section(
            "Samples",
            f"The averaged weights, {STEPS} steps, one starting noise a column. Rows: guidance "
            f"{' and '.join(f'{scale:g}' for scale in SCALES)}; of clips the first, middle and last frame of each.",
            [grid],
        ),
    ]
    facts = {"steps": int(steps[-1]) if len(steps) else 0, "minutes": f"{minutes[-1]:.0f}" if len(minutes) else 0}
    file.write_text(page(f"Training of {name}", sections, facts=facts), encoding="utf-8")
