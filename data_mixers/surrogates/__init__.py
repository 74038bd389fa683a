"""Models of score by mixture, one family a file."""
