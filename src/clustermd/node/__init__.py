"""The array process: control socket, start, stop."""
