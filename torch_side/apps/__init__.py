"""The command-line programs of the training side."""
