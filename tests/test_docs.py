"""The documents: links lead somewhere, generated lists are current, and nothing public is missing."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from advalign.cli.commands import COMMANDS
from advalign.objectives import BASES, PLUGINS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
REPOSITORY = "https://github.com/advalign/advalign/blob/main/"
PAGES = [*sorted(DOCS.rglob("*.md")), *(ROOT / name for name in (
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "results/README.md",
))]  # fmt: skip


def prose_of(page: Path) -> str:
    """The text without its code blocks, where brackets are no links."""
    return re.sub(r"^```.*?^```|`[^`\n]+`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and as Python-Markdown make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in re.findall(r"^#+ (.+)$", text, re.M)]
    return {re.sub(r"\s", "-", heading) for heading in headings} | {re.sub(r"[-\s]+", "-", each) for each in headings}


def broken_links(page: Path) -> list[str]:
    """The links of a page into the repository that lead to no file, or to no heading of it."""
    broken = []
    for link in re.findall(r"\]\(([^()\s]+)\)", prose_of(page)):
        inside = link.startswith(REPOSITORY)
        if re.match(r"[a-z]+:", link) and not inside:
            continue
        path, _, anchor = link.removeprefix(REPOSITORY).partition("#")
        target = ((ROOT if inside else page.parent) / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    assert not broken_links(page)


def test_a_broken_link_is_noticed(tmp_path: Path):
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# The walk of a batch\n```\n# no heading\n```\n")
    links = ["other.md", "other.md#the-walk-of-a-batch", "#here", "missing.md", "other.md#no-heading", "#nowhere"]
    page.write_text("# Here\n" + " ".join(f"[link]({link})" for link in links) + "`[no](link)` [out](https://x.org/y)")
    assert broken_links(page) == links[3:]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_lists_are_current(generate: ModuleType):
    shown = set()
    for page in generate.PAGES:
        text = page.read_text()
        shown |= set(re.findall(r"<!-- generated: (\S+) -->", text))
        assert generate.generated(text) == text, f"{page.name}: run `python docs/generate.py`"
    assert shown == set(generate.GENERATED)


COMMAND_LINE = (DOCS / "command-line.md").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_list_of_options_is_what_the_parser_takes(command: str, capsys: pytest.CaptureFixture[str]):
    from advalign.cli.commands import main

    with pytest.raises(SystemExit):
        main([command, "--help"])
    accepted = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", capsys.readouterr().out)) - {"--help"}
    (section,) = re.findall(rf"^## {command}$(.*?)(?=^## |\Z)", COMMAND_LINE, re.MULTILINE | re.DOTALL)
    listed = set(re.findall(r"^\| `(--[a-z-]+)`", section, re.MULTILINE))
    assert listed <= accepted
    assert {flag for flag in accepted if not flag.startswith("--no-")} <= set(re.findall("--[a-z-]+", section))


@pytest.mark.slow
def test_the_weekly_tests_are_those_that_the_guide_lists():
    marked = {
        (str(file.relative_to(ROOT)), node.name)
        for file in (ROOT / "tests").rglob("test_*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and any("weekly" in ast.unparse(each) for each in node.decorator_list)
    }
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    assert set(re.findall(r"^\| `(tests/\S+)`, `(\w+)`", guide, re.MULTILINE)) == marked


@pytest.mark.parametrize("method", [*BASES, *PLUGINS])
def test_every_method_has_its_page_its_row_and_its_place_in_the_navigation(method: str):
    name = "afa" if method == "contrast" else method
    assert (DOCS / "methods" / f"{name}.md").exists()
    assert f"methods/{name}.md" in (ROOT / "mkdocs.yml").read_text()
    assert f"({name}.md)" in (DOCS / "methods" / "index.md").read_text()


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert pages == set(re.findall(r"[\w/-]+\.md", navigation))


def test_numbers_that_advise_on_a_method_stand_on_the_pages_that_they_link_to():
    page = (DOCS / "which-method.md").read_text()
    passages = [cell for line in page.splitlines() if line.startswith("|") for cell in line.split("|")]
    passages += [sentence for sentence in page.split("\n\n") if not sentence.startswith("|")]
    seen = 0
    for passage in passages:
        numbers = re.findall(r"\b\d\d\.\d+", passage)
        sources = "".join((DOCS / link).read_text() for link in re.findall(r"\((methods/[\w-]+\.md)\)", passage))
        missing = [number for number in numbers if number not in sources]
        assert not missing, f"{passage}: {missing}"
        seen += len(numbers)
    assert seen > 20
