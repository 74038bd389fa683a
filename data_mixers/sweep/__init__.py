"""Trials: run in parallel, ended early where hopeless, written to a ledger that survives any kill."""
