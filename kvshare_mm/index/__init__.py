"""Finding donors: by shared n-grams, by identical prefix, and by meaning."""
