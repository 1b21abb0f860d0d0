"""What a dictionary is worth: reconstruction, sparsity, loss recovered."""
