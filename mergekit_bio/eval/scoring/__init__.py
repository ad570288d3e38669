"""From answers to metrics: matching text with labels, the scores of a cell, how sure they are."""
