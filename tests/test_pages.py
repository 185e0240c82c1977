"""The pages: their links lead somewhere, they stay short, and the commands that they show compose."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import composed

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(ROOT / f for f in ("CHANGELOG.md",)), *sorted(ROOT.glob("[bckost]*/**/README.md"))]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere_and_pages_are_short(page: Path) -> None:
    text = page.read_text()
    assert len(text.splitlines()) <= 200
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("http"):
            file, _, anchor = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            assert target.exists(), f"{page}: {link}"
            assert not anchor or anchor in anchors(target), f"{page}: {link}"


def commands() -> list[str]:
    """The training commands of all pages that name no file of the reader's."""
    text = "\n".join(page.read_text() for page in PAGES).replace("\\\n", " ")
    found = re.findall(r"^ *bisenet train ([^#\n]*)", text, re.MULTILINE)
    return sorted(
        {line.strip() for line in found if "..." not in line and "--config-dir" not in line and "resume=" not in line}
    )


@pytest.mark.parametrize("line", commands())
def test_the_commands_of_the_pages_compose(line: str) -> None:
    overrides = [word for word in shlex.split(line) if not word.startswith("-") and not word.startswith("hydra")]
    single = [
        re.sub(r"=(\[\]|\[[^\]]*\]|[^\[,]+),.*$", r"=\1", word) for word in overrides
    ]  # the first of what is swept
    composed(*single)


def test_nothing_of_a_data_set_is_in_the_repository() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    images = [f for f in listed.stdout.split() if f.endswith((".png", ".jpg", ".mp4"))]
    assert images == ["scripts/demo_predictions.png"]
