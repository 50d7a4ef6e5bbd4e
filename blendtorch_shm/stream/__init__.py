"""One socket of one instance: its producer fills slots, its consumers lease them."""
