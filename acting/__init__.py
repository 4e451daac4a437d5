"""A model that acts: how it reads what it has lived through, whole or compressed."""
