"""The audit: whether the data is sound, and what was done about it. Samples leave the index, never the disk."""
