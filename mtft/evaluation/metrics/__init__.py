"""Metrics of what a model answers: one method a file, one dict of names, one way to make them from a recipe."""
