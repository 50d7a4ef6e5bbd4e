"""Every byte of shared memory, every state of a slot; nothing here waits."""
