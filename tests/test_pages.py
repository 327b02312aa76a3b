"""README.md and docs/: commands that the command line takes, code that compiles, links that lead somewhere."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

from openvla.cli import app


ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]


def blocks(language: str, page: Path) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    text = "\n".join(blocks("bash", page)).replace("\\\n", " ")
    text = re.sub(r"(openvla) --import \w+", r"\1", text)  # before the verb
    words = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [found[1:] for found in words if found and Path(found[0]).name == "openvla" and "..." not in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page(page):
    verbs = typer.main.get_command(app)
    for verb, *arguments in commands(page):
        verbs.commands[verb].make_context(verb, arguments)  # parses, and does not run
    for code in blocks("python", page):
        compile(code, page.name, "exec")
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        linked = page if not file else (page.parent / file).resolve()
        assert linked.exists(), f"{page.name}: {target}"
        if anchor and linked.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", linked.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_installs_can_be_installed(page):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = page.read_text()
    for names in re.findall(r"(?:'\.|openvla)\[([\w,]+)\]", text):
        assert set(names.split(",")) <= extras.keys(), f"{page.name}: [{names}]"
    # pip calls it --constraint, and takes none with hashes for a folder; uv does
    for line in "\n".join(blocks("bash", page)).splitlines():
        if line.startswith("pip install"):
            assert "--constraint" not in line and " -c " not in line, f"{page.name}: {line}"


def test_the_readme_has_every_verb():
    assert len(commands(ROOT / "README.md")) > 10
    assert typer.main.get_command(app).commands.keys() - {verb for verb, *_ in commands(ROOT / "README.md")} <= {
        "demo",  # `make demo`
        "export",
        "convert",
    }
