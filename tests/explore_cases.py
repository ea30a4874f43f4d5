"""Small traces that nobody painted, and the explorer served to a browser: what the tests of the explorer share."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from dit_probe import store
from dit_probe.schema import Layout, Sample, Variable, token_dims

EVIL = '<script>window.stolen = 1</script><img src=x onerror="window.stolen=1">'
"""A concept that is text, whatever it looks like."""

LAYERS, STEPS, ROWS, COLUMNS = (0, 1, 3, 4), (0, 1, 2), 4, 6
RAW = ("o_x", "o_c", "v_x", "v_c", "q_x", "k_c")
WORDS = ("sun", "boat", EVIL)


def layout(frames: int = 1, branch: bool = False, scores: bool = False, words: int = len(WORDS)) -> Layout:
    place = np.indices((frames, ROWS, COLUMNS)).reshape(3, -1)
    sizes = {"step": len(STEPS), "layer": len(LAYERS), "image_token": place.shape[1], "concept": words}
    sizes |= {"head": 2, "head_dim": 4, "prompt_token": 0}
    coords: dict[str, Any] = {"step": (("step",), np.array(STEPS)), "layer": (("layer",), np.array(LAYERS))}
    coords["timestep"] = (("step",), np.array([1000.0, 600.0, 200.0]))
    coords |= {f"patch_{name}": (("image_token",), axis) for name, axis in zip(("frame", "y", "x"), place, strict=True)}
    if branch:
        sizes["branch"] = 2
        coords["branch"] = (("branch",), np.array(["cond", "uncond"]))
    dims = {"score_output": ("concept", "image_token")} if scores else {name: token_dims(name) for name in RAW}
    variables = [Variable(name, kept, "float32", LAYERS, STEPS) for name, kept in dims.items()]
    return Layout(tuple(variables), sizes, coords, {"identity": {"model": "toy"}})


def trace(
    where: Any, *, samples: int = 2, frames: int = 1, words: tuple[str, ...] = WORDS, seed: int = 0, **options: Any
) -> Any:
    """Write a trace of random vectors, with pictures, and say where it is."""
    planned = layout(frames, words=len(words), **options)
    writer = store.create(where, planned)
    slots = writer.claim([Sample(f"picture {index} of {words[0]}", index, (), words) for index in range(samples)])
    rng = np.random.default_rng(seed)
    branches = ("cond", "uncond") if "branch" in planned.sizes else (None,)
    for slot in slots:
        for variable in planned.variables:
            for step in variable.steps or ():
                for layer in variable.layers or ():
                    for branch in branches:
                        values = rng.normal(size=[planned.sizes[dim] for dim in variable.dims]).astype("float32")
                        writer.write(variable.name, values, sample=slot, step=step, layer=layer, branch=branch)
    shape = (32, 48, 3) if frames == 1 else (2 * frames - 1, 32, 48, 3)
    writer.write_images(slots, [rng.integers(0, 255, shape).astype("uint8") for _ in slots])
    writer.finish(slots)
    writer.close()
    return where


def chosen(**changes: Any) -> dict[str, Any]:
    """Controls of the page as they stand at first on `trace`, but for the changes; ``_`` stands for ``-``."""
    values = {"sample": 0, "space": "output", "softmax": "each", "layers": [0, 4], "steps": [0, 2], "layer": None}
    values |= {"step": None, "heads": [], "branch": None, "concepts": [0, 1, 2], "frame": 0, "drawing": ["shared"]}
    values |= {"compare": "none", "second-sample": 0, "second-space": "same"}
    return values | {name.replace("_", "-"): value for name, value in changes.items()}


@contextlib.contextmanager
def served(application: Any, **guarded: Any) -> Iterator[str]:
    """The address of an explorer that answers in a thread, guarded as `dit_probe.explore.serve` does."""
    from werkzeug.serving import WSGIRequestHandler, make_server

    from dit_probe.explore import serving

    class Quiet(WSGIRequestHandler):
        def log_request(self, *_: Any) -> None:
            pass

    options = {"token": None, "hosts": serving.LOOPBACK, "scripts": application.csp_hashes()} | guarded
    serving.guard(application.server, **options)
    server = make_server("127.0.0.1", 0, application.server, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclasses.dataclass
class Heard:
    """What a browser complained about, and whom it asked."""

    complaints: list[str]
    foreign: list[str]


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Headless Chromium of the system; tests skip where it, or Playwright, is missing."""
    import shutil

    import pytest

    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    pytest.importorskip("axe_playwright_python", reason="needs axe: pip install axe-playwright-python")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium: apt install chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


def listen(page: Any) -> Heard:
    """Remember errors of a page, and requests that leave it."""
    heard = Heard([], [])
    page.on("console", lambda said: heard.complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: heard.complaints.append(str(error)))

    def asked(request: Any) -> None:
        if not request.url.startswith(("http://127.0.0.1:", "data:", "blob:", "file:")):
            heard.foreign.append(request.url)

    page.on("request", asked)
    return heard


def barriers(page: Any) -> list[str]:
    """Serious and critical findings of axe."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {node['html'][:120]}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]
