"""A step in closed form: what a device of a config does and keeps, without tracing or compiling it."""
