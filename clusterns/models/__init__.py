"""How texts become embeddings: tokens, prompts, poolings, and the folders that models are kept in."""
