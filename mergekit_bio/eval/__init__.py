"""From a recipe to predictions, scores and a report."""
