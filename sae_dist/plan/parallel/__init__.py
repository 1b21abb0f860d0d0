"""What needs process groups: how fast this machine exchanges tensors, and a simulated step of any number of ranks."""
