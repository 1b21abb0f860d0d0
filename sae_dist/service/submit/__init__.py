"""A command of ours as a job of somebody else's scheduler: what is sent, how, and what runs it there."""
