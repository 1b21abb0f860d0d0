"""Trains dictionaries on the rows of a store."""
