"""Tokens to the residual stream: language models and their hook points."""
