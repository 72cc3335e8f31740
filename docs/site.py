"""Makes a site of what is written for readers of the repository: its pages outside ``docs`` join it, and links are brought there.

A link to a page, a picture or a report becomes one within the site. A link to anything else that is there (a folder, a source) becomes its
text alone. A link to nothing stays as it is, and `mkdocs build --strict` fails on it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
# Where files of the repository lie in the site; those under docs/ lie at its top.
PLACES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "examples/README.md": "examples/index.md",
    "examples/pretrained/README.md": "examples/pretrained.md",
    "reports/README.md": "reports/index.md",
    "reports/digits/report.html": "reports/digits.html",
    "reports/two-targets/report.html": "reports/two-targets.html",
} | {
    path.relative_to(ROOT).as_posix(): path.relative_to(ROOT).as_posix()
    for path in sorted((ROOT / "reports" / "benchmarks").glob("*.md"))
}
_SOURCES = {place: source for source, place in PLACES.items()}
# A fence and a piece of code, which stay as they are, or a link: whichever begins first.
_LINK = re.compile(
    r"^```.*?^```$|(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)|`[^`\n]+`", re.DOTALL | re.MULTILINE
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take in the pages and reports that lie outside ``docs``."""
    from mkdocs.structure.files import File

    for source, place in PLACES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Bring links from where the page lies in the repository to where it lies in the site; not those in code."""
    place = page.file.src_uri
    source = _SOURCES.get(place, f"docs/{place}")
    text = _LINK.sub(lambda found: moved(found, source, place) if found[3] else found[0], markdown)
    if place == "reports/index.md":  # the folder of tables, which a reader of the repository sees as a list
        tables = (table for table in PLACES.values() if table.startswith("reports/benchmarks/"))
        text += "".join(f"\n\n- [{Path(table).stem}]({table.removeprefix('reports/')})" for table in tables)
    return text


def moved(link: re.Match[str], source: str, place: str) -> str:
    """A link of the page at ``source`` in the repository, which the site has at ``place``."""
    picture, text, address = link.groups()
    path, _, anchor = address.partition("#")
    if not path or "://" in address or address.startswith("mailto:"):
        return link[0]
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    there = PLACES.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
    if there is None:
        return text if (ROOT / target).exists() else link[0]
    moved_to = posixpath.relpath(there, posixpath.dirname(place) or ".")
    return f"{picture}[{text}]({moved_to}{'#' + anchor if anchor else ''})"
