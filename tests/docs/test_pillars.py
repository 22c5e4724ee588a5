"""Pages of pillars: one skeleton, and troubleshooting that quotes what the code says."""

from __future__ import annotations

import ast
import re

import pytest

from tests.docs.blocks import ROOT

SKELETON = [
    "What it is", "Quick start", "Data", "The mathematics", "Every metric", "A healthy run", "Recipes",
    "Troubleshooting", "Deviations from the papers",
]  # fmt: skip
PILLARS = {
    "training.md": "images and videos", "llm.md": "language models", "rewards.md": "rewards", "rluf.md": "RLUF",
    "feedback.md": "feedback", "sparsity.md": "update sparsity",
}  # fmt: skip
QUOTES = "Words in quotes are those of the message"


def sections(page: str) -> dict[str, str]:
    """Return the text below each level-2 heading."""
    parts = re.split(r"^## (.*)$", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("page", PILLARS)
def test_a_pillar_page_keeps_to_the_skeleton(page):
    found = sections(page)
    titles = list(found)
    between = slice(titles.index("Recipes") + 1, titles.index("Troubleshooting"))
    del titles[between]
    assert titles == SKELETON
    for title, wanted in (
        ("Quick start", r"^```bash"), ("The mathematics", r"^```text"), ("A healthy run", r"^!\[.*\]\(pictures/"),
        ("Every metric", r"^\| `"), ("Troubleshooting", r"^\| .* \| .* \| .* \|$"),
    ):  # fmt: skip
        assert re.search(wanted, found[title], re.M), f"{page}, {title}: nothing like {wanted}"
    assert all(text.strip() for text in found.values())


@pytest.fixture(scope="module")
def said() -> str:
    """All texts in the code but docstrings, literals that stand side by side being one."""
    files = [path for room in ("align", "rewards", "trainers") for path in sorted((ROOT / room).rglob("*.py"))]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    documents = {node.value for node in nodes if isinstance(node, ast.Expr)}
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and node not in documents]
    return "\n".join(text for text in texts if isinstance(text, str))


@pytest.mark.parametrize("page", PILLARS)
def test_messages_that_troubleshooting_quotes_are_those_of_the_code(page, said):
    trouble = sections(page)["Troubleshooting"]
    quoted = re.findall(r'"([^"]+)"', "".join(re.findall(r"^\|.*$", trouble, re.M)))
    assert QUOTES not in trouble or len(quoted) > 5
    assert QUOTES not in trouble or [words for words in quoted if words not in said] == []


def test_the_readme_shows_each_pillar_by_one_command_and_at_most_twelve_lines_of_python():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pillars = text.partition("\n## The pillars\n")[2].partition("\n## ")[0].split("\n### ")[1:]
    assert {re.findall(r"\]\(docs/(\w+\.md)\)", pillar)[0] for pillar in pillars} >= {
        "training.md", "llm.md", "rluf.md", "rewards.md", "fit.md", "feedback.md", "selection.md", "sparsity.md",
    }  # fmt: skip
    for pillar in pillars:
        blocks = dict(re.findall(r"^```(\w+)[^\n]*\n(.*?)^```$", pillar, re.M | re.S))
        assert set(blocks) == {"bash", "python"} and pillar.count("```") == 4
        assert len(blocks["bash"].splitlines()) == 1 and len(blocks["python"].splitlines()) <= 12
    folders = re.findall(r"^ *(\w+)/ ", text.partition("\n## The tree\n")[2].partition("\n## ")[0], re.M)
    rooms = {path.parent.name for path in (ROOT / "align").glob("*/__init__.py")}
    assert set(folders) == rooms | {"align", "rewards", "trainers", "configs", "scripts", "docs", "tests"}
