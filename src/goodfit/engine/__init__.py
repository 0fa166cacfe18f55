"""How a model learns: the step, the loop, evaluation and checkpoints. Knows tasks only by their five methods."""
