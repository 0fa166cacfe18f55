"""Errors, the event journal, safe files and counter-based random numbers. Imports nothing else of goodfit."""
