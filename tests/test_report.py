"""`clusterns report`: its clusters are those of the loss, the page stands alone, bad input is one line."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits
from tiny import WORDS, assert_close, make_encoder

from clusterns.cli import main
from clusterns.encoder import SentenceEncoder
from clusterns.evaluation.cluster_view import plane, view_clusters
from clusterns.evaluation.report import run_centroids
from clusterns.evaluation.report_figures import draw_cosines
from clusterns.evaluation.report_page import write_case_studies
from clusterns.loss import ClusterNSLoss

pytest.importorskip("sklearn")
TEXTS = [f"a {first} {second} on the mat" for first in WORDS[:6] for second in WORDS[6:]]
ODD = '<script>alert(1)</script> & "quoted" </script> é, ,'


class Page(HTMLParser):
    """What a page refers to, and the text of its elements by tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open.append(tag)
        self.addresses += [
            value or "" for name, value in attributes if name in ("src", "href", "data", "srcset")
        ]

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    path = tmp_path / "sentences.txt"
    path.write_text("\n".join([*TEXTS, ODD, TEXTS[0]]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run: model with its head, centroids in the space behind it, log."""
    encoder = make_encoder(pooling="mean", max_length=8)
    loss = ClusterNSLoss(16, 4)
    with torch.no_grad():
        states = encoder.project(encoder.encode(TEXTS))
    loss.centroids.copy_(states[::10][:4] * 7)
    loss.initialized.fill_(True)
    encoder.save(
        tmp_path / "run", beside={"loss.safetensors": {**loss.state_dict(), "step": torch.tensor(5)}}
    )
    records = [
        {"step": step, "loss": 1 / step, "info_nce": 1 / step, "mean_cosine": 0.1, "seconds": 1}
        for step in range(1, 4)
    ]
    text = "".join(json.dumps(record) + "\n" for record in [{"step": 0, "dev": {"spearman": 1}}, *records])
    (tmp_path / "run" / "log.jsonl").write_text(text + '{"step": 4, "lo')
    return tmp_path / "run"


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time of a small report is its pictures."""
    for name in ("sizes", "cosines", "curves"):
        monkeypatch.setattr(f"clusterns.evaluation.report.draw_{name}", lambda shown: "<svg></svg>")


def report(model: Path, sentences: Path, page: Path, *options: str) -> int:
    required = ["--sentences", str(sentences), "--output", str(page), "--map", "pca"]
    return main(["report", str(model), *required, *options])


def points_of(page: Path) -> dict:
    text = re.search(
        r'<script id="points" type="application/json">(.*?)</script>',
        page.read_text(encoding="utf-8"),
        re.DOTALL,
    )
    return json.loads(text.group(1))


def test_a_run_is_shown_with_its_own_centroids(run: Path, sentences: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert report(run, sentences, page, "--examples", "6", "--nearest", "3") == 0
    points = points_of(page)
    assert points["text"] == [*TEXTS, ODD]  # each once
    # Behind the head, where the loss sees them, at the length of training.
    encoder = SentenceEncoder.from_pretrained(run)
    assert encoder.max_length == 8
    with torch.no_grad():
        states = torch.nn.functional.normalize(encoder.project(encoder.encode(points["text"])), dim=1)
    cosines = states @ torch.nn.functional.normalize(run_centroids(run), dim=1).T
    assert points["cluster"] == cosines.argmax(dim=1).tolist()
    assert points["cosine"] == pytest.approx(cosines.max(dim=1).values.tolist(), abs=1e-3)
    text = page.read_text(encoding="utf-8")
    assert "of the run, loss.safetensors" in text
    assert "curves of the training run" in text

    with page.with_suffix(".csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    place = {sentence: row for row, sentence in enumerate(points["text"])}
    assert len({row["sentence"] for row in rows}) == 6
    for row in rows:
        i = place[row["sentence"]]
        order = cosines[i].argsort(descending=True).tolist()
        assert int(row["cluster"]) == order[0]
        assert float(row["cosine with centroid"]) == pytest.approx(float(cosines[i, order[0]]), abs=1e-3)
        if row["role"] == "hard-negative centroid":
            assert int(row["other"]) == order[1]
            expected = cosines[i, order[1]]
        else:
            j = place[row["other"]]
            expected = states[i] @ states[j]
            assert points["cluster"][j] == order[0 if row["role"] == "false negative" else 1]
            assert i != j
        assert float(row["cosine"]) == pytest.approx(float(expected), abs=1e-3)


def test_the_page_needs_nothing_from_anywhere(run: Path, sentences: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert report(run, sentences, page, "--examples", "1000", "--nearest", "100") == 0
    text = page.read_text(encoding="utf-8")
    found = Page(text)
    assert found.addresses
    assert all(address.startswith("data:image/svg+xml;base64,") for address in found.addresses)
    assert "link" not in found.tags
    assert found.tags.count("script") == 2  # its own two, and none of a sentence
    assert ODD in "".join(found.texts["td"]) + "".join(found.texts["strong"])
    assert "default-src 'none'" in text
    outside = set(re.findall(r"https?://[^\s\"'<]+", text))
    assert outside == {"http://www.w3.org/2000/svg"}  # a name, no address


@pytest.mark.usefixtures("no_pictures")
def test_a_model_without_centroids_is_clustered(run: Path, sentences: Path, tmp_path: Path) -> None:
    for name in ("loss.safetensors", "log.jsonl"):
        (run / name).unlink()
    page = tmp_path / "page.html"
    table = tmp_path / "other.csv"
    assert (
        report(run, sentences, page, "--num-clusters", "5", "--csv", str(table), "--map-sentences", "40") == 0
    )
    points = points_of(page)
    assert len(points["text"]) == 40
    assert set(points["cluster"]) <= set(range(5))
    assert table.is_file()
    assert not page.with_suffix(".csv").exists()
    text = page.read_text(encoding="utf-8")
    assert "5, by k-means over these sentences" in text
    assert "The run" not in text
    again = tmp_path / "again.html"
    assert report(run, sentences, again, "--num-clusters", "5", "--map-sentences", "40") == 0
    assert points_of(again) == points


@pytest.mark.usefixtures("no_pictures")
def test_a_number_of_clusters_leaves_the_runs_own_aside(run: Path, sentences: Path, tmp_path: Path) -> None:
    assert report(run, sentences, tmp_path / "page.html", "--num-clusters", "3") == 0
    assert "3, by k-means over these sentences" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_pictures")
def test_a_run_in_which_clustering_never_started(run: Path, sentences: Path, tmp_path: Path) -> None:
    state = ClusterNSLoss(16, 4).state_dict()
    SentenceEncoder.from_pretrained(run).save(run, beside={"loss.safetensors": state})
    assert run_centroids(run) is None
    assert report(run, sentences, tmp_path / "page.html") == 0
    assert "by k-means over these sentences" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_bad_input_is_one_line_and_leaves_old_files(
    run: Path, sentences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")
    one = tmp_path / "one.txt"
    one.write_text("a cat\na cat\n")
    broken = make_encoder(pooling="mean")
    with torch.no_grad():
        broken.transformer.embeddings.LayerNorm.weight[0] = float("nan")
    broken.save(tmp_path / "broken")
    wide = tmp_path / "wide"
    shutil.copytree(run, wide)
    SentenceEncoder.from_pretrained(run).save(
        wide,
        beside={"loss.safetensors": {**ClusterNSLoss(8, 4).state_dict(), "initialized": torch.tensor(True)}},
    )
    (tmp_path / "garbled").mkdir()
    shutil.copytree(run, tmp_path / "garbled", dirs_exist_ok=True)
    (tmp_path / "garbled" / "loss.safetensors").write_bytes(b"garbage")
    cases = [
        (run, one, [], "--sentences: expected at least two different sentences, got one in"),
        (run, tmp_path / "absent.txt", [], "absent.txt"),
        (run, sentences, ["--num-clusters", "1"], "--num-clusters: expected at least 2, got 1"),
        (run, sentences, ["--num-clusters", "1000"], "--num-clusters: expected at most one for each of"),
        (run, sentences, ["--csv", str(page)], "--csv: expected another file than --output, got"),
        (
            run,
            sentences,
            ["--csv", str(sentences)],
            f"which is of --sentences {sentences}; choose another, as --csv",
        ),
        (run, sentences, ["--csv", str(run / "vocab.txt")], f"which is of model {run}; choose another"),
        (run, sentences, ["--seed", "5000000000"], "--seed: expected 0 to 4294967295, got 5000000000"),
        (run, sentences, ["--text-columns", "a,b"], "--text-columns: expected one column, got 2: a,b"),
        (run, tmp_path / "page.csv", [], "page.csv; choose another, as --csv OTHER.csv"),
        (run, sentences, ["--csv", str(tmp_path / "no" / "a.csv")], "--csv: expected a file in a folder"),
        (run, sentences, ["--examples", "-1"], "--examples: expected at least 0, got -1"),
        (tmp_path / "broken", sentences, [], "expected finite embeddings, got"),
        (wide, sentences, [], "loss.safetensors: expected centroids of width 16 as the embeddings, got 8"),
        (tmp_path / "garbled", sentences, [], "loss.safetensors: expected the state of a loss, got"),
        (tmp_path / "absent", sentences, [], "model: expected a folder or a hub name"),
    ]
    (tmp_path / "page.csv").write_text("text\na cat\na dog\n")
    for model, file, options, words in cases:
        assert report(model, file, page, *options) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
        assert page.read_text(encoding="utf-8") == "old"
        assert page.with_suffix(".csv").read_text() == "text\na cat\na dog\n"


def test_few_sentences_and_both_maps(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = tmp_path / "few.txt"
    few.write_text("a cat\nthe dog ran\na cat\n")
    (run / "log.jsonl").unlink()  # the pictures of the clusters are enough
    assert report(run, few, tmp_path / "page.html") == 0
    repeats = "3 rows; 1 of them repeat others and count once"
    assert repeats in capsys.readouterr().out
    assert repeats in (tmp_path / "page.html").read_text(encoding="utf-8")
    near = np.float32(1) - np.arange(300, dtype=np.float32) * np.finfo(np.float32).epsneg / 100
    for values in (near, np.full(300, -0.25), np.zeros(1)):
        assert draw_cosines({"all pairs": values}).endswith("</svg>\n")
    assert points_of(tmp_path / "page.html")["text"] == ["a cat", "the dog ran"]
    unit = torch.nn.functional.normalize(torch.randn(30, 5), dim=1)
    for method in ("tsne", "pca"):
        with threadpool_limits(1):  # the same bits need the same order of sums
            places, again = (plane(unit, method, seed=0) for _ in range(2))
        assert places.shape == (30, 2)
        np.testing.assert_array_equal(places, again)
    assert plane(unit[:3], "tsne", seed=0).shape == (3, 2)


def test_no_cell_of_the_table_is_a_formula(tmp_path: Path) -> None:
    """A spreadsheet would run it; numbers below 0 stay numbers."""
    texts = ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", "a=1", "'=1"]
    view = view_clusters(texts, torch.randn(8, 2), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), "somewhere")
    write_case_studies(view, view.examples(8, 8, seed=0), tmp_path / "cases.csv")
    with (tmp_path / "cases.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["sentence"] for row in rows} == {*(f"'{text}" for text in texts[:6]), *texts[6:]}
    assert not [row["other"] for row in rows if row["other"].startswith(tuple("=+-@\t\r"))]
    assert len({row["other"] for row in rows}) > 2
    assert min(float(row["cosine"]) for row in rows) < 0


def test_numbers_of_a_view_are_those_of_their_definitions() -> None:
    embeddings, centroids = torch.randn(40, 6), torch.randn(5, 6)
    centroids[4] = -embeddings.sum(dim=0) * 5  # probably nobody's
    view = view_clusters([str(i) for i in range(40)], embeddings * 3, centroids, "somewhere")
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    cosines = unit @ torch.nn.functional.normalize(centroids, dim=1).T
    order = torch.stack([view.nearest, view.runner_up], 1)
    assert_close(cosines.gather(1, order), cosines.topk(2).values)  # ids of ties may be others
    mates = [
        float(unit[i] @ unit[j])
        for i in range(40)
        for j in range(40)
        if i != j and order[i, 0] == order[j, 0]
    ]
    facts = view.facts()
    assert facts["mean cosine of cluster-mates"] == pytest.approx(np.mean(mates), abs=1e-5)
    assert facts["mean cosine with the own centroid"] == pytest.approx(
        float(cosines.max(1).values.mean()), abs=1e-5
    )
    assert facts["empty clusters"] == 5 - len(set(order[:, 0].tolist()))
    samples = view.cosine_samples(seed=0)
    # Drawn pairs: their mean is that of all pairs, for mates as well as for any.
    assert samples["cluster-mates"].mean() == pytest.approx(np.mean(mates), abs=0.01)
    assert samples["all pairs"].mean() == pytest.approx(facts["mean cosine of all pairs"], abs=0.01)
    assert samples["all pairs"].max() < 0.9999
    alone = view_clusters(["a", "b"], torch.eye(2), torch.eye(2), "somewhere")
    assert len(alone.cosine_samples(seed=0)["cluster-mates"]) == 0
    assert "mean cosine of cluster-mates" not in alone.facts()
    assert [example.mates for example in alone.examples(2, 3, seed=0)] == [0, 0]


def test_the_map_is_drawn_in_a_real_browser(run: Path, sentences: Path, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine to open the page with")
    page = tmp_path / "page.html"
    assert report(run, sentences, page) == 0
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [
            browser,
            *flags,
            "--virtual-time-budget=3000",
            "--enable-logging=stderr",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.stdout.count("<circle") == len(TEXTS) + 1
    assert f"{len(TEXTS) + 1} shown" in done.stdout
    assert "CONSOLE" not in done.stderr  # neither errors nor what the policy blocked
