"""`clusterns report`: its clusters are those of the loss, the page stands alone, bad input is one line."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import WORDS, assert_close, make_encoder

from clusterns.cli import main
from clusterns.encoder import SentenceEncoder
from clusterns.evaluation.cluster_view import name_clusters, plane, view_clusters
from clusterns.evaluation.report import run_centroids
from clusterns.evaluation.report_page import write_case_studies, write_sentences
from clusterns.loss import ClusterNSLoss

pytest.importorskip("sklearn")
TEXTS = [f"a {first} {second} on the mat" for first in WORDS[:6] for second in WORDS[6:]]
ODD = '<script>alert(1)</script> & "quoted" </script> é, ,'


def report(model: Path, sentences: Path, page: Path, *options: str) -> int:
    required = ["--sentences", str(sentences), "--output", str(page), "--map", "pca"]
    return main(["report", str(model), *required, *options])


def points_of(page: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script id="points" type="application/json">(.*?)</script>', text, re.S)[1])


def rows_of(table: Path) -> list[dict]:
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Sentences, and the folder of a run: model with its head, centroids in the space behind it, log."""
    place = tmp_path_factory.mktemp("report")
    (place / "sentences.txt").write_text("\n".join([*TEXTS, ODD, TEXTS[0]]) + "\n", encoding="utf-8")
    encoder, loss = make_encoder(pooling="mean", max_length=8), ClusterNSLoss(16, 4)
    with torch.no_grad():
        states = encoder.project(encoder.encode(TEXTS))
    loss.centroids.copy_(states[::10][:4] * 7)
    loss.initialized.fill_(True)
    state = {**loss.state_dict(), "step": torch.tensor(5)}
    encoder.save(place / "run", beside={"loss.safetensors": state})
    figures = {"loss": 1.0, "info_nce": 1.0, "mean_cosine": 0.1, "seconds": 1}
    records = [{"step": 0, "dev": {"spearman": 1}}, *({"step": step, **figures} for step in range(1, 4))]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (place / "run" / "log.jsonl").write_text(text + '{"step": 4, "lo')
    return place


@pytest.fixture(scope="module")
def page(place: Path) -> Path:
    """Of the run, with all sentences of each cluster."""
    options = ["--examples", "6", "--nearest", "100"]
    assert report(place / "run", place / "sentences.txt", place / "page.html", *options) == 0
    return place / "page.html"


@pytest.fixture
def run(place: Path, tmp_path: Path, monkeypatch) -> Path:
    """The run, to be changed, without pictures: most of the time of a small report."""
    for name in ("cosines", "curves"):
        monkeypatch.setattr(f"clusterns.evaluation.report.draw_{name}", lambda *shown: "<svg></svg>")
    return shutil.copytree(place / "run", tmp_path / "run")


def test_a_run_is_shown_with_its_own_centroids(place: Path, page: Path) -> None:
    points = points_of(page)
    assert points["text"] == [*TEXTS, ODD]  # each once
    # Behind the head, where the loss sees them, at the length of training.
    encoder = SentenceEncoder.from_pretrained(place / "run")
    assert encoder.max_length == 8
    with torch.no_grad():
        states = torch.nn.functional.normalize(encoder.project(encoder.encode(points["text"])), dim=1)
    centroids, _ = run_centroids(place / "run")
    cosines = states @ torch.nn.functional.normalize(centroids, dim=1).T
    assert points["cluster"] == cosines.argmax(dim=1).tolist()
    assert points["cosine"] == pytest.approx(cosines.max(dim=1).values.tolist(), abs=1e-3)
    text = page.read_text(encoding="utf-8")
    assert "of the run, loss.safetensors" in text
    assert "curves of the training run" in text
    rows = rows_of(page.with_name("page-examples.csv"))
    assert len({row["sentence"] for row in rows}) == 6
    for row in rows:
        i = points["text"].index(row["sentence"])
        order = cosines[i].argsort(descending=True).tolist()
        assert int(row["cluster"]) == order[0]
        assert float(row["cosine with centroid"]) == pytest.approx(float(cosines[i, order[0]]), abs=1e-3)
        if row["role"] == "hard-negative centroid":
            assert int(row["other"]) == order[1]
            expected = cosines[i, order[1]]
        else:
            j = points["text"].index(row["other"])
            expected = states[i] @ states[j]
            assert points["cluster"][j] == order[0 if row["role"] == "false negative" else 1]
            assert i != j
        assert float(row["cosine"]) == pytest.approx(float(expected), abs=1e-3)


