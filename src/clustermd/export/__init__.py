"""The NBD server."""
