"""Communication between processes that compute together."""
