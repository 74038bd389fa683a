"""The recipe: what a run does, in one strict YAML file.

schema.py declares it, load.py reads it, words.py and checks.py say what is wrong with one, compat.py what
can't go together.
"""
