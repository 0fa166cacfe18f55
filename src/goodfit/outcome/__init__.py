"""What comes after training: the one final test, the bundle with its proof, plots and the report."""
