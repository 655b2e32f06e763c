"""Training as pure functions: one step, the GC penalty, and evaluation."""
