"""What is there on disk: which format it is, and its samples as an index. No image is opened."""
