"""A safetensors checkpoint on disk: headers, index, byte ranges, cloning shards, publishing a directory atomically."""
