"""Follow every link inside built pages: files, pictures and anchors have to be there.

python scripts/check_links.py docs/_build/html
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# the theme and its copies of sources, which are no pages
SKIPPED = ("_sources", "_modules", "_static")


class Page(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note where a tag leads, and what it is called."""
        for name, value in attrs:
            if value is None:
                continue
            if name == "id" or (name == "name" and tag == "a"):
                self.anchors.add(value)
            elif name in ("href", "src"):
                self.links.append(value)


def broken_links(root: Path) -> list[tuple[str, str]]:
    """Return the pages of a folder and their links that lead nowhere; links to other sites are not followed."""
    files = [f for f in sorted(root.rglob("*.html")) if f.relative_to(root).parts[0] not in SKIPPED]
    pages = {f.resolve(): Page(f.read_text(encoding="utf-8")) for f in files}
    broken = []
    for file, page in pages.items():
        for link in dict.fromkeys(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            there = target in pages and unquote(parts.fragment) in pages[target].anchors
            if not (there or (target not in pages and target.is_file())):
                broken.append((str(file.relative_to(root.resolve())), link))
    return broken


def main() -> None:
    """Print what is broken, and fail where anything is."""
    root = Path(sys.argv[1])
    found = broken_links(root)
    for page, link in found:
        print(f"{page}: {link}")
    print(f"{len(list(root.rglob('*.html')))} pages, {len(found)} broken links")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
