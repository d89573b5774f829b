"""The numerical paths of KV reuse, each with a slow and obvious reference beside it."""
