"""Run configurations; each file says what it reproduces and what was measured with it."""
