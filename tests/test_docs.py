"""The documents do what they say: their code runs, their links lead somewhere, every public name is in the reference."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import influence_ext as ie

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
SCRIPTS = sorted(path for path in (DOCS / "examples").glob("*.py") if path.name != "digits.py")
REFERENCE = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))


def name_of(path: Path) -> str:
    """Relative to the repository."""
    return path.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[tuple[int, str]]:
    """First line and text of the page's Python blocks."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start(1)), m.group(1)) for m in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]


def program(page: Path) -> str:
    """The blocks of a page as one program with the page's line numbers."""
    lines: list[str] = []
    for start, block in blocks(page):
        lines += [""] * (start - len(lines))
        lines += block.splitlines()
    return "\n".join(lines) + "\n"


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """A Python process of its own in ``folder``, with this source tree on its path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def with_code(pages: list[Path]) -> list[Path]:
    """Pages with programs; the blocks of design.md are contracts, not Python."""
    return [page for page in pages if page.name != "design.md" and blocks(page)]


@pytest.mark.parametrize("page", with_code(PAGES), ids=name_of)
def test_code_compiles(page: Path) -> None:
    compile(program(page), str(page), "exec")


def test_readme_runs(tmp_path: Path) -> None:
    (tmp_path / "readme.py").write_text(program(ROOT / "README.md"), encoding="utf-8")
    done = run(["readme.py"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warm-start gap" in done.stdout
    assert "diverged" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in with_code(PAGES[1:]) if "peers" not in page.parts], ids=name_of)
def test_guide_runs(page: Path, tmp_path: Path) -> None:
    (tmp_path / "guide.py").write_text(program(page), encoding="utf-8")
    done = run(["guide.py"], tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("page", with_code(sorted((DOCS / "peers").glob("*.md"))), ids=name_of)
def test_guide_of_a_peer_runs_with_the_import_changed(page: Path, tmp_path: Path) -> None:
    lines = [line for line in program(page).splitlines() if not line.rstrip().endswith("# before")]
    text = re.sub(
        "^from torch_influence import", "from influence_ext.adapters.torch_influence import", "\n".join(lines), flags=re.MULTILINE
    )
    (tmp_path / "guide.py").write_text(text, encoding="utf-8")
    done = run(["guide.py"], tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_example_runs(script: Path, tmp_path: Path) -> None:
    done = run([str(script), "picture.png"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if "picture_path" in script.read_text(encoding="utf-8"):
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_gallery_shows_every_picture_and_names_every_script() -> None:
    gallery = (DOCS / "gallery.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"images/(\w+)\.png", gallery)) == sorted(path.stem for path in (DOCS / "images").glob("*.png"))
    assert [script.name for script in SCRIPTS if f"`{script.name}`" not in gallery] == []


def links(text: str) -> list[str]:
    """Targets of relative links to other files."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in target and target[0] != "#"]


def broken_links(page: Path, text: str) -> list[str]:
    """Targets of relative links that are not there."""
    return [target for target in links(text) if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", [ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))], ids=name_of)
def test_web_pages_link_to_web_pages(page: Path) -> None:
    """`make docs` has the pages of docs and the changelog alone."""
    shown = {path.resolve() for path in DOCS.rglob("*") if path.is_file()}
    assert [target for target in links(page.read_text(encoding="utf-8")) if (page.parent / target).resolve() not in shown] == []


def test_broken_links_are_found() -> None:
    assert broken_links(ROOT / "README.md", "[a](docs/nowhere.md), [b](docs/faq.md#memory), [c](https://example.org/)") == [
        "docs/nowhere.md"
    ]


def public_names() -> Iterator[str]:
    """Every name a user may import from the top of the package and from its public modules."""
    for name in ie.__all__:
        yield f"influence_ext.{name}"


def test_every_public_name_is_in_the_reference() -> None:
    missing = []
    for name in public_names():
        target = getattr(ie, name.removeprefix("influence_ext."))
        directive = "automodule" if isinstance(target, ModuleType) else "autoclass|autofunction|data"
        if not re.search(rf"^\.\. ({directive}):: {re.escape(name)}$", REFERENCE, re.MULTILINE):
            missing.append(name)
    assert missing == []


@pytest.mark.parametrize("module", [ie.solvers, ie.losses, ie.errors, ie.operators, ie.influence, ie.bregman], ids=lambda m: m.__name__)
def test_public_things_are_documented(module: ModuleType) -> None:
    names = getattr(module, "__all__", None) or [
        n for n, v in vars(module).items() if inspect.isclass(v) and v.__module__ == module.__name__
    ]
    assert names
    things = {name: getattr(module, name) for name in names}
    callables = {name: thing for name, thing in things.items() if inspect.isclass(thing) or inspect.isfunction(thing)}
    assert [name for name, thing in callables.items() if not (thing.__doc__ or "").strip()] == []


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="the documentation tool is not installed; make docs installs it")
    options = ["--fail-on-warning", "--keep-going", "--quiet", "--fresh-env", "--doctree-dir", str(tmp_path / "trees"), "--builder", "html"]
    done = run(["-m", "sphinx", *options, str(DOCS), str(tmp_path / "html")], ROOT)
    assert done.returncode == 0, done.stderr
    from sphinx.util.inventory import InventoryFile

    with (tmp_path / "html" / "objects.inv").open("rb") as file:
        found = {name for kind, names in InventoryFile.load(file, "", lambda a, b: b).items() if kind.startswith("py:") for name in names}
    wanted = set(public_names())
    for module in (ie.solvers, ie.losses):
        wanted |= {f"{module.__name__}.{name}" for name in module.__all__ if callable(getattr(module, name))}
    assert sorted(wanted - found) == []


def test_docstrings_name_their_errors() -> None:
    """A public function or class that raises on purpose has a Raises section, its own or one it points to."""
    silent = []
    for name in ie.__all__:
        thing = getattr(ie, name)
        if not (inspect.isfunction(thing) and thing.__module__.startswith("influence_ext.")):
            continue
        raises = any(isinstance(node, ast.Raise) for node in ast.walk(ast.parse(inspect.getsource(thing))))
        if raises and not re.search(r"Raises:|[Ee]rrors", thing.__doc__ or ""):
            silent.append(name)
    assert silent == []
