"""Trains the small default models: real classes and formats, toy sizes, minutes on a CPU."""
