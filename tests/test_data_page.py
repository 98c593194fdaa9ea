"""docs/data.md says what the commands say: each example is read as its command line has it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from clusterns.cli import build_parser
from clusterns.corpus.judged_files import load_judged
from clusterns.training.arguments import read_config
from clusterns.training.task import prepare_task

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
FILES = re.findall(r"```text (\S+)\n(.*?)```", PAGE, flags=re.DOTALL)
EXAMPLES = re.findall(r"^    clusterns (.*)\n> (.*)$", PAGE, flags=re.MULTILINE)


def test_the_page_has_examples():
    assert len(FILES) > 10
    assert len(EXAMPLES) == PAGE.count("\n> ") > 14


@pytest.mark.parametrize(("command", "said"), EXAMPLES)
@pytest.mark.filterwarnings("ignore:.*rows are left out")
def test_example(command: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in FILES:
        (tmp_path / name).write_text(content, encoding="utf-8")
    given = build_parser().parse_args(shlex.split(command))
    lines: list[str] = []
    try:
        if command.startswith("train"):
            prepare_task(read_config(given), lines.append)
        else:
            options = {name: getattr(given, f"data_{name}") for name in ("kind", "columns", "corpus")}
            (file,) = given.data
            options |= {"delimiter": given.delimiter, "header": given.header}
            lines.append(load_judged(file, **options).account)
    except ValueError as error:
        lines.append(f"error: {error}")
    assert lines[0].split(", for example: ")[0] == said
