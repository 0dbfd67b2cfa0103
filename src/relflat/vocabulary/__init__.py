"""Cross-entropy and its penalty for large vocabularies, without the logits."""
