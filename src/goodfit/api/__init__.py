"""The story of a run, in order; the only place where tasks and engine meet."""
