"""Baton: disaggregated LLM serving. The library; the processes live in `services`."""

__version__ = "0.1.0"
