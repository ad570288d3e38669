"""Model cards and publishing on the Hugging Face Hub."""
