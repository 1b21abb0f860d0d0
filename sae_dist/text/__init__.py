"""Text to tokens: sources, tokenisation, the origin of every token."""
