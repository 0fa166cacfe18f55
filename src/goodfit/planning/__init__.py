"""Measured choices and the rehearsal: drives the engine with a task that is handed to it."""
