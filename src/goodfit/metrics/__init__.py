"""Numbers out of tensors: exact under any split of the samples into batches and processes."""
