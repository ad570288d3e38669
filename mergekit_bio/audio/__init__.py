"""From a waveform to the prefix of embeddings that Llama reads."""
