"""From answers to figures: matching text with labels, the scores of a cell, how sure they are."""