def test_the_page_needs_nothing_from_anywhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    addresses = re.findall(r'[\s:](?:src|srcset|href|data)="([^"]*)"', text)
    places = set(re.findall(r'\sid="([^"]*)"', text))
    assert {f"cluster-{cluster}" for cluster in points_of(page)["cluster"]} <= places
    assert {address[0] for address in addresses} == {"#"}
    assert {address[1:] for address in addresses} <= places
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {f"#{place}" for place in places}
    assert "default-src 'none'" in text
    names = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, no addresses
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) == names
    assert text.count("<script") == text.count("</script") == 2  # its own two, and none of a sentence
    assert ODD in html.unescape(text)


def test_a_model_without_centroids_is_clustered(run: Path, place: Path, tmp_path: Path) -> None:
    """So is a run where a number of clusters is given, or where clustering never started."""
    sentences, page, table = place / "sentences.txt", tmp_path / "page.html", tmp_path / "other.csv"
    few = ["--num-clusters", "5", "--map-sentences", "40"]
    assert report(run, sentences, page, *few, "--csv", str(table)) == 0
    points = points_of(page)
    assert len(points["text"]) == 40
    assert set(points["cluster"]) <= set(range(5))
    assert table.is_file()
    assert not page.with_suffix(".csv").exists()
    assert "5, by k-means over these sentences</td>" in page.read_text(encoding="utf-8")
    for name in ("loss.safetensors", "log.jsonl"):
        (run / name).unlink()
    assert report(run, sentences, page, *few) == 0
    assert points_of(page) == points
    state = ClusterNSLoss(16, 4).state_dict()
    SentenceEncoder.from_pretrained(run).save(run, beside={"loss.safetensors": state})
    assert report(run, sentences, page) == 0
    assert "as clustering never started in the run" in page.read_text(encoding="utf-8")


def test_bad_input_is_one_line_and_leaves_old_files(run: Path, place: Path, tmp_path: Path, capsys) -> None:
    page, table, one = (tmp_path / name for name in ("p.html", "p.csv", "1.txt"))
    sentences = place / "sentences.txt"
    one.write_text("a cat\na cat\n")
    page.write_text("old")
    table.write_text("text\na cat\na dog\n")
    cases = [
        (run, one, [], "--sentences: expected at least two different sentences, got one in"),
        (run, sentences, ["--num-clusters", "1000"], "--num-clusters: expected at most one for each of"),
        (run, table, [], "p.csv; choose another, as --csv OTHER.csv"),
    ]
    for model, file, options, words in cases:
        assert report(model, file, page, *options) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
        assert page.read_text(encoding="utf-8") == "old"
        assert table.read_text() == "text\na cat\na dog\n"


@pytest.mark.parametrize("rows", [3, 30])
def test_a_map_of_few_sentences(rows: int) -> None:
    unit = torch.nn.functional.normalize(torch.randn(rows, 5), dim=1)
    assert plane(unit, "tsne", seed=0).shape == (rows, 2)


