"""When to checkpoint: how often lives end (hazard), what a checkpoint costs, and the interval that follows."""
