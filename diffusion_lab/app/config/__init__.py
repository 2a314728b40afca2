"""From the words of a command line to a checked config.

Nothing here imports torch or lightning, so mistakes are told at once.
"""
