"""What every room needs and no library gives: errors, atomic writes, fingerprints, hints for misspelt names."""
