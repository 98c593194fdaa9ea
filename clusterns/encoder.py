"""A transformers encoder that turns sentences into vectors, with the projection head of training.

The embedding is a pooling of the token states, or the mask token's state in a prompt. In training it passes
through a new Linear+Tanh head, at evaluation by default it does not (SimCSE's "MLP only in training", which
ClusterNS keeps). A saved encoder loads in transformers and in sentence-transformers, with the same vectors,
and says itself how it pools and prompts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_count
from .models.denoising import TemplateDenoising
from .models.encoding import encode
from .models.folder import HEAD_FILE, load_transformer, read_head, resolve
from .models.length_groups import map_groups
from .models.pooling import POOLINGS, check_pooling, pool
from .models.positions import longest_input
from .models.prompts import Prompt, PromptTokenizer
from .models.saving import replacing, save_tensors, write_encoder
from .models.settings import SETTINGS_FORMAT, read_encoder_settings
from .models.views import ViewTokenizer, check_texts


class SentenceEncoder(nn.Module):
    """A transformers encoder, a pooling, and the projection head.

    Args:
        transformer: an encoder of transformers, whose output has `last_hidden_state` (B, T, D).
        tokenizer: its tokenizer, with a padding token.
        pooling: a name of `models.pooling.POOLINGS`, which says what each does. None takes "mask" with a
            prompt, else "cls".
        head: "train" (the embedding passes through it in training only), "always", or "none" (there is
            none). None takes "none" with cls-before-pooler, else "train".
        prompt: templates that the sentences are put in, or what stands for `Prompt` of them; None takes the
            sentences as they are.
        max_length: tokens a sentence is truncated to: with a prompt of the sentence alone, else special
            tokens included. None takes what the tokenizer and the model's positions allow.

    Raises ValueError for an unknown pooling or head, or one that does not fit the other or the prompt, an
    encoder-decoder, a tokenizer without padding token, a max_length that the model has no positions for, and
    what `PromptTokenizer` and `TemplateDenoising` refuse.

    The head is Linear(D, D)+Tanh, initialised as BERT's layers are. The transformer's own pooler, where it
    has one, is unused: it is kept for saving, and frozen so that no optimiser or DDP waits for its gradient.
    """

    def __init__(
        self,
        transformer: Any,
        tokenizer: Any,
        *,
        pooling: str | None = None,
        head: str | None = None,
        prompt: Prompt | Sequence[str] | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        if not (prompt is None or isinstance(prompt, Prompt)):
            prompt = Prompt(prompt)  # type: ignore[arg-type]
        self.pooling, self.head_use = check_pooling(pooling, head, has_prompt=prompt is not None)
        if getattr(transformer.config, "is_encoder_decoder", False):
            kind = type(transformer).__name__
            raise ValueError(f"transformer: expected an encoder, got the encoder-decoder {kind}")
        if tokenizer.pad_token is None:
            raise ValueError(
                f"tokenizer: expected one with a padding token, got {type(tokenizer).__name__} without"
            )
        self.transformer = transformer
        self.tokenizer = tokenizer
        # On a CPU rows of like length pass together, with less padding; compiled code wants few shapes.
        self.by_length = True
        self.prompt = None if prompt is None else prompt.resolve(tokenizer)
        self.prompt_tokenizer = None if self.prompt is None else PromptTokenizer(self.prompt, tokenizer)
        positions = longest_input(transformer, tokenizer)
        # Tokens of a template, which max_length does not count.
        self.template_length = 0 if self.prompt_tokenizer is None else self.prompt_tokenizer.longest_template
        self.longest_input = positions - self.template_length
        self.max_length = self.check_max_length(
            int(min(tokenizer.model_max_length - self.template_length, self.longest_input))
            if max_length is None
            else max_length
        )
        self.head: nn.Sequential | None = None
        if self.head_use != "none":
            linear = nn.Linear(self.embedding_dim, self.embedding_dim)
            nn.init.normal_(linear.weight, std=getattr(transformer.config, "initializer_range", 0.02))
            nn.init.zeros_(linear.bias)
            self.head = nn.Sequential(linear, nn.Tanh())
        if isinstance(getattr(transformer, "pooler", None), nn.Module):
            transformer.pooler.requires_grad_(False)
        self.denoiser: TemplateDenoising | None = None
        if self.prompt_tokenizer is not None and (
            self.denoises(training=True) or self.denoises(training=False)
        ):
            self.denoiser = TemplateDenoising(
                self.prompt_tokenizer.templates,
                transformer,
                pad_token_id=tokenizer.pad_token_id,
                longest_input=positions,
                trained=self.prompt_tokenizer.prompt.denoising == "trained",
            )

    @property
    def embedding_dim(self) -> int:
        """Width D of the embeddings."""
        return int(self.transformer.config.hidden_size)

    @property
    def evaluation_tokenizer(self) -> Any:
        """What `encode` tokenises with: a prompt's first template around each text, else the tokenizer."""
        return self.prompt_tokenizer.evaluation_tokenizer if self.prompt_tokenizer else self.tokenizer

    @property
    def evaluation_template_length(self) -> int:
        """Tokens of the first template, special tokens included; 0 without a prompt."""
        return len(self.prompt_tokenizer.templates[0].ids) if self.prompt_tokenizer else 0

    def check_max_length(self, length: int) -> int:
        """The length itself; ValueError where the model has no room for it, or it for a sentence."""
        check_count("max_length", length, at_least=1)
        shortest = 1 if self.prompt else self.tokenizer.num_special_tokens_to_add() + 1
        if not shortest <= length <= self.longest_input:
            beside = f" beside a template of {self.template_length}" if self.prompt else ""
            raise ValueError(
                f"max_length: expected {shortest} to {self.longest_input} tokens for this model{beside}, "
                f"got {length}"
            )
        return length

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        pooling: str | None = None,
        head: str | None = None,
        prompt: Prompt | Sequence[str] | None = None,
        evaluation_denoising: bool | None = None,
        max_length: int | None = None,
    ) -> SentenceEncoder:
        """Load a local folder, or a hub name: from the local cache if it is there, else downloaded.

        What is None comes from the folder: from the clusterns.json that `save` writes, else from the
        sentence-transformers files, else it is the class's default.

        Args:
            name_or_path: a folder as transformers, sentence-transformers or `save` write it, or a hub name.
            pooling: a given one also overrides modules that are not supported (the bare encoder is then
                taken), and with them the head's use. One other than "mask" is refused for a prompt model,
                unless its prompt is taken off too.
            head: see the class.
            prompt: templates, or their published name, stand for `Prompt` of them; "none" takes a prompt
                model's prompt off.
            evaluation_denoising: overrides the prompt's own.
            max_length: see the class.

        The weights are float32 whatever the checkpoint's dtype. The head starts new where the folder has
        none. Returns the encoder in eval mode.

        Raises FileNotFoundError where the folder, its weights or its tokenizer is missing or the hub cannot
        be reached, ValueError where the files do not make such an encoder, contradict each other or the
        arguments; one line each.
        """
        folder = resolve(name_or_path)
        stated = read_encoder_settings(folder, pooling=pooling, head=head, prompt=prompt)
        if evaluation_denoising is not None:
            if stated.prompt is None:
                raise ValueError("evaluation_denoising: expected a prompt model, got one without a prompt")
            stated = replace(stated, prompt=replace(stated.prompt, evaluation_denoising=evaluation_denoising))
        transformer, tokenizer = load_transformer(stated.root, stated.tokenizer_folder)
        encoder = cls(
            transformer,
            tokenizer,
            pooling=stated.pooling,
            head=stated.head,
            prompt=stated.prompt,
            max_length=max_length,
        )
        if max_length is None and stated.max_length is not None:
            encoder.max_length = encoder.check_max_length(min(stated.max_length, encoder.longest_input))
        if encoder.head is not None:
            weights = read_head(folder, stated.modules, stated.root, encoder.embedding_dim)
            if weights is not None:
                encoder.head[0].load_state_dict(weights)
            elif encoder.head_use == "always" and head is None:
                raise FileNotFoundError(f"model: expected {HEAD_FILE} in {stated.root}, got a folder without")
        return encoder.eval()

    def tokenize(self, sentences: Iterable[str], *, max_length: int | None = None) -> dict[str, Tensor]:
        """Inputs of `forward` as `encode` makes them: token ids, attention mask, what else the model takes.

        Each is an int64 tensor (B, T) on the CPU, padded on the right to the longest sentence, truncated to
        `max_length` (None: the encoder's). For training see `view_tokenizer`.
        """
        length = self.max_length if max_length is None else self.check_max_length(max_length)
        texts = check_texts("sentences", sentences)
        if not texts:
            raise ValueError("sentences: expected at least one, got an empty list")
        batch = self.evaluation_tokenizer(
            texts,
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=length + self.evaluation_template_length,
            return_tensors="pt",
        )
        return dict(batch)

    def view_tokenizer(
        self, *, max_length: int | None = None, pad_to_multiple_of: int | None = None
    ) -> ViewTokenizer:
        """What makes rows of a training set into inputs of `forward`; it pickles for a DataLoader's workers.

        `max_length` and `pad_to_multiple_of` are `ViewTokenizer`'s; None takes the encoder's max_length.
        """
        return ViewTokenizer(
            self.tokenizer,
            max_length=self.max_length if max_length is None else self.check_max_length(max_length),
            prompt=self.prompt_tokenizer,
            pad_to_multiple_of=pad_to_multiple_of,
        )

    def forward(
        self, inputs: Mapping[str, Tensor], *, head: bool | None = None, denoise: bool | None = None
    ) -> Tensor:
        """Embeddings (rows, D) of a right-padded batch on the model's device.

        Args:
            inputs: of `tokenize` or of a `ViewTokenizer`. Any part of the rows may be taken of it.
            head: whether they pass through the projection head; None as the encoder's own setting says, for
                training or evaluation after the mode it is in.
            denoise: whether the template's own state is subtracted before that; None in the same way.

        Raises ValueError for a head or denoising that the encoder has not, inputs without attention_mask,
        and, on a CPU, rows that are padded on the left.
        """
        _check_inputs(inputs)
        pooled = self.pool(inputs)
        if denoise is None:
            denoise = self.denoises(training=self.training)
        if denoise:
            if self.denoiser is None:
                raise ValueError("denoise: expected an encoder with denoising, got one without")
            # After the sentences: autocast in older versions of torch keeps a weight's cast that was made
            # without gradient for all later uses.
            pooled = pooled - self.denoiser(
                self.transformer, inputs["attention_mask"], inputs.get("template")
            )
        if self.head_use == "always" or (self.head_use == "train" and self.training):
            head = head is not False
        return self.project(pooled) if head else pooled

    def denoises(self, *, training: bool) -> bool:
        """Whether the template's own state is subtracted in training, or at evaluation."""
        if self.prompt is None:
            return False
        return self.prompt.denoising != "none" if training else self.prompt.evaluation_denoising

    def pool(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Embeddings (rows, D) of inputs as `forward` takes them, before denoising and head."""
        return map_groups(self.pool_together, inputs) if self.by_length else self.pool_together(inputs)

    def pool_together(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The same in one pass of the transformer, padded to T as the inputs are."""
        mask = inputs["attention_mask"]
        template = inputs.get("template")
        outputs = self.transformer(
            **{name: value for name, value in inputs.items() if name != "template"},
            output_hidden_states=bool(POOLINGS[self.pooling].layers),
        )
        places = self.prompt_tokenizer.mask_index(mask, template) if self.prompt_tokenizer else None
        return pool(self.pooling, outputs, mask, places)

    def project(self, pooled: Tensor) -> Tensor:
        """The projection head, (rows, D) to (rows, D)."""
        if self.head is None:
            raise ValueError("head: expected an encoder with a head, got one with head 'none'")
        return self.head(pooled)

    def encode(
        self,
        sentences: Iterable[str],
        *,
        batch_size: int = 64,
        progress: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Embeddings (N, D) of the sentences, float32 on the CPU, without gradient or dropout.

        Args:
            sentences: N texts, a list or what can be walked through once.
            batch_size: of them at a time.
            progress: show a bar.
            dtype: torch.bfloat16 or torch.float16 computes in autocast to it, None or float32 without
                autocast, the caller's included.

        Each distinct sentence is encoded once, in batches of like length; the order is the caller's. With
        denoising at evaluation the template is encoded once for each length that occurs. The model runs
        where its parameters are, and gets back the mode it was in.
        Raises ValueError for a batch_size below 1, sentences that are not a list of strings, another dtype.
        """
        return encode(self, sentences, batch_size=batch_size, progress=progress, dtype=dtype)

    def settings(self) -> dict[str, Any]:
        """What clusterns.json holds: pooling, head, prompt (None without one) and max_length."""
        return {
            "format": SETTINGS_FORMAT,
            "pooling": self.pooling,
            "head": self.head_use,
            "prompt": None if self.prompt is None else asdict(self.prompt),
            "max_length": self.max_length,
        }

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        beside: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> list[str]:
        """Write the encoder as transformers and sentence-transformers load it, its head and clusterns.json.

        A prompt model's own tokenizer is in the folder `tokenizer`; the one beside the weights, for the other
        two libraries, puts the first template around each text. Their max_seq_length counts that too, and
        below its length the tokenizers library truncates nothing.

        `beside`: tensors to save with it, by the name of their .safetensors file.

        Everything is first written whole to a hidden folder inside `directory` and moved file by file, so an
        error while writing (a full disk) leaves an earlier encoder there as it was. Other files in
        `directory` stay. Returns the names of the files, below `directory`.

        Raises OSError where it cannot be written, ValueError for a pooling that sentence-transformers would
        not load as what it is.
        """
        with replacing(directory) as folder:
            write_encoder(self, folder)
            for name, tensors in (beside or {}).items():
                save_tensors(tensors, folder / name)
            files = (path for path in folder.rglob("*") if path.is_file())
            return sorted(path.relative_to(folder).as_posix() for path in files)


def _check_inputs(inputs: Any) -> None:
    """Require what `forward` takes; the mask is looked at on the CPU only, elsewhere the host would wait."""
    if not isinstance(inputs, Mapping) or "attention_mask" not in inputs:
        raise ValueError(
            "inputs: expected tensors as tokenize makes them, with attention_mask, "
            f"got {type(inputs).__name__}; encode takes texts"
        )
    mask = inputs["attention_mask"]
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if bool((mask.bool().any(dim=1) > mask[:, 0].bool()).any()):
        raise ValueError(
            "inputs: expected rows padded on the right, got padding before a text; tokenize and "
            "view_tokenizer pad as it must be"
        )
