"""Where deltas come from: a PEFT directory, a NatureLM-audio checkpoint, a full fine-tune."""
