"""Hooks of mkdocs: pages and files of the repository that lie outside docs/.

README files of other folders become pages of the site. Any other file that a page links to is
copied under ``files/``, so that a link works in the repository and in the site.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "recipes/README.md": "recipes.md",
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "AGENTS.md": "agents.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": "readme.md",
}
"""Path in the repository: path in the site."""
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie outside docs/."""
    for source, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite links between pages, and copy the other files that are linked."""
    uri = page.file.src_uri
    sources = {site: source for source, site in PAGES.items()}
    here = posixpath.dirname(sources.get(uri, f"docs/{uri}"))

    def rewritten(match: re.Match[str]) -> str:
        head, target, tail = match.groups()
        if re.match(r"[a-z]+:", target):
            return match.group(0)
        place = posixpath.normpath(posixpath.join(here, target))
        if place in PAGES:
            site = PAGES[place]
        elif (ROOT / place).is_dir():
            return "](#)"  # a folder has no page
        elif place.startswith("docs/"):
            site = place.removeprefix("docs/")
        elif (ROOT / place).is_file():
            site = f"files/{place}"
            if files.get_file_from_path(site) is None:
                files.append(File.generated(config, site, abs_src_path=str(ROOT / place)))
        else:
            return match.group(0)  # mkdocs reports it
        return head + posixpath.relpath(site, posixpath.dirname(uri) or ".") + tail

    return LINK.sub(rewritten, markdown)
