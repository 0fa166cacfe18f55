"""Which networks there are, and how one is built with its pretrained weights."""
