"""Surrogates fitted to trials: cross-validated, calibrated, carried to other scales."""
