"""Transports: how frames get from one member of a view to another."""
