"""Training as pure functions: one step, the GC penalty, and evaluation."""

from gc_nc.errors import require_extra

require_extra("train", "flax", "optax", "ml_collections")
