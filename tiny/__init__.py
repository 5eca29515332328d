"""What makes a demonstration on a laptop possible: generated problems and small models."""
