"""The declaration of a recipe: pydantic models, one file a section."""
