"""Exit codes of every command. Any other is a fault of the program: Python ends with 1 after an error."""

DONE = 0
BAD_INPUT = 2  # or configuration: trying again would end in the same way
SOME_FAILED = 3  # of a sweep's points; all that could be done is done
STOPPED = 75  # before the end: the same command resumes
