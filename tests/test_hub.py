"""The model card of a training, and its upload to a stand-in for the hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants
from train_problems import command, refused, run, summary_of, write_place

from clusterns.cli import main
from clusterns.encoder import SentenceEncoder
from clusterns.train import Run
from clusterns.training.config import TrainConfig
from clusterns.training.hub import card

pytestmark = pytest.mark.usefixtures("one_thread", "no_picture")
STS = "STS --eval-steps 2 --patience 0 --max-steps 4 --bml-beta 0.6"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def trained(place, no_picture):
    run(place, place / "trained", STS)
    return place / "trained"


def parts_of(card: Path) -> tuple[dict, str]:
    _, front, text = card.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_card_says_how_the_model_came_about(place, trained):
    front, text = parts_of(trained / "README.md")
    tags = ["sentence-transformers", "sentence-similarity", "feature-extraction", "clusterns"]
    assert front == {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": tags,
    }
    scores, step = summary_of(trained)["scores"], summary_of(trained)["best_step"]
    lines = [line.replace(" ", "") for line in text.splitlines()]
    rows = "390 sentences, of which two views differ by dropout. Read from: sentences.txt: txt, a sentence a "
    assert f"{rows}line" in text
    assert "|bml_beta|β|`0.6`|" in lines
    assert "|num_clusters|K|`4`|" in lines
    assert not any(line.startswith(("|bml_alpha|", "|device|", "|output_dir|")) for line in lines)
    for name, which in (("before", "before"), (f"step{step}of4", "after")):
        row = next(line for line in lines if line.startswith(f"|{name}|"))
        assert row.split("|")[2:-1] == [f"{value:.2f}" for value in scores[which].values()]
    assert "@inproceedings{deng-etal-2023-clustering," in text
    for private in (place, place.name, os.sep + "tmp", "/home", "/root"):
        assert str(private) not in text


def test_the_snippets_of_the_card_run(trained, monkeypatch):
    pytest.importorskip("sentence_transformers")
    _, text = parts_of(trained / "README.md")
    snippets = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert len(snippets) == 2
    found = []
    for snippet in snippets:
        names: dict = {}
        exec(snippet.replace("path/to/this/model", str(trained)), names)
        found.append(names["embeddings"])
    assert found[1].shape == (2, 32)
    assert found[0] == pytest.approx(found[1].numpy(), abs=1e-5)


def test_whose_card_it_is(place, tmp_path, capsys):
    """A training's goes with it; one that a user wrote, or took over, stays as it is."""
    output, card = tmp_path / "run", tmp_path / "run" / "README.md"
    run(place, output, STS)
    again = "--max-steps 1 --overwrite-output-dir --num-clusters 0"
    capsys.readouterr()
    run(place, output, again)
    assert (
        "README.md"
        in capsys.readouterr().out.partition("removed of an earlier training: ")[2].splitlines()[0]
    )
    text = card.read_text(encoding="utf-8")
    assert "No dev set: the last model, of step 1 of 1." in text
    assert "trained with SimCSE" in text
    assert "deng" not in text
    taken_over = "\n".join(line for line in text.splitlines() if not line.startswith("<!--"))
    card.write_text(taken_over, encoding="utf-8")
    run(place, output, again)
    assert f"{card}: not of a training, it stays; no model card is written" in capsys.readouterr().out
    assert card.read_text(encoding="utf-8") == taken_over


def test_files_of_the_user_outlive_a_resumption(place, tmp_path, monkeypatch):
    output, whole = tmp_path / "run", Run.train_step

    def killed(self, *, watched):
        if self.step == 4:
            raise ValueError("killed")
        return whole(self, watched=watched)

    given = f"{STS} --checkpoint-steps 2 --resume"
    (tmp_path / "run").mkdir()
    (output / "notes.txt").write_text("first")
    (output / "loss.safetensors").touch()  # so that the folder is one of a training
    (output / "training.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_step", killed)
        with pytest.raises(AssertionError):  # it ends with another status
            run(place, output, given)
    card = (output / "README.md").read_bytes()
    for name in ("README.md", "notes.txt"):
        (tmp_path / "new").write_text(f"my own {name}")
        os.replace(tmp_path / "new", output / name)  # as editors do
    run(place, output, given)
    assert (output / "README.md").read_text() == "my own README.md"
    assert (output / "notes.txt").read_text() == "my own notes.txt"
    assert b"<!-- Of `clusterns train`" in card


