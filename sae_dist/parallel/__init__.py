"""What processes that compute together share, whatever they compute."""
