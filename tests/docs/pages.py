"""The project's Markdown pages, taken apart: tables, code blocks, links and headings."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_FENCE = re.compile(r"^( *)(```+)(.*)$")


def pages() -> list[Path]:
    """README.md and its like, and everything in docs/."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@dataclass(frozen=True)
class Block:
    """A fenced block of code. where: FILE:LINE of its fence. language: what stands after the fence. before: the text
    above it, from the page's beginning."""

    where: str
    language: str
    text: str
    before: str


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page; raises ValueError for one that does not end."""
    found, opened, body = [], None, []
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        fence = _FENCE.match(line)
        if opened is None and fence:
            opened, body = (number, len(fence[1]), fence[2], fence[3].strip()), []
        elif opened is not None and fence and fence[2] == opened[2] and not fence[3]:
            before = "\n".join(lines[: opened[0] - 1])
            found.append(Block(f"{page.relative_to(ROOT)}:{opened[0]}", opened[3], "\n".join(body) + "\n", before))
            opened = None
        elif opened is not None:
            body.append(line[opened[1] :] if line[: opened[1]].isspace() else line)
    if opened is not None:
        raise ValueError(f"{page.relative_to(ROOT)}:{opened[0]}: this block of code does not end")
    return found


def prose(page: Path) -> str:
    """The page without its fenced blocks; lines keep their numbers."""
    kept, inside = [], False
    for line in page.read_text().splitlines():
        if _FENCE.match(line):
            inside = not inside
            kept.append("")
        else:
            kept.append("" if inside else line)
    return "\n".join(kept)


def tables(text: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """(header, rows) of every table, cells stripped."""
    header, rows = None, []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if header is None:
                header = cells
            elif not all(re.fullmatch(":?-+:?", cell) for cell in cells):
                rows.append(cells)
        elif header is not None:
            yield header, rows
            header, rows = None, []


def anchors(page: Path) -> set[str]:
    """What links to headings of a page end in, as GitHub makes them."""
    found: set[str] = set()
    for title in re.findall(r"^#{1,6} +(.+?) *$", prose(page), re.MULTILINE):
        title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        count = 0
        while (anchor if not count else f"{anchor}-{count}") in found:
            count += 1
        found.add(anchor if not count else f"{anchor}-{count}")
    return found


def links(page: Path) -> list[tuple[int, str]]:
    """(line, target) of every link and picture outside code."""
    found = []
    for number, line in enumerate(prose(page).splitlines(), 1):
        line = re.sub(r"`[^`]*`", "", line)
        found += [(number, target) for target in re.findall(r"\]\(([^)\s]*)\)", line)]
        found += [(number, target) for target in re.findall(r"^\[[^]]+\]: (\S+)", line)]
        found += [(number, target) for target in re.findall(r"<(https?://[^>]*)>", line)]
    return found
