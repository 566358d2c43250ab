"""Traces of clusters, real or simulated: events, the rules they are judged by, and how they are drawn."""
