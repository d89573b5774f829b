"""What the embedded models know: a small shop's drawn photos, and requests with right answers."""
