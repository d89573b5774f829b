"""The OpenAI-compatible server: `kvshare serve`."""
