"""What belongs to a process as a whole: its exit and its file descriptors."""
