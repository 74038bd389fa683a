"""Mixtures that change while a run goes on: the controller, and one method a file."""
