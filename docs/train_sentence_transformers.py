"""Train an encoder with sentence-transformers' Trainer and the ClusterNS loss on a file of sentences.

python docs/train_sentence_transformers.py --model bert-base-uncased --sentences sentences.txt
"""

from __future__ import annotations

import argparse

from datasets import load_dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from clusterns.sentence_transformers import ClusteringState, ClusterNSLoss


def main() -> None:
    """Read the arguments, train, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--sentences", required=True, help="text file, one sentence a line")
    parser.add_argument("--output", default="runs/sentence-transformers")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--mini-batch-size", type=int, help="rows encoded at a time (gradient caching)")
    parser.add_argument("--num-clusters", type=int, default=128)
    parser.add_argument("--start-cosine", type=float, default=0.4)
    parser.add_argument("--max-steps", type=int, default=-1, help="default: one epoch")
    wanted = parser.parse_args()

    model = SentenceTransformer(wanted.model)
    model.max_seq_length = 32
    data = load_dataset("text", data_files=wanted.sentences, split="train").filter(
        lambda row: row["text"].strip()
    )
    loss = ClusterNSLoss(
        model,
        wanted.num_clusters,
        start_cosine=wanted.start_cosine,
        mini_batch_size=wanted.mini_batch_size,
        gather_across_devices=True,
    )
    args = SentenceTransformerTrainingArguments(
        output_dir=wanted.output,
        num_train_epochs=1,
        max_steps=wanted.max_steps,
        per_device_train_batch_size=wanted.batch_size,
        learning_rate=5e-5,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=10,
        save_steps=125,
        save_total_limit=2,
        dataloader_drop_last=True,
        report_to="none",
        seed=42,
    )
    trainer = SentenceTransformerTrainer(
        model, args, train_dataset=data, loss=loss, callbacks=[ClusteringState(loss)]
    )
    trainer.train()
    model.save(f"{wanted.output}/final")
    print({name: round(float(value), 4) for name, value in loss.last.items()})


if __name__ == "__main__":
    main()
