"""Placeholder until the import cure lands."""


def install() -> None:
    """Do nothing."""
