"""A page as a reader's program sees it: elements, attributes, text."""

import base64
import gzip
import json
from html.parser import HTMLParser


class Seen(HTMLParser):
    """Parses a page. `elements` are (tag, attributes); a table row is a line of `text`, without scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.comments: list[str] = []
        self.inside = ""
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        parts: list[str] = []
        self._parts = parts
        self.feed(page)
        self.close()
        self.text = "".join(parts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in self.raw:
            self.inside = tag
            self.raw[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self.inside:
            self.inside = ""
        if tag in ("th", "td", "p", "tr", "h2", "li"):
            self._parts.append("\n" if tag == "tr" else " | ")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.raw[self.inside][-1] += data
        else:
            self._parts.append(data.replace("\n", " ").replace("\u00a0", " "))

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    @property
    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}

    def row(self, *starts: str) -> list[str]:
        """The cells of the first table row that begins with this text."""
        for line in self.text.splitlines():
            cells = [cell.strip() for cell in line.split("|") if cell.strip()]
            if tuple(cells[: len(starts)]) == starts:
                return cells
        raise AssertionError(f"no row {starts}")

    def packed(self) -> dict:
        """The trace browser's data."""
        return json.loads(gzip.decompress(base64.b64decode(self.raw["script"][0])))
