"""The package as a whole: light to import, imports that follow the arrow, files that are read in one sitting."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dit_probe"
PROBES = ROOT / "probes"

# pipeline -> anatomy -> trace -> store -> maps -> metrics -> figures. A module imports from its own line or from those
# above it; lines after the store are the offline half.
FLOW = (
    ("errors", "schema", "tabular"),
    ("anatomy", "attention"),
    ("concepts", "stream", "probe", "planning"),
    ("pipelines", "guidance", "rehearsal", "edit", "forward", "hooks", "transfer"),
    ("store",),
    ("recording", "tracing", "encoding", "edits"),
    ("selection", "chunkwise"),
    ("maps",),
    ("self_attention", "diagnostics"),
    ("rows",),
    ("metrics", "statistics"),
    ("panels", "figures"),
    ("report",),
    ("datasets", "demo", "loading", "explore", "interop", "testing", "verification", "causal"),
    ("picture_metrics",),
    ("protocols",),
    ("methods", "dataset_tracing"),
    ("evaluation", "summary"),
    ("reproduce",),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(FLOW) for name in names}
OFFLINE = (
    "selection",
    "chunkwise",
    "maps",
    "self_attention",
    "diagnostics",
    "rows",
    "metrics",
    "statistics",
    "panels",
    "figures",
    "report",
)
OFFLINE_MAY_IMPORT = {*OFFLINE, "errors", "schema", "store"}
MODEL_LIBRARIES = {"torch", "diffusers", "transformers"}
HEAVY = ("diffusers", "transformers", "plotly", "nnsight", "transformer_lens")


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(path: Path, *, with_types: bool = True) -> set[str]:
    """Dotted names that a file imports anywhere in it; ``from a import b`` counts as a.b."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = set()
    if not with_types:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                hidden |= {id(child) for inner in node.body for child in ast.walk(inner)}
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_modules(path: Path) -> set[str]:
    """Modules of dit_probe that a file needs when it runs (types alone point backwards legitimately)."""
    return {
        parts[1]
        for name in imported(path, with_types=False)
        if (parts := name.split("."))[0] == "dit_probe" and len(parts) > 1
    }


def stage(path: Path) -> str:
    """The module of dit_probe that a file belongs to: dit_probe/anatomy/flux.py is of ``anatomy``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout


@pytest.mark.parametrize("used", ["", "dp.trace, dp.open, dp.maps, dp.schema, dp.store, dp.Probe, dp.demo.names();"])
def test_import_is_light(used: str):
    found = run(f"import sys, dit_probe as dp; {used} print([name for name in {HEAVY!r} if name in sys.modules])")
    assert found.strip() == "[]"


def test_the_command_line_starts_without_torch():
    assert run("import sys, dit_probe.cli; print('torch' in sys.modules)").strip() == "False"


def test_every_module_has_its_place_in_the_flow():
    unplaced = {stage(path) for path in files(PACKAGE)} - set(RANK) - {"__init__"}
    assert not unplaced, f"say in FLOW where {unplaced} stand"


@pytest.mark.parametrize("path", files(PACKAGE), ids=name_of)
def test_imports_follow_the_arrow(path: Path):
    here = stage(path)
    if here == "__init__":
        return
    needed = own_modules(path) & set(RANK)
    back = {name for name in needed if RANK[name] > RANK[here]}
    assert not back, f"{here} imports {back}, which come after it"
    if here in OFFLINE:
        assert needed <= OFFLINE_MAY_IMPORT
        assert not {name.split(".")[0] for name in imported(path)} & MODEL_LIBRARIES


@pytest.mark.parametrize("path", files(PACKAGE), ids=name_of)
def test_the_package_does_not_know_the_probes(path: Path):
    assert "probes" not in {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", files(PROBES), ids=name_of)
def test_probes_use_public_names_only(path: Path):
    import dit_probe

    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "dit_probe" and len(parts) > 1:
            assert len(parts) == 2, f"{name} is not a public name of dit_probe"
            assert parts[1] in dit_probe.__all__


@pytest.mark.parametrize("path", [*files(PACKAGE), *files(PROBES)], ids=name_of)
def test_a_file_is_read_in_one_sitting(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert path.stem not in ("utils", "util", "helpers", "common", "misc")


def test_every_probe_file_is_an_entry_point():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["dit_probe.probes"]
    modules = {value.split(":")[0] for value in declared.values()}
    assert modules == {f"probes.{path.stem}" for path in PROBES.glob("*.py") if path.stem != "__init__"}
    found = {point.name: point for point in entry_points(group="dit_probe.probes")}
    assert set(declared) <= set(found)
    for name in declared:
        assert found[name].load().__name__ == name


def test_the_version_is_said_once():
    import dit_probe

    assert dit_probe.__version__ == version("dit-probe")


def test_the_commands_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for document in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"make ([a-z]+)", (ROOT / document).read_text()):
            assert target in targets, f"{document} tells to run `make {target}`"


def test_links_of_the_documents_lead_somewhere():
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            page = document.parent / link
            if page.parent.name == "tutorials" and not page.exists():
                page = ROOT / "tutorials" / f"{page.stem}.py"  # of which the build makes a page
            assert page.exists(), f"{document.name} links to {link}"


def test_constraints_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(need for extra in project["optional-dependencies"].values() for need in extra),
    ]
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    for need in wanted:
        name = re.split(r"[\[<>=;]", need)[0].strip().lower()
        assert name == "dit-probe" or name in pinned, f"{name} has no pin in constraints.txt"
