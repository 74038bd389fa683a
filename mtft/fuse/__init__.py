"""Weak-to-strong: a small tuned model steers a large one while it decodes. Way in: model.py; maths: alpha.py."""
