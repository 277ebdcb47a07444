"""Losses of hidden states and output weights; logits exist for a few tokens at a time."""
