"""Activations on object storage: format, writer, reader, order, loader."""
