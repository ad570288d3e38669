"""Clips to be asked about: BEANS-Zero, and folders of one's own recordings."""
