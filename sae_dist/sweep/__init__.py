"""Many configurations of one command: the points, their ledger, and the report on them."""
