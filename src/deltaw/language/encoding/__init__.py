"""Samples to rows of tokens: chat templates, where the answers stand, batches."""
