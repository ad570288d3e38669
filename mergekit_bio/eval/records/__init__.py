"""What a run leaves on disk: its record, its predictions, and cells read back from them."""
