class ImageRLError(Exception):
    """Something the user can mend. The message is one line that names the fix; the command line
    prints it without a traceback."""
