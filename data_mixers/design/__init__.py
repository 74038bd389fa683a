"""Which mixtures to try, and which tasks matter for a target."""
