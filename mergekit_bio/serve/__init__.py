"""The server: vLLM's OpenAI API and the predictions_v1 contract of beans-next on one port."""
