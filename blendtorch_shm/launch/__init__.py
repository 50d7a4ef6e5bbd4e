"""What a launch is: addresses, keys, its directories, its launch information."""
