"""The native engine: continuous batching over preallocated KV slots, with transformers' models."""
