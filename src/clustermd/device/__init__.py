"""Member devices: files and block devices, the submitter and the I/O gate in front of it."""
