"""Geometric complexity and neural collapse of neural networks, measured and controlled in JAX.

Importing this package starts no JAX backend and reads no data.
"""

__version__ = "0.1.0"
