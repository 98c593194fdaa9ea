"""One training step in its parts; as a script, the peak memory of one (for bench/training.py).

python bench/training_step.py MODEL CONTENDER BATCH DEVICE    prints JSON
"""

from __future__ import annotations

import contextlib
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from baselines import published_step
from contenders import SETTINGS
from memory_worker import resident_kib
from torch import Tensor

from clusterns import CachedClusterNSLoss, ClusterNSLoss
from clusterns.corpus.docstrings import docstring_corpus
from clusterns.encoder import SentenceEncoder
from clusterns.training.scratch import small_bert, train_tokenizer

LENGTH = 32
MEMORY_CLUSTERS = 128
LOSSES = "loss: clusterns", "loss: published"  # compared before they are timed


def write_model(folder: Path, layers: int, hidden: int) -> tuple[Path, Path]:
    """A BERT of random weights with a tokenizer, and a file of sentences."""
    sentences = docstring_corpus(20_000, seed=0).sentences
    text = folder / "sentences.txt"
    text.write_text("\n".join(" ".join(line.split()) for line in sentences) + "\n", encoding="utf-8")
    tokenizer = train_tokenizer(sentences)
    bert = small_bert(
        tokenizer, seed=0, hidden_size=hidden, layers=layers, heads=max(1, hidden // 64), dropout=0.1
    )
    SentenceEncoder(bert, tokenizer, pooling="cls", head="none").save(folder / "model")
    return folder / "model", text


class Step:
    """Sentences to an optimiser step, each part timed with the device waited for."""

    def __init__(self, folder: Path, sentences: Path, batch: int, clusters: int, device: torch.device):
        self.batch, self.device = batch, device
        self.encoder = SentenceEncoder.from_pretrained(folder).to(device).train()
        self.tokenize = self.encoder.view_tokenizer(max_length=LENGTH)
        self.lines = sentences.read_text(encoding="utf-8").splitlines()
        self.next = 0
        self.operations = 0.0  # of the encoder in the last step, forward and backward
        self.encoder.transformer.register_forward_pre_hook(
            lambda _module, _args, given: self.count_operations(*given["input_ids"].shape), with_kwargs=True
        )
        self.loss_fn = ClusterNSLoss(self.encoder.embedding_dim, clusters, start_cosine=1.0).to(device)
        self.optimizer = torch.optim.AdamW(self.encoder.parameters(), lr=5e-5, weight_decay=0.0, fused=True)

    def timed(self) -> dict[str, float]:
        """Seconds of each part."""
        took: dict[str, float] = {}

        def time_of(name: str, run: Callable[[], Any]) -> Any:
            self.wait()
            began = time.perf_counter()
            found = run()
            self.wait()
            took[name] = took.get(name, 0.0) + time.perf_counter() - began
            return found

        inputs = time_of("data", self.inputs)
        self.operations = 0.0
        embeddings = time_of("encoder", lambda: self.encode(inputs))
        leaves = [view.detach().requires_grad_() for view in embeddings.float().chunk(2)]
        if not self.loss_fn.clustering_active:  # the step that seeds is not like the others
            self.loss_fn(*leaves)
        centroids = self.loss_fn.centroids.clone()
        theirs = time_of(LOSSES[1], lambda: self.differentiate(published_step, leaves, centroids, SETTINGS))
        mine = time_of(LOSSES[0], lambda: self.differentiate(self.loss_fn, leaves))
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
        gradient = torch.cat([leaf.grad for leaf in leaves]).to(embeddings.dtype)
        time_of("encoder", lambda: embeddings.backward(gradient))
        time_of("optimiser", self.optimise)
        return took

    def count_operations(self, rows: int, tokens: int) -> None:
        """Of the matrix products, forward and twice that backward: layers, and attention's two products."""
        config = self.encoder.transformer.config
        layers = sum(p.numel() for p in self.encoder.transformer.encoder.parameters() if p.ndim == 2)
        attention = 4 * config.num_hidden_layers * tokens**2 * config.hidden_size
        self.operations += 3.0 * rows * (2 * tokens * layers + attention)

    def wait(self) -> None:
        """For the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def inputs(self) -> dict[str, Tensor]:
        """Token ids (2B, T) of the next sentences."""
        rows = [(self.lines[(self.next + i) % len(self.lines)],) for i in range(self.batch)]
        self.next += self.batch
        return {name: value.to(self.device) for name, value in self.tokenize(rows).items()}

    def encode(self, inputs: dict[str, Tensor]) -> Tensor:
        """Embeddings (2B, D)."""
        with self.autocast():
            return self.encoder(inputs)

    def autocast(self) -> contextlib.AbstractContextManager:
        """bfloat16 on a GPU."""
        if self.device.type == "cuda":
            return torch.autocast("cuda", torch.bfloat16)
        return contextlib.nullcontext()

    def differentiate(self, loss: Callable[..., Tensor], leaves: list[Tensor], *more: Any) -> Tensor:
        """Loss, 0-d, with gradients left in the leaves."""
        for leaf in leaves:
            leaf.grad = None
        value = loss(*leaves, *more)
        value.backward()
        return value.detach()

    def optimise(self) -> None:
        """Clip and move."""
        torch.nn.utils.clip_grad_norm_(self.encoder.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def matrix_rate(device: torch.device, size: int = 2048, rounds: int = 7) -> float:
    """Operations a second of one matrix product, in the dtype of the encoder."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = 4 * size if device.type == "cuda" else size
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    took = []
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    return 2.0 * size**3 / statistics.median(took)


def peak_of_a_step(folder: Path, contender: str, batch: int, device: torch.device) -> float:
    """MiB above the model: encoder, loss, backward."""
    torch.manual_seed(0)
    encoder = SentenceEncoder.from_pretrained(folder).to(device).train()
    dim = encoder.embedding_dim
    centroids = torch.randn(MEMORY_CLUSTERS, dim, device=device)
    vocabulary = encoder.transformer.config.vocab_size
    ids = torch.randint(5, vocabulary, (batch, LENGTH), device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kind: Any = ClusterNSLoss
    if "mini-batches" in contender:
        kind = lambda *sizes: CachedClusterNSLoss(*sizes, mini_batch_size=int(contender.split()[-1]))  # noqa: E731
    loss_fn = kind(dim, MEMORY_CLUSTERS).to(device)
    loss_fn.centroids.copy_(centroids)
    loss_fn.initialized.fill_(True)

    def step(rows: slice) -> None:
        part = {name: value[rows] for name, value in inputs.items()}
        if isinstance(loss_fn, CachedClusterNSLoss):
            loss = loss_fn(encoder, part, part)
        else:
            embeddings = [encoder(part), encoder(part)]
            loss = (
                published_step(*embeddings, centroids, SETTINGS)
                if contender == "published"
                else loss_fn(*embeddings)
            )
        loss.backward()

    step(slice(0, 8))  # gradients' own place, libraries, thread pools
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(slice(None))
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    limit_memory()
    before = resident_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step(slice(None))
    return (resident_kib("VmHWM") - before) / 1024


def limit_memory() -> None:
    """Fail with an error where memory runs out, before the system kills this process or another."""
    available = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    size = resident_kib("VmSize") * 1024 + int(0.9 * available)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


if __name__ == "__main__":
    model, name, size, where = sys.argv[1:]
    print(json.dumps({"peak_mib": peak_of_a_step(Path(model), name, int(size), torch.device(where))}))
