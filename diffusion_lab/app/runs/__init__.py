"""The run folder: where a run lies, what its record says, and its weights, to go on with, to read and to give away."""
