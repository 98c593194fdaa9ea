"""A prompt model as one module of sentence-transformers, for what its own modules cannot do.

Saved prompt models need it only with denoising at evaluation; modules.json then names it, and
`SentenceTransformer(folder, trust_remote_code=True)` loads it (version 6 asks for that word before it imports
any package but its own). It is also the way to train a prompt model there, since the WordWeights of the usual
form would train too:

>>> model = SentenceTransformer(modules=[PromptEncoder(SentenceEncoder.from_pretrained(folder))])
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .encoder import SentenceEncoder

try:
    from sentence_transformers.base.modules import InputModule
except ImportError:  # its place before version 5.4
    from sentence_transformers.models import InputModule  # type: ignore[no-redef]


class PromptEncoder(InputModule):
    """A `SentenceEncoder` as the only module of a SentenceTransformer; its embedding is the sentence's.

    In training mode the embedding passes through the head and the denoising as the encoder's settings say.
    Each text gets the template, and at its end the period, that it has at evaluation.
    """

    def __init__(self, encoder: SentenceEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    @property
    def tokenizer(self) -> Any:  # type: ignore[override]
        """Puts the template around each text."""
        return self.encoder.evaluation_tokenizer

    @property
    def max_seq_length(self) -> int:
        """Tokens a sentence is truncated to, without the template."""
        return self.encoder.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.encoder.max_length = self.encoder.check_max_length(value)

    def get_embedding_dimension(self) -> int:
        """Width D of the embeddings."""
        return self.encoder.embedding_dim

    # Its name before version 6.
    get_sentence_embedding_dimension = get_embedding_dimension

    def preprocess(self, inputs: Any, prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """Token ids and mask (B, T) of B texts; `prompt` comes before each, within the template."""
        return self.encoder.tokenize([(prompt or "") + text for text in inputs])

    def tokenize(self, texts: Any, **kwargs: Any) -> dict[str, Tensor]:
        """`preprocess` by its name before version 6."""
        return self.preprocess(texts)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds sentence_embedding (B, D) to the features of `preprocess`."""
        inputs = {name: features[name] for name in ("input_ids", "attention_mask")}
        features["sentence_embedding"] = self.encoder(inputs)
        return features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """As `SentenceEncoder.save`."""
        self.encoder.save(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> PromptEncoder:  # type: ignore[override]
        """The encoder of a folder or hub name that `SentenceEncoder.save` wrote."""
        if kwargs.get("revision") is not None:
            raise ValueError(f"revision: expected none for a PromptEncoder, got {kwargs['revision']!r}")
        return cls(SentenceEncoder.from_pretrained(model_name_or_path))
