"""Arithmetic between array sectors and member sectors."""
