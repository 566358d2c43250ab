"""The process group: who is a member, and the one order in which all see messages."""
