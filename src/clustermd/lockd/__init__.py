"""The node's lock and membership daemon."""
