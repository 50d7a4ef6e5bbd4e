"""The insides of a launch: its configuration, its processes, their packages, ports and display."""