class Hub:
    """In place of HfApi."""

    repositories: dict[str, dict[str, bytes]] = {}  # noqa: RUF012
    error: Exception | None = None

    def __init__(self, **about):
        assert about["library_name"] == "clusterns"

    def create_repo(self, name, *, exist_ok):
        assert exist_ok
        self.repositories.setdefault(name, {})

    def create_commit(self, name, operations, *, commit_message):
        if self.error is not None:
            raise self.error
        for operation in operations:
            with operation.as_file() as file:
                self.repositories[name][operation.path_in_repo] = file.read()
        return huggingface_hub.CommitInfo(
            commit_url=f"https://huggingface.co/{name}/commit/1",
            commit_message=commit_message,
            commit_description="",
            oid="1",
        )


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(Hub, "repositories", {})
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return Hub


def test_the_finished_model_is_uploaded(place, tmp_path, hub, capsys, monkeypatch):
    """The model and what tells of it alone; after a failure with --resume, and from there as it is here."""
    output = tmp_path / "run"
    more = f"{STS} --checkpoint-steps 2 --push-to-hub someone/model"
    monkeypatch.setattr(hub, "error", OSError("no connection with hf_secret\nand more"))
    message = refused(capsys, command(place, output, more))
    assert (
        "--push-to-hub: expected someone/model on the hub to take the model, got OSError: no connection"
        in message
    )
    assert f"the model is safe in {output}" in message
    assert "hf_secret" not in message
    assert summary_of(output)["finished"]
    for name in ("notes.csv", "tokenizer_private.txt", "notes/config.json"):
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text("private")
    monkeypatch.setattr(hub, "error", None)
    assert main(command(place, output, f"{more} --resume")) == 0
    told = capsys.readouterr().out
    assert "this training has ended already\nuploaded: https://huggingface.co/someone/model/commit/1" in told
    found = hub.repositories["someone/model"]
    assert set(found) == {
        *("model.safetensors", "config.json", "modules.json", "1_Pooling/config.json", "clusterns.json"),
        *("sentence_bert_config.json", "tokenizer.json", "tokenizer_config.json", "head.safetensors"),
        *("loss.safetensors", "README.md", "training.json", "training.png"),
    }
    assert found["model.safetensors"] == (output / "model.safetensors").read_bytes()
    assert b'SentenceTransformer("someone/model")' in found["README.md"]
    assert json.loads(found["training.json"])["settings"]["train_file"] == "sentences.txt"
    assert not any(str(tmp_path).encode() in content for content in found.values())


def test_what_an_upload_lacks_is_known_before_the_training(place, tmp_path, hub, capsys, monkeypatch):
    output = tmp_path / "run"
    for name in ("model", "some one/model", "a/b/c", "someone/"):
        given = [*command(place, output), "--push-to-hub", name]
        assert (
            f"--push-to-hub: expected USER/MODEL, each of letters, digits, '-', '_' and '.', got {name!r}"
            in refused(capsys, given)
        )
    given = command(place, output, "--push-to-hub someone/model")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "got none; `hf auth login`, or a token in the variable HF_TOKEN" in refused(capsys, given)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "expected a hub to reach, got HF_HUB_OFFLINE" in refused(capsys, given)
    assert not output.exists()


def test_a_hub_model_is_named_as_the_base(trained):
    encoder = SentenceEncoder.from_pretrained(trained)
    config = TrainConfig(model="someone/base", preset=None)
    task = SimpleNamespace(rows=[("a", "b")] * 1200)
    loss_fn = SimpleNamespace(clustering_active=True)
    of_run = {"config": config, "task": task, "encoder": encoder, "loss_fn": loss_fn}
    text = card(SimpleNamespace(**of_run, best_scores={}, step=3, total_steps=9))
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "someone/base"
    assert "1,200 pairs. Read from: documentation strings" in text
