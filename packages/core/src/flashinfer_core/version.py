"""The version of all five packages: they move together, and a wheel adds what it was built for (`+cu130torch2.11`)."""

__version__ = "0.1.0"
