"""A compiled step: its program, and what that takes in memory and seconds."""
