"""The merged audio model for Transformers and vLLM."""
