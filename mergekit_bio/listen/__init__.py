"""Recordings to answers or embeddings."""
