"""What can travel in a message, and as which bytes; and what tells a consumer that there is one."""
