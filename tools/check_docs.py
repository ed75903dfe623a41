"""Links in the Markdown files lead somewhere, and their Python blocks parse.

Checked: links and images to files of the repository, and anchors to headings (as GitHub makes them). Addresses on the
web are left alone, so the check needs no network.
"""

import ast
import re
import sys
from pathlib import Path
from textwrap import dedent
from urllib.parse import unquote

ROOT = Path(__file__).parents[1]
FENCED = re.compile(r"^( *)(```+|~~~+) *(\w*)[^\n]*\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)")
HEADING = re.compile(r"^#{1,6} +(.+?)(?: +#+)? *$", re.MULTILINE)


def blank_fenced(text: str) -> str:
    """`text` with fenced blocks emptied, line numbers kept."""
    return FENCED.sub(lambda block: "\n" * block[0].count("\n"), text)


def anchors(text: str) -> set[str]:
    """GitHub's names of a page's headings: lower case, no punctuation, hyphens for spaces, repeats numbered."""
    found: set[str] = set()
    for heading in HEADING.findall(blank_fenced(text)):
        words = LINK.sub(lambda link: link[0][1 : link[0].index("]")], heading)
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        name, repeat = slug, 0
        while name in found:
            repeat += 1
            name = f"{slug}-{repeat}"
        found.add(name)
    return found


def line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def broken_links(page: Path, text: str) -> list[str]:
    problems = []
    prose = re.sub(r"`[^`\n]*`", lambda code: " " * len(code[0]), blank_fenced(text))
    for link in LINK.finditer(prose):
        target, _, anchor = unquote(link[1]).partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / target).resolve() if target else page
        where = f"{page.relative_to(ROOT)}:{line_of(prose, link.start())}"
        if not file.exists():
            problems.append(f'{where}: links to "{target}", which is not there')
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text()):
            problems.append(f'{where}: links to "#{anchor}", no such heading in {file.relative_to(ROOT)}')
    return problems


def broken_python(page: Path, text: str) -> list[str]:
    problems = []
    for block in FENCED.finditer(text):
        if block[3] not in ("python", "py"):
            continue
        try:
            ast.parse(dedent(block[4]))
        except SyntaxError as error:
            line = line_of(text, block.start(4)) + (error.lineno or 1) - 1
            problems.append(f"{page.relative_to(ROOT)}:{line}: this Python does not parse: {error.msg}")
    return problems


def main() -> None:
    pages = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    texts = {page: page.read_text() for page in pages}
    problems = [line for page, text in texts.items() for line in broken_links(page, text) + broken_python(page, text)]
    print("\n".join(problems) or f"links and Python blocks of {len(pages)} pages are in order")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
