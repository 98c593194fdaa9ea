"""Data of users: which kind a file is, what is refused, and the figures of each kind."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import ndcg_score
from small_files import cases, refuses, write
from tiny import WORDS, make_encoder
from train_problems import command, log_of, refused, run, summary_of, write_place

from clusterns.corpus.judged import LabelledTexts, Queries, ScoredPairs
from clusterns.corpus.judged_files import load_judged
from clusterns.evaluation.clustering import evaluate_clustering
from clusterns.evaluation.correlation import bootstrap_means
from clusterns.evaluation.judging import DEV_SEEDS, DEV_STARTS, dev_scores, judge
from clusterns.evaluation.retrieval import relevant_ranks, retrieval_figures
from clusterns.evaluation.sts_scores import Vectors
from clusterns.training.config import TrainConfig
from clusterns.training.task import prepare_task

PAIRS = "a cat,the cat,4.5\na dog,rain,-1\nfar home,home,2\n"
CLASSES = "a cat,pet\nthe dog,pet\nit rains,sky\n"
APART = "what is a cat,an animal\nwhat is rain,water\nwhere are we,far from home\n"
FOUND = "what is a cat,an animal\nwhat is rain,water\nwhat is rain,weather\n"


@cases(
    "name content options kind said",
    [
        (
            "a.csv",
            "sentence1,sentence2,score\n" + PAIRS,
            {},
            "pairs",
            "'sentence1', 'sentence2' with 'score' from -1 to",
        ),
        (
            "a.csv",
            "left,right,similarity\n" + PAIRS,
            {},
            "pairs",
            "'left', 'right' with 'similarity' from -1 to 4.5; 3 s",
        ),
        (
            "a.tsv",
            PAIRS.replace(",", "\t"),
            {},
            "pairs",
            "no header; '1', '2' with '3' from -1 to 4.5; 3 scored pairs",
        ),
        (
            "a.csv",
            "n,u,v\n4.5,a,b\n1,c,d\n",
            {"columns": "u,v,n"},
            "pairs",
            "'u', 'v' with 'n' from 1 to 4.5",
        ),
        (
            "a.json",
            [
                {"question1": "a", "question2": "b", "label": 1},
                {"question1": "c", "question2": "b", "label": 0},
            ],
            {},
            "pairs",
            "with 'label' from 0 to 1",
        ),
        (
            "a.csv",
            "text,label\n" + CLASSES,
            {},
            "labels",
            "'label' as labels, 'text' as texts; 3 rows of 2 classes",
        ),
        (
            "a.tsv",
            CLASSES.replace(",", "\t"),
            {},
            "labels",
            "'2' as labels, '1' as texts; 3 rows of 2 classes",
        ),
        (
            "a.csv",
            "title,text,label\nx,a,1\ny,b,2\nz,c,1\n",
            {},
            "labels",
            "'label' as labels, 'text' as texts",
        ),
        (
            "a.csv",
            "question,answer\n" + FOUND,
            {},
            "queries",
            "'question' as queries, 'answer' as passages; 2 queries, 3 passages",
        ),
        (
            "a.csv",
            "sent0,sent1,hard_neg\na,b,c\nd,e,f\n",
            {},
            "queries",
            "'sent0' as queries, 'sent1' as passages; 2 queries",
        ),
        ("a.csv", "u,v\n" + APART, {"columns": "u,v"}, "queries", "'u' as queries, 'v' as passages"),
        (
            "a.csv",
            "text1,text2\n" + FOUND,
            {"kind": "queries"},
            "queries",
            "'text1' as queries, 'text2' as passages",
        ),
    ],
)
def test_the_kind_is_found_and_said(tmp_path: Path, name, content, options, kind, said) -> None:
    path = write(tmp_path, name, content)
    found = load_judged(path, **options)
    assert found.kind == kind
    assert said in found.account
    assert load_judged(path, **{"kind": kind, **options}) == found


UNTOLD = "expected scored pairs, labelled texts or queries, got"


@cases(
    "content options words",
    [
        (
            "u,v\n" + APART,
            {},
            (UNTOLD, "u, v (csv parted by comma", "--dev-kind (pairs, labels, queries) or --dev-col"),
        ),
        ("text1,text2\n" + APART, {}, (UNTOLD,)),  # was the score forgotten?
        ("title,body,class\nx,a,1\ny,b,2\nz,c,1\n", {}, (UNTOLD,)),  # no scores
        ("query,passage,label\na,b,1\na,c,0\n", {}, (UNTOLD,)),  # the second row is no answer
        ("a,b,3\nc,d,1\ne,f,3\n", {}, (UNTOLD,)),  # texts with titles, or pairs
        ("u,v\n" + "x,a\nx,b\ny,c\ny,d\n", {"columns": "u,v"}, (UNTOLD,)),  # labels first, or queries
        ("u,v\n" + FOUND, {"kind": "pairs"}, ("expected sentence1,sentence2,score, got u, v (csv",)),
        ("u,v\n" + FOUND, {"columns": "u,w"}, ("expected a column 'w', got u, v",)),
        (
            "sentence1,sentence2,label\na,b,yes\nc,d,no\n",
            {},
            ("expected numbers in column 'label', got 'yes'",),
        ),
        (
            "sentence1;sentence2;score\na;b;4,75\nc;d;1,25\ne;f;3\n",
            {},
            ("expected numbers in column 'score', as 4.75, got '4,75' and the like in 2 of 3 rows",),
        ),
        (
            "sentence1,sentence2,score\na,b,2\nc,d,2\n",
            {},
            ("expected scores that differ in 'score', got only 2",),
        ),
        ("sentence1,sentence2,score\na,b,2\n", {}, ("expected at least two scored pairs, got 1",)),
        ("text,label\na,x\nb,x\n", {}, ("expected at least two classes in 'label', got only 'x'",)),
        (
            "query,passage\na,\nb, \n",
            {},
            ("a query and its passage in some row, got none, left out: 2 with a blank passage",),
        ),
        ("query,passage\na,b\nc,b\n", {}, ("expected at least two passages to choose from, got one",)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*rows are left out")
def test_what_judges_no_model_is_refused(tmp_path: Path, content: str, options: dict, words: tuple) -> None:
    refuses(write(tmp_path, "a.csv", content), *words, load=partial(load_judged, of="dev", **options))


def test_arguments_that_do_not_belong(tmp_path: Path) -> None:
    path = str(write(tmp_path, "a.csv", "text,label\n" + CLASSES))
    for options, words in (
        ({"kind": "pair"}, "--data-kind: expected one of 'pairs', 'labels', 'queries', got 'pair'"),
        ({"columns": "text"}, "--data-columns: expected sentence1,sentence2,score or text,label or query,"),
        ({"columns": "text,text"}, "--data-columns: expected sentence1,.* got text,text"),
        (
            {"columns": "text,label", "kind": "pairs"},
            "--data-columns: expected sentence1,sentence2,score, got t",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            load_judged(path, **options)
    config = TrainConfig(train_file=path, text_columns="text", dev=path, dev_corpus=path)
    with pytest.raises(ValueError, match=f"--dev-corpus: expected queries in --dev, got labels in {path}"):
        prepare_task(config, lambda _: None)


@pytest.mark.filterwarnings("ignore:.*taken for a")
def test_a_query_with_its_passages_and_a_corpus(tmp_path: Path) -> None:
    """Blank rows and a query that is its own passage are left out and said; the corpus adds what is new."""
    rows = "query,passage\nq a,p a\n q  a,p b\nq b,\nq c,q c\np a,p c\nq a,p a\n"
    path = write(tmp_path, "a.csv", rows)
    corpus = write(tmp_path, "corpus.txt", "p b\nother one\n\nanother\n")
    with pytest.warns(UserWarning, match=r"1 of 6 rows are left out, 1 with a blank passage \(line 4\)"):
        found = load_judged(path, corpus=corpus)
    assert (found.queries, found.relevant) == (["q a", "p a"], [[0, 1], [2]])
    assert found.passages == ["p a", "p b", "p c", "other one", "another"]
    assert "; 2 queries, 3 passages and 2 more of " in found.account
    assert (
        "1 of the queries are passages too, none is compared with itself; left out: 1 with a blank p"
        in found.account
    )
    for name, content, words in (
        ("b.csv", 'text,n\n"",1\n" ",2\n', "expected passages in 'text', got none"),
        (
            "c.csv",
            "left,right\na b,c d\n",
            "one column of texts, or one called text or passage, got left",
        ),
        ("d.txt", "", "got an empty file"),
    ):
        with pytest.raises(ValueError, match=words):
            load_judged(path, corpus=write(tmp_path, name, content))


# Small whole numbers make ties, also of vectors that differ, and zero vectors.
@settings(max_examples=60)
@given(st.integers(1, 12), st.integers(2, 30), st.integers(0, 10_000), st.integers(1, 40))
def test_retrieval_is_that_of_all_ranks(queries: int, passages: int, seed: int, cells: int) -> None:
    generator = np.random.default_rng(seed)
    x, y = (generator.integers(-2, 3, (count, 3)).astype(np.float64) for count in (queries, passages))
    sizes = generator.integers(1, passages + 1, queries)
    relevant = [generator.choice(passages, size, replace=False).tolist() for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clusterns.evaluation.retrieval._CELLS", cells)
        ranks = relevant_ranks("x", torch.from_numpy(x).float(), torch.from_numpy(y).float(), relevant)
    found = retrieval_figures(ranks, relevant)
    unit = [rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9) for rows in (x, y)]
    for row, own in enumerate(relevant):
        gains = np.isin(np.arange(passages), own).astype(float)
        # A tie goes to the passage that is not relevant.
        cosines = (unit[0][row] @ unit[1].T).round(9)
        order = np.lexsort((gains, -cosines))
        places = np.flatnonzero(gains[order]) + 1
        assert found["mrr_at_10"][row] == pytest.approx(1 / places[0] if places[0] <= 10 else 0)
        for depth in (1, 5, 10):
            assert found[f"recall_at_{depth}"][row] == pytest.approx((places <= depth).sum() / len(own))
        falling = np.empty(passages)
        falling[order] = np.arange(passages)[::-1]
        assert found["ndcg_at_10"][row] == pytest.approx(ndcg_score([gains], [falling], k=10))


def test_a_query_does_not_meet_itself_and_the_chosen_figures_are_told() -> None:
    class Fixed:
        def encode(self, sentences, **_):
            return torch.tensor([[1.0, 0.1 * "abcdefgh".index(sentence)] for sentence in sentences])

    judged = Queries(["a", "h"], ["a", "c", "b"], [[1], [1]])
    scores = dev_scores("x", judged, Fixed())
    # "a" meets b, then c; "h" meets c first.
    assert scores["mrr_at_10"] == pytest.approx(75)
    assert (scores["recall_at_1"], scores["recall_at_5"]) == (50, 100)


def data(kind: str) -> ScoredPairs | LabelledTexts | Queries:
    generator = np.random.default_rng(5)
    texts = [" ".join(generator.choice(WORDS, 3)) for _ in range(60)]
    if kind == "pairs":
        return ScoredPairs(texts[:30], texts[30:], list(generator.random(30)))
    if kind == "labels":
        return LabelledTexts(texts, [0] * 40 + [1] * 20, ["x", "y"])
    passages = list(dict.fromkeys(f"{text} home" for text in texts))
    return Queries(texts[:20], passages, [[index, index + 1] for index in range(20)])


@pytest.mark.parametrize("kind", ["pairs", "labels", "queries"])
def test_figures_and_intervals_of_each_kind(kind: str) -> None:
    encoder, judged = make_encoder(pooling="mean"), data(kind)
    calls = []
    encode = encoder.encode
    encoder.encode = lambda sentences, **more: calls.append(list(sentences)) or encode(sentences, **more)
    vectors = Vectors(encoder, judged.sentences, 64, False)
    assert [sorted(call) for call in calls] == [sorted(set(judged.sentences))]
    options = {"seeds": DEV_SEEDS, "starts": DEV_STARTS}
    found, drawn = judge("x", judged, vectors, normalized=False, resamples=200, seed=1, **options)
    scores = dev_scores("x", judged, encoder)
    name = next(iter(scores))
    first = found[name]["mean"] if kind == "labels" else found[name]
    assert scores[name] == pytest.approx(first)
    assert found["low"] < first < found["high"]
    assert found["low"] == pytest.approx(np.quantile(drawn, 0.025))
    assert dev_scores("x", judged, encoder) == scores
    if kind == "pairs":
        one, two = (torch.nn.functional.normalize(vectors.of(side)) for side in (judged.first, judged.second))
        assert first == pytest.approx(
            100 * spearmanr((one * two).sum(dim=1), judged.scores).statistic, abs=1e-3
        )
    if kind == "labels":
        _, correct = evaluate_clustering("x", vectors.of(judged.texts), judged.labels, **options)
        assert drawn == pytest.approx(bootstrap_means("x", correct, 200, 1))
        # As drawing runs and texts one by one gives: two runs that differ count beside the texts.
        unlike = np.stack([np.arange(60) < 20, np.arange(60) < 40])
        random = np.random.default_rng(0)
        sums = [unlike[random.integers(2, size=2)][:, random.integers(60, size=60)] for _ in range(4000)]
        spread = np.mean(sums, axis=(1, 2)).std()
        assert bootstrap_means("x", unlike, 4000, 1).std() == pytest.approx(100 * spread, rel=0.1)
        assert spread > 1.5 * bootstrap_means("x", unlike.mean(axis=0), 4000, 1).std() / 100


@pytest.mark.parametrize("kind", ["pairs", "labels", "queries"])
def test_a_checkpoint_that_tells_nothing_apart_scores_worst_and_nan_is_an_error(kind: str) -> None:
    class One:
        def __init__(self, value: float) -> None:
            self.value = value

        def encode(self, sentences, **_):
            return torch.full((len(sentences), 4), self.value)

    with pytest.warns(UserWarning, match="^x: all .* collapsed"):
        scores = dev_scores("x", data(kind), One(0.5))
    assert next(iter(scores.values())) == {"pairs": -100, "labels": 0, "queries": 0}[kind]
    assert next(iter(dev_scores("x", data(kind), make_encoder()).values())) > next(iter(scores.values()))
    with pytest.raises(ValueError, match=r"^x: expected finite embeddings, got \d+ (pairs|texts) with NaN"):
        dev_scores("x", data(kind), One(math.nan))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return write_place(tmp_path_factory.mktemp("judged"))


@cases(
    "content first",
    [
        ("text1,text2,score\na cat,the red cat,1\nthe dog,a river,0.2\na tree,house,0.5\n", "spearman"),
        ("text,label\na cat,x\nthe red cat,x\na river,y\nthe dog,y\nold house,x\n", "accuracy"),
        ("query,passage\na cat,the red cat\nthe dog,a bird\nthe dog,a river\n", "mrr_at_10"),
    ],
)
@pytest.mark.usefixtures("one_thread", "no_picture")
def test_own_data_chooses_the_checkpoint(place, tmp_path, capsys, content: str, first: str) -> None:
    path, output = write(tmp_path, "dev.csv", content), tmp_path / "out"
    more = f"--eval-steps 1 --checkpoint-steps 1 --dev {path} --max-steps"
    run(place, output, f"{more} 2")
    assert f"dev: {path}: csv parted by comma, header; " in capsys.readouterr().out
    judged = [record["dev"] for record in log_of(output) if "dev" in record]
    assert [next(iter(scores)) for scores in judged] == [first] * 3
    assert summary_of(output)["scores"]["after"][first] == max(scores[first] for scores in judged)
    # A resumed run goes on with the content that it began with.
    path.write_text(content.replace("red", "young"))
    words = f"--dev: expected what {output / 'checkpoints' / 'step-00000002'} began with, got another, {path}"
    assert words in refused(capsys, command(place, output, f"{more} 3 --resume"))
