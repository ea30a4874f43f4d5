"""Executes the tutorials when the site is built, and makes a page of each: ``hooks`` of mkdocs.yml.

Scripts run in processes of their own, one a core, in a folder that is thrown away. What came of one is kept in
``.tutorials`` until it, this package or a shipped model changes. One that fails fails the build.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from plotly.offline import get_plotlyjs
from running import cells

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SCRIPTS = ROOT / "tutorials"
KEPT = ROOT / ".tutorials"
LISTED = "<!-- Every tutorial is listed here when the site is built. -->"


def on_files(files: Any, config: Any) -> Any:
    """Add a page, a figure and the script itself for every tutorial."""
    scripts = sorted(SCRIPTS.glob("*.py"))
    same = state()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(scripts, pool.map(lambda script: result(script, same), scripts), strict=True))
    for script, parts in found.items():
        drawn = [part["figure"]["svg"] for part in parts if part["figure"]]
        made = {f"{script.stem}.md": page(script, parts), script.name: script.read_text(encoding="utf-8")}
        made |= {f"{script.stem}{at or ''}.svg": svg for at, svg in enumerate(drawn)}
        for name, content in made.items():
            files.append(File.generated(config, f"tutorials/{name}", content=content))
    files.append(File.generated(config, "assets/plotly.min.js", content=get_plotlyjs()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put the list of tutorials into its page, in the order of the navigation."""
    if LISTED not in markdown:
        return markdown
    stems = [Path(path).stem for path in _paths(config.nav) if path.startswith("tutorials/")]
    rows = []
    for stem in stems:
        if (script := SCRIPTS / f"{stem}.py").exists():
            title = cells(script.read_text(encoding="utf-8"))[0].text.split("\n")[0].lstrip("# ")
            rows.append(f"* [{title}]({stem}.md)")
    return markdown.replace(LISTED, "\n".join(rows))


def state() -> str:
    """A hash of all that decides what a tutorial prints, but for its own text."""
    digest = hashlib.sha256(os.environ.get("DIT_PROBE_MODEL", "").encode())
    parts = [HERE / "running.py", HERE / "still.py", ROOT / "constraints.txt"]
    for package in ("dit_probe", "probes"):
        parts += sorted(p for p in (ROOT / package).rglob("*") if p.is_file() and p.suffix != ".pyc")
    for part in parts:
        digest.update(part.read_bytes())
    return digest.hexdigest()


def result(script: Path, same: str) -> list[dict[str, Any]]:
    """What `running.run` makes of a script, from what is kept where nothing has changed.

    Raises:
        PluginError: the script failed, with what it said.
    """
    key = hashlib.sha256(same.encode() + script.read_bytes()).hexdigest()[:16]
    kept = KEPT / f"{script.stem}-{key}.json"
    if not kept.exists():
        threads = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "result.json"
            command = [sys.executable, str(HERE / "running.py"), str(script), str(made)]
            done = subprocess.run(command, cwd=folder, env=os.environ | threads, capture_output=True, text=True)
            if done.returncode:
                raise PluginError(f"the tutorial {script.name} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
            KEPT.mkdir(exist_ok=True)
            for old in KEPT.glob(f"{script.stem}-*.json"):
                old.unlink()
            kept.write_bytes(made.read_bytes())
    return json.loads(kept.read_text(encoding="utf-8"))


def page(script: Path, parts: list[dict[str, Any]]) -> str:
    """The Markdown of a tutorial's page."""
    lines = ["---", "hide: [toc]", "---", ""]
    figures = 0
    for part in parts:
        if part["kind"] == "markdown":
            lines += [part["text"], ""]
            continue
        lines += ["```python", part["text"], "```", ""]
        if part["output"]:
            lines += ["```{ .text .no-copy }", part["output"].rstrip(), "```", ""]
        if part["figure"]:
            picture = f"{script.stem}{figures or ''}.svg"
            lines += [figure(part["figure"]["json"], picture, part["alt"]), ""]
            figures += 1
    name = script.name
    lines += [
        f"*The whole of it: [`tutorials/{name}`]({name}); `DIT_PROBE_MODEL=… python {name}` takes another model.*",
        "",
    ]
    return "\n".join(lines)


def figure(data: str, picture: str, alt: str) -> str:
    """A picture that docs/assets/figures.js replaces with the figure itself."""
    said = html.escape(alt, quote=True)
    safe = data.replace("</", "<\\/").replace("\n", " ")
    return "\n".join(
        [
            f'<div class="figure" tabindex="0" role="region" aria-label="{said}">',
            f'<img src="{picture}" alt="{said}">',
            f'<script type="application/json">{safe}</script>',
            "</div>",
        ]
    )


def _paths(nav: Any) -> list[str]:
    """Every page of a navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    return [path for part in (nav.values() if isinstance(nav, dict) else nav) for path in _paths(part)]
