"""Parts of the plan that need process groups: a measured exchange, and a simulated step of any number of ranks."""
