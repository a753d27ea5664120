"""How operations move and combine data: one file an algorithm."""
