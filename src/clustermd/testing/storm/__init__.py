"""Storms: real nodes under load, and whatever can die or stand still does so, drawn from a seed."""
