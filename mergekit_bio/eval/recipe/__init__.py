"""What a run is made of: recipes, ours and the reference's, read so that an error names the line."""