def test_the_table_has_every_row_and_the_page_says_how_many(
    run: Path, place: Path, tmp_path: Path, capsys
) -> None:
    sentences, page = place / "sentences.txt", tmp_path / "page.html"
    assert report(run, sentences, page, "--rows", "all") == 0
    rows = rows_of(tmp_path / "page.csv")
    assert [row["text"] for row in rows] == [*TEXTS, ODD, TEXTS[0]]
    assert rows[-1] == rows[0]
    points = points_of(page)
    for row, cluster, cosine in zip(rows, points["cluster"], points["cosine"], strict=False):
        assert (int(row["cluster"]), int(row["mates"])) == (cluster, points["cluster"].count(cluster) - 1)
        assert float(row["cosine"]) == pytest.approx(cosine, abs=1e-3)
        assert float(row["runner-up cosine"]) <= float(row["cosine"])
    labels = {entry["id"]: entry["label"] for entry in points["clusters"]}
    for row in rows:
        name = labels[int(row["cluster"])]
        assert name == (f"{row['cluster']} {row['name']}" if row["name"] else f"cluster {row['cluster']}")
    assert report(run, sentences, page, "--rows", str(len(TEXTS))) == 0
    words = f"{len(TEXTS)} of {len(TEXTS) + 2} rows: the first {len(TEXTS)} (--rows all takes all)"
    assert words in capsys.readouterr().out
    assert words in re.sub("<[^>]*>", "", page.read_text(encoding="utf-8"))
    assert len(rows_of(tmp_path / "page.csv")) == len(TEXTS)
    assert report(run, sentences, page, "--rows", "1") == 2
    with pytest.raises(SystemExit):
        report(run, sentences, page, "--rows", "some")
    assert "--rows: expected a number or all, got 'some'" in capsys.readouterr().err


def test_names_are_the_telling_words() -> None:
    texts = ["the cat sat on the mat", "the cat slept", "a storm, the rain and the wind", "the rain fell"]
    texts += ["le chat dort", "le chat mange", "机器学习很好", "机器学习", "1 2 3", "😀 !!"]
    ids = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    names = name_clusters(texts, ids, 6)
    assert [names[i] for i in (0, 1, 4, 5)] == ["cat", "rain", "", ""]
    assert names[2] == "chat, le"
    assert names[3] != ""
    assert set(names[3]) <= set("机器学习, ")
    assert name_clusters(["1", "2", "!"], np.array([0, 0, 1]), 2) == ["", ""]
    # What all say tells nothing, in whatever language and however few clusters.
    same = [f"ja {word} und {word}{i}" for word in ("hund", "katze") for i in range(4)]
    assert name_clusters(same, np.repeat([0, 1], 4), 2) == ["hund", "katze"]


def test_no_cell_of_the_table_is_a_formula(tmp_path: Path) -> None:
    """A spreadsheet would run it; numbers below 0 stay numbers."""
    texts = ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", "a=1", "'=1"]
    view = view_clusters(texts, torch.randn(8, 2), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), "somewhere")
    write_case_studies(view, view.examples(8, 8, seed=0), tmp_path / "cases.csv")
    write_sentences(view, texts, tmp_path / "all.csv")
    safe = [*(f"'{text}" for text in texts[:6]), *texts[6:]]
    assert [row["text"] for row in rows_of(tmp_path / "all.csv")] == safe
    rows = rows_of(tmp_path / "cases.csv")
    assert {row["sentence"] for row in rows} == set(safe)
    assert not [row["other"] for row in rows if row["other"].startswith(tuple("=+-@\t\r"))]
    assert min(float(row["cosine"]) for row in rows) < 0


def test_numbers_of_a_view_are_those_of_their_definitions() -> None:
    embeddings, centroids = torch.randn(40, 6), torch.randn(5, 6)
    centroids[4] = -embeddings.sum(dim=0) * 5  # probably nobody's
    view = view_clusters([str(i) for i in range(40)], embeddings * 3, centroids, "somewhere")
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    cosines = unit @ torch.nn.functional.normalize(centroids, dim=1).T
    order = torch.stack([view.nearest, view.runner_up], 1)
    assert_close(cosines.gather(1, order), cosines.topk(2).values)  # ids of ties may be others
    alike = (order[:, 0] == order[:, 0, None]) & ~torch.eye(40, dtype=torch.bool)
    mates = float((unit @ unit.T)[alike].mean())
    facts = view.facts()
    assert facts["mates_cosine"] == pytest.approx(mates, abs=1e-5)
    own = float(cosines.max(1).values.mean())
    assert facts["nearest_cosine"] == pytest.approx(own, abs=1e-5)
    assert facts["empty_clusters"] == 5 - len(set(order[:, 0].tolist()))
    alone = view_clusters(["a", "b"], torch.eye(2), torch.eye(2), "somewhere")
    assert len(alone.cosine_samples(seed=0)["cluster-mates"]) == 0
    assert alone.mates == [0, 0]
    assert [example.false_negatives for example in alone.examples(2, 3, seed=0)] == [[], []]
