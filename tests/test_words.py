"""Words that CONTRIBUTING asks to avoid are in no prose."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = re.search(
    r"<!-- words:begin -->(.*?)<!-- words:end -->", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL
)[1]
AVOIDED = [word for row in re.findall(r"^\| (.+?) \|", TABLE, re.MULTILINE)[2:] for word in row.split(", ")]


def prose_of_markdown(path):
    """The text of a page, its lines where they were, without code, comments, addresses and what is generated."""
    text = path.read_text(encoding="utf-8")
    for code in (r"<!-- (\w+):begin -->.*?<!-- \1:end -->", r"```.*?```", r"<!--.*?-->", r"`[^`\n]*`", r"\]\([^)]*\)"):
        text = re.sub(code, lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=re.DOTALL)
    return text


PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "recipes").rglob("*.md")),
]
PROSE = {path: prose_of_markdown for path in PAGES}
"""Files, and how their prose is taken out."""


@pytest.mark.parametrize("path", PROSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_prose_has_a_word_to_avoid(path):
    lines = PROSE[path](path).splitlines()
    words = re.compile(rf"\b({'|'.join(map(re.escape, AVOIDED))})\b", re.IGNORECASE)
    found = [f"line {number}: {match[0]}" for number, line in enumerate(lines, 1) for match in words.finditer(line)]
    assert not found, found


def test_words_are_found_in_prose_alone(tmp_path):
    (tmp_path / "page.md").write_text("One behind\n`behind` [x](behind) ```\nbehind\n```\nanew\n")
    assert re.findall(r"behind|anew", prose_of_markdown(tmp_path / "page.md")) == ["behind", "anew"]
    assert "behind" in AVOIDED and "heard" in AVOIDED and "avoid" not in AVOIDED
