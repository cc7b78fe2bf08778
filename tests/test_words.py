"""Words that CONTRIBUTING asks to avoid are in no prose: pages, docstrings, comments, messages and help."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = re.search(
    r"<!-- words:begin -->(.*?)<!-- words:end -->", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL
)[1]
AVOIDED = [word for row in re.findall(r"^\| (.+?) \|", TABLE, re.MULTILINE)[2:] for word in row.split(", ")]
WORDS = re.compile(rf"\b({'|'.join(map(re.escape, AVOIDED))})\b", re.IGNORECASE)


def blanked(text, *patterns):
    """A text without what matches, its lines where they were."""
    for pattern in patterns:
        text = re.sub(pattern, lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=re.DOTALL | re.MULTILINE)
    return text


def prose_of_markdown(text):
    """A page without code, comments, addresses and what is generated."""
    generated = r"<!-- (\w+):begin -->.*?<!-- \1:end -->"
    return blanked(text, generated, r"```.*?```", r"<!--.*?-->", r"`[^`\n]*`", r"\]\([^)]*\)")


def prose_of_python(text):
    """Comments, docstrings and, but in tests, which have sentences to recognise, every other string with a space."""
    lines = [""] * (text.count("\n") + 2)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0]] += token.string
    tree = ast.parse(text)
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    is_test = "\nimport pytest" in text
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            if id(node) in statements or not is_test:
                prose = blanked(node.value, r"``.*?``", r"`[^`\n]*`", r"^ *(>>>|\.\.\. ).*?$")
                for number, line in enumerate(prose.split("\n"), node.lineno):
                    lines[min(number, len(lines) - 1)] += " " + line
    return "\n".join(lines[1:])


def prose_of_yaml(text):
    """Comments."""
    return "\n".join(line.partition("#")[2] for line in text.splitlines())


def prose_of_javascript(text):
    """Comments and strings."""
    comments = re.compile(r"//.*?$|/\*.*?\*/|\"[^\"\n]*\"|`[^`]*`", re.DOTALL | re.MULTILINE)
    lines = [""] * (text.count("\n") + 1)
    for found in comments.finditer(text):
        for number, line in enumerate(re.sub(r"\$\{[^}]*\}", "", found[0]).split("\n"), text[: found.start()].count("\n")):
            lines[number] += " " + line
    return "\n".join(lines)


PROSE = {
    **{".md": prose_of_markdown, ".py": prose_of_python, ".yaml": prose_of_yaml},
    **{".js": prose_of_javascript, ".html": str},
}
"""By the end of a file's name, how its prose is taken out."""
NO_PROSE = ("behind the {place}", "GO ON")
"""Words to speak and to show, of a corpus and of an example."""
FOLDERS = ("benchmarks", "docs", "examples", "hparams", "recipes", "speechbrain_ext", "tests")
FILES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if "node_modules" not in path.parts]
FILES = sorted(path for path in [*ROOT.iterdir(), *FILES] if path.suffix in PROSE and path != Path(__file__).resolve())


def avoided(path):
    text = path.read_text(encoding="utf-8")
    for words in NO_PROSE:
        text = text.replace(words, "")
    lines = PROSE[path.suffix](text).split("\n")
    return [f"line {number}: {found[0]}" for number, line in enumerate(lines, 1) for found in WORDS.finditer(line)]


@pytest.mark.parametrize("folder", [ROOT, *(ROOT / name for name in FOLDERS)], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_prose_has_a_word_to_avoid(folder):
    files = [path for path in FILES if (path.parent == ROOT if folder == ROOT else folder in path.parents)]
    found = {str(path.relative_to(ROOT)): avoided(path) for path in files}
    assert files and not any(found.values()), {name: words for name, words in found.items() if words}


def test_words_are_found_in_prose_alone(tmp_path):
    texts = {
        "page.md": "One behind\n`behind` [x](behind) ```\nbehind\n```\nanew\n",
        "code.py": '"""A\n\nbehind ``anew``\n>>> anew\n"""\nheard = 1  # hears\nraise ValueError(f"{heard} upon x", "behind")\n',
        "file.yaml": "behind: 1  # anew\n",
        "page.js": 'heard(`anew ${heard}`, "hears");  // behind\n/*\nupon */',
    }
    found = {}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        found[name] = avoided(tmp_path / name)
    assert found["page.md"] == ["line 1: behind", "line 5: anew"] and found["file.yaml"] == ["line 1: anew"]
    assert found["code.py"] == ["line 3: behind", "line 6: hears", "line 7: upon"]
    assert found["page.js"] == ["line 1: anew", "line 1: hears", "line 1: behind", "line 3: upon"]
