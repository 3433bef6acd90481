"""The one error of bad data. Owns nothing else; must never import the readers that raise it."""


class DataError(ValueError):
    """Data that is missing, unreachable or not what its format says; the message names the file."""
