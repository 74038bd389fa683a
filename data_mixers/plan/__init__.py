"""The exact order of a run's rows: counts of every step, orders of every epoch, schedules, changes on the way."""
