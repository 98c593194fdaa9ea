"""`clusterns encode`: a row for every text, in order, as sentence-transformers has it; what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from tiny import SENTENCES, make_encoder
from train_problems import refused

from clusterns import encode
from clusterns.cli import main
from clusterns.encode import encode_file

pytestmark = pytest.mark.usefixtures("one_thread")
# Repeated, of unlike lengths, with blanks, and more than are sorted at a time.
TEXTS = [*SENTENCES, "a bird sat on the mat", "  ", *reversed(SENTENCES)] * 5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encode") / "model"
    make_encoder(pooling="mean").save(folder)
    return folder


def by_sentence_transformers(folder, texts) -> np.ndarray:
    library = pytest.importorskip("sentence_transformers")
    return library.SentenceTransformer(str(folder), device="cpu").encode(texts)


def write(folder, kind: str):
    """The texts as a file, beside a column of numbers where it has several."""
    path = folder / f"texts.{kind}"
    if kind == "txt":
        path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"n": n, "text": t}) + "\n" for n, t in enumerate(TEXTS)))
    else:
        parquet.write_table(pa.table({"n": range(len(TEXTS)), "text": TEXTS}), path)
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_row_i_is_text_i(model, tmp_path, capsys, kind):
    file, expected = write(tmp_path, kind), by_sentence_transformers(model, [t.strip() for t in TEXTS])
    assert expected.std(axis=0).min() > 0.1  # texts differ well beyond the tolerance
    assert (
        main(["encode", str(model), str(file), "--output", str(tmp_path / "x.npy"), "--batch-size", "2"]) == 0
    )
    told = capsys.readouterr()
    blank = sum(not text.strip() for text in TEXTS)
    assert f"clusterns: warning: {file}: of {len(TEXTS)} rows {blank} with a blank text (" in told.err
    assert "are encoded as the empty text" in told.err
    found = np.load(tmp_path / "x.npy")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    encode_file(model, file, tmp_path / "x.parquet", batch_size=2, progress=False)
    table = parquet.read_table(tmp_path / "x.parquet")
    assert table.column("text").to_pylist() == [text.strip() for text in TEXTS]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), found.shape[1])
    np.testing.assert_array_equal(np.stack(table.column("embedding").to_numpy()), found)


@pytest.mark.parametrize(("more", "count"), [((), 5), (("--header",), 3)])
def test_blank_lines_before_the_first_text(model, tmp_path, more, count):
    """They are rows as those between texts; behind a header the rows begin with the first text."""
    file = tmp_path / "t.txt"
    file.write_text("\n\na cat\n\nthe dog\n" if not more else "\ntext\n\na cat\n\nthe dog\n\n")
    assert main(["encode", str(model), str(file), "--output", str(tmp_path / "x.npy"), *more]) == 0
    texts = ["", "", "a cat", "", "the dog"][-count:]
    expected = make_encoder(pooling="mean").encode(texts)
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), expected, atol=1e-5)


def test_a_model_that_ends_in_normalize(model, tmp_path):
    """By our encoder and by sentence-transformers, and the other settings."""
    modules = pytest.importorskip("sentence_transformers.models")
    library = pytest.importorskip("sentence_transformers")
    transformer = modules.Transformer(str(model))
    pooling = modules.Pooling(16, pooling_mode="mean")
    folder = str(tmp_path / "normalized")
    library.SentenceTransformer(modules=[transformer, pooling, modules.Normalize()], device="cpu").save(
        folder
    )
    (tmp_path / "t.csv").write_text("a;b\nbird;the dog ran\ncat;far far home on the mat\n")
    given = {"delimiter": "semicolon", "text_columns": "b", "progress": False}
    encode_file(folder, tmp_path / "t.csv", tmp_path / "x.npy", **given)
    found, texts = np.load(tmp_path / "x.npy"), ["the dog ran", "far far home on the mat"]
    np.testing.assert_allclose(found, by_sentence_transformers(folder, texts), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    encode_file(model, tmp_path / "t.csv", tmp_path / "x.npy", **given, pooling="cls", max_length=4)
    expected = make_encoder(pooling="cls", max_length=4).encode(texts)
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), expected, atol=1e-5)


def test_bad_input_is_one_line_and_leaves_an_earlier_output(model, tmp_path, capsys, monkeypatch):
    file, output = tmp_path / "t.txt", tmp_path / "x.npy"
    file.write_text("a cat\nthe dog\n")
    output.write_text("earlier")
    pairs, empty = tmp_path / "pairs.csv", tmp_path / "empty.csv"
    pairs.write_text("a,b\ncat,dog\nbird,mat\n")
    empty.write_text("text,n\n,1\n ,2\n")
    for arguments, words in (
        ((file, tmp_path / "x.csv"), "--output: expected a name that ends in .npy or .parquet, got "),
        ((output, output), "--output: expected a file that this command does not read, got "),
        ((pairs, output, "--text-columns", "a,b"), "--text-columns: expected one column, got 2: a,b"),
        ((tmp_path / "none.txt", output), "expected a file of sentences, there is none"),
        (
            (empty, output, "--text-columns", "text"),
            "expected texts, got 2 with a blank text (line 2; line 3)",
        ),
        ((file, output, "--batch-size", "0"), "batch-size: expected at least 1, got 0"),
        ((file, output, "--max-length", "99"), "max_length: expected 3 to 24 tokens"),
    ):
        file_given, output_given, *more = map(str, arguments)
        given = ["encode", str(model), file_given, "--output", output_given, *more]
        assert words in refused(capsys, given)
    given = ["encode", "no/such/model", str(file), "--output", str(output)]
    assert "model: expected a folder or a " in refused(capsys, given)
    given[1] = str(model)

    class Broken:
        def encode(self, texts, **settings):
            vectors = torch.ones(len(texts), 4)
            vectors[1:, 2] = torch.nan
            return vectors

    real = encode.load_model
    loaded = real(model)._replace(encoder=Broken())
    monkeypatch.setattr(encode, "load_model", lambda *args, **settings: loaded)
    assert "expected finite embeddings, got NaN or infinity in row 2" in refused(capsys, given)

    def load_slowly(*args, **settings):
        with file.open("a") as more:
            more.write("bird\n")
        return real(*args, **settings)

    monkeypatch.setattr(encode, "load_model", load_slowly)
    assert f"{file}: expected a file that stays as it is meanwhile" in refused(capsys, given)
    assert output.read_text() == "earlier"
    assert {path.name for path in tmp_path.iterdir()} == {"t.txt", "x.npy", "pairs.csv", "empty.csv"}
