"""A command as a job of a scheduler: what is sent, how it is sent, and what runs it there."""
