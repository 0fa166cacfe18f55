"""What is learned: one class of five methods per task. The engine never imports this folder."""
