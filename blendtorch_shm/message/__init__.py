"""What can travel in a message, and as which bytes."""
