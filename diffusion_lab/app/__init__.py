"""The application: compose -> check -> build -> run.

`cli.py` is the entry; it, and what it imports at its top, knows neither torch nor lightning, so that help, completion
and error messages come at once.
"""
