"""The command line: mdadm's grammar, and our own verbs."""
