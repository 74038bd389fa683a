"""What can't go together although each key is right: a table of rules, one file a theme.

Rows say nothing about values of one key (schema) or names and sums (cross_checks.py).
"""
