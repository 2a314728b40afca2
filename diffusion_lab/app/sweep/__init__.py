"""Sweeps of train.py: plan, launch, journal, table. See `run.py`."""
