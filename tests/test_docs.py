"""Every Python block of README and docs/ runs, the flags in shell blocks exist, and the files they name."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from forked import run_python
from tiny import make_encoder
from tiny_prompt import make_kind
from train_problems import sentences

from clusterns.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder where the names that the documentation uses stand for something small."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("bert-base-uncased", "runs/mine"):
        (folder / name).parent.mkdir(exist_ok=True)
        make_encoder().save(folder / name)
    make_kind("roberta").save(folder / "roberta-base")
    (folder / "sentences.txt").write_text("\n".join(sentences(40)) + "\n")
    return folder


PRINTS = {
    "architecture.md": ["near_mates"],
    "README.md": ["tensor", "info_nce"],
    "loss.md": ["True", "True", "\\d", "\\(20, 64\\)"],
    "models.md": ["4 torch.Size\\(.1, 16.\\)", "True"],
    "sentence-transformers.md": ["info_nce"],
}


@pytest.mark.parametrize(
    ("page", "number"),
    [(page, number) for page in PAGES for number in range(len(blocks(page, "python")))],
    ids=lambda value: getattr(value, "name", value),
)
def test_python_blocks_run(page, number, place):
    printed = run_python(place, blocks(page, "python")[number])
    assert re.search(PRINTS[page.name][number], printed), printed


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "diff")], ids=lambda page: page.name)
def test_both_sides_of_a_diff_run(page, place):
    lines = blocks(page, "diff")[0].splitlines()
    for side in "-+":
        run_python(place, "\n".join(line[1:] for line in lines if line[0] in f" {side}"))


def test_the_example_script_runs(place):
    script = ROOT / "docs" / "train_sentence_transformers.py"
    short = "--max-steps 3 --batch-size 8 --mini-batch-size 4 --num-clusters 4 --start-cosine 1".split()
    printed = run_python(
        place, script, "--model", "bert-base-uncased", "--sentences", "sentences.txt", *short
    )
    assert "nearest_cosine" in printed  # clustering is under way


@pytest.mark.parametrize("command", ["train", "evaluate", "compare", "encode", "report"])
def test_flags_exist(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    help_text = capsys.readouterr().out
    shell = "\n".join(block for page in PAGES for block in blocks(page, "sh")).replace("\\\n", " ")
    lines = [line for line in shell.splitlines() if f"clusterns {command}" in line]
    assert lines
    for flag in {flag for line in lines for flag in re.findall(r"--[a-z-]+", line)}:
        assert flag in help_text, flag


def test_the_settings_page_is_that_of_the_code():
    page = runpy.run_path(str(ROOT / "docs" / "make_settings.py"))["settings_page"]()
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert text == page, "python docs/make_settings.py writes it anew"


def test_links_lead_somewhere():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!http)([^)#]+)", text) + re.findall(r"`(docs/[\w./-]+)`", text):
            base = ROOT if target.startswith("docs/") else page.parent
            assert (base / target).exists(), f"{page.name}: {target}"
