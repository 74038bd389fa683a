"""Weak-to-strong: a small tuned model steers a large one while it decodes. Start at model.py; the maths is in alpha.py."""
