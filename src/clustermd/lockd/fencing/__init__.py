"""Fencing policies: how a lost node is kept from writing, and what vouches for it."""
