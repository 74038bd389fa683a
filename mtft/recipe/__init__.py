"""The recipe: what a run does, in one strict YAML file.

schema/ declares it, load.py reads it (yaml_source.py: text and lines), error_messages.py and cross_checks.py say what
is wrong with one, compatibility.py (rules/) what can't go together.
"""
