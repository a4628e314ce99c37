"""latteflow: one model that understands pictures and makes them."""

__version__ = "0.1.0"
