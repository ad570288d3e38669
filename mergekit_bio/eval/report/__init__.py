"""Scores compared over alpha: tables, figures, one page, files."""
