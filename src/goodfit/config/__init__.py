"""What was asked (`TrainRequest`), what was decided (`Plan`), and the pure function between them. Imports no torch."""
