"""The formats in which answers are written."""
