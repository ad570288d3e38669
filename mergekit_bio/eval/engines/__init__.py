"""Inference engines: prompts with audio in, generations out."""
