"""Reuse of similar requests' KV, whatever runs the model."""
