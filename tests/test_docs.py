"""What `make docs` would find, without the packages that it needs: links lead somewhere, and the API page has every public name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import autocomp

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
        ROOT / "reports" / "README.md",
    ]
)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and mkdocs make them; of an API page also the names."""
    text = page.read_text()
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
    return slugs | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for address in re.findall(r"\]\(([^()\s]+)\)", text):
        path, _, anchor = address.partition("#")
        if "://" in address:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), address
        assert target == ROOT or ROOT in target.parents, f"{address} leads out of the repository"
        assert not anchor or anchor in anchors(target), address


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    named = set(re.findall(r"^::: autocomp\.(\w+)$", page, re.MULTILINE))
    assert named == set(autocomp.__all__) - {"__version__"}


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= set(listed)
