"""What turns text into vectors for search."""
