"""Who answers: the model in Transformers, in vLLM, or on servers."""
