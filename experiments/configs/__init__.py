"""Run configurations; each file says what it reproduces and what it measured."""
